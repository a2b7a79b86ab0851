"""Trains the small Stable Diffusion that ships with the package, from nothing, on phantoms only.

A tool to try the whole chain on a laptop needs a base model that fits in a package and whose training data is known to the last pixel.
Two networks must be trained, and the second needs the latents of the first. To train both at the same time, the codec's encoder is pulled
towards targets known beforehand: the first principal components of 8 x 8 patches, scaled to unit variance (`PatchBasis`). The denoiser
learns on those targets while the codec is trained, then goes on with the latents the codec really gives.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from vhs import diffusion, prompts
from vhs.checkpoint import Progress
from vhs.diffusion import Components
from vhs.measure import CLASSES, VIEWS, View
from vhs.settings import Pretraining
from vhs.training import generator

LATENT_CHANNELS = 4
_PROMPT_TOKENS = 32
_LATENT_NOISE = 0.05  # of a latent's unit variance: what the encoder's posterior spreads to, and what the decoder must shrug off
_WORD_STD = 0.5  # of word embeddings: as large as what the layers add, so that every position of the output still tells its word
_WARMUP_STEPS = 200


@dataclass(frozen=True)
class PatchBasis:
    """A linear codec: the leading principal components of f x f patches. vectors [C,1,f,f] orthonormal, std [C] of their coefficients."""

    grey: float
    vectors: torch.Tensor
    std: torch.Tensor

    @classmethod
    def fit(cls, images: np.ndarray, factor: int) -> PatchBasis:
        """From uint8 [N,S,S]; every image counts, so hand over a few hundred."""
        pixels = torch.from_numpy(images).to(torch.float64)[:, None] / 127.5 - 1
        grey = pixels.mean()
        patches = F.unfold(pixels - grey, factor, stride=factor).transpose(1, 2).reshape(-1, factor * factor)
        variance, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
        leading = vectors.flip(1)[:, :LATENT_CHANNELS].T
        sign = leading.gather(1, leading.abs().argmax(1, keepdim=True)).sign()  # eigenvectors have none of their own
        std = variance.flip(0)[:LATENT_CHANNELS].sqrt()
        return cls(float(grey), (leading * sign).reshape(-1, 1, factor, factor).float(), std.float())

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """[N,1,S,S] in -1..1 -> [N,C,S/f,S/f] of unit variance."""
        coefficients = F.conv2d(pixels - self.grey, self.vectors.to(pixels), stride=self.vectors.shape[-1])
        return coefficients / self.std.to(pixels)[:, None, None]

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """The linear reconstruction, the bar a trained decoder has to clear."""
        coefficients = latents * self.std.to(latents)[:, None, None]
        return F.conv_transpose2d(coefficients, self.vectors.to(latents), stride=self.vectors.shape[-1]) + self.grey


def build_tokenizer(views: list[View]) -> CLIPTokenizer:
    """CLIP's byte-pair tokenizer with a vocabulary of its own, a few hundred pieces; any text can still be spelt in bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()
    words = pre_tokenizers.Split(Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), behavior="removed", invert=True)
    learner.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    trainer = trainers.BpeTrainer(vocab_size=1024, end_of_word_suffix="</w>", initial_alphabet=letters, show_progress=False)
    learner.train_from_iterator(prompts.vocabulary(views), trainer)
    vocabulary: dict[str, int] = {}
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    pieces = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    for piece in [*pieces, "<|startoftext|>", "<|endoftext|>"]:
        vocabulary.setdefault(piece, len(vocabulary))
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=_PROMPT_TOKENS)


def build(settings: Pretraining) -> Components:
    """Untrained components, initial weights a function of settings.seed."""
    tokenizer = build_tokenizer([VIEWS[name] for name in settings.views])
    levels, attending, width = len(settings.codec_channels), len(settings.unet_channels) - 1, settings.text_width
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        # fmt: off
        text_encoder = CLIPTextModel(CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width, projection_dim=width, hidden_act="quick_gelu",
            num_hidden_layers=settings.text_layers, num_attention_heads=4, max_position_embeddings=_PROMPT_TOKENS,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        ))
        nn.init.normal_(text_encoder.get_input_embeddings().weight, std=_WORD_STD)
        unet = UNet2DConditionModel(
            sample_size=settings.resolution_px // 2 ** (levels - 1), in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS,
            block_out_channels=settings.unet_channels, layers_per_block=1, cross_attention_dim=width, attention_head_dim=4, norm_num_groups=8,
            down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * attending),
            up_block_types=(*["CrossAttnUpBlock2D"] * attending, "UpBlock2D"),
        )
        vae = AutoencoderKL(
            in_channels=3, out_channels=3, latent_channels=LATENT_CHANNELS, block_out_channels=settings.codec_channels, layers_per_block=1,
            down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels, norm_num_groups=8,
            sample_size=settings.resolution_px, scaling_factor=1.0,  # the targets have unit variance already
        )
        # fmt: on
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction", clip_sample=False,
        timestep_spacing="trailing", steps_offset=1,
    )  # fmt: skip
    return Components(tokenizer, text_encoder.eval(), unet.eval(), vae.eval(), scheduler)


def optimise(
    network: nn.Module, loss: Callable[[int], tuple[torch.Tensor, dict]], steps: int, learning_rate: float, ema_decay: float,
    accelerator: Accelerator, progress: Progress,
) -> None:  # fmt: skip
    """Minimises `loss(step)` over the parameters of `network` (AdamW, warm-up, constant, cosine) and leaves their moving average in it.

    One rank: this model is small. `loss` returns the value to minimise and detached figures to log; its randomness is a function of step.
    Raises FloatingPointError when the loss is no longer a number.
    """
    average = copy.deepcopy(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=1e-3)
    state = progress.resume()
    if state is not None:
        network.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
    done = state["step"] if state else 0

    def capture() -> dict:
        parts = {"model": network, "average": average, "optimizer": optimizer}
        return copy.deepcopy({"step": done} | {name: part.state_dict() for name, part in parts.items()})

    network.train()
    while done < steps:
        past_half = max(0.0, 2 * done / steps - 1)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1, (done + 1) / _WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * past_half))
        with accelerator.autocast():
            value, figures = loss(done)
        if not torch.isfinite(value):
            raise FloatingPointError(f"the loss is {value.item()} at step {done} of {steps}: lower learning_rate (now {learning_rate})")
        accelerator.backward(value)
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        update = get_ema_multi_avg_fn(min(ema_decay, (done + 1) / (done + 10)))  # a short memory while everything still moves
        update(list(average.parameters()), list(network.parameters()), done)
        done += 1
        progress.step(done, steps, {name: float(figure) for name, figure in figures.items()}, capture)
    network.load_state_dict(average.state_dict())
    network.eval()


def crops(images: np.ndarray, step: int, settings: Pretraining) -> torch.Tensor:
    """The codec's batch of a step: [B,1,c,c] in -1..1, whole images in the last fifth of the steps.

    Phantoms are one narrow kind of picture and the codec is never fine-tuned: crops are turned, mirrored, inverted, stretched in
    contrast and laid over each other, so that it learns edges rather than phantoms and also carries real radiographs.
    """
    whole = step >= 0.8 * settings.codec_steps
    size = settings.resolution_px if whole else min(settings.codec_crop_px, settings.resolution_px)
    count = max(4, settings.codec_batch * settings.codec_crop_px**2 // size**2)
    rng = np.random.default_rng([settings.seed, 1, step])

    def crop() -> np.ndarray:
        y, x = rng.integers(0, images.shape[-1] - size + 1, 2)
        picture = images[rng.integers(len(images)), y : y + size, x : x + size].astype(np.float32) / 127.5 - 1
        return picture if rng.random() < 0.5 else np.rot90(picture, rng.integers(4))[:, :: 1 - 2 * int(rng.integers(2))]

    def vary(picture: np.ndarray) -> np.ndarray:
        if rng.random() < 0.5:
            return picture
        if rng.random() < 0.3:
            share = rng.uniform(0.3, 0.7)
            picture = share * picture + (1 - share) * crop()
        return np.clip(picture * rng.uniform(0.5, 1.6) * (1 if rng.random() < 0.8 else -1) + rng.uniform(-0.3, 0.3), -1, 1)

    return torch.from_numpy(np.stack([vary(crop()) for _ in range(count)]))[:, None]


def _edges(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]


def train_codec(
    components: Components, images: np.ndarray, basis: PatchBasis, settings: Pretraining, accelerator: Accelerator, progress: Progress
) -> None:
    """Trains components.vae in place on uint8 [N,S,S] images.

    The encoder regresses the basis' coefficients and a small fixed posterior spread. The decoder reads the exact coefficients at
    first (codec_head_start), then the encoder's latents, always with noise of the posterior's size.
    """
    vae = components.vae

    def loss(step: int) -> tuple[torch.Tensor, dict]:
        pixels = crops(images, step, settings).to(accelerator.device)
        target = basis.encode(pixels)
        posterior = vae.encode(pixels.expand(-1, 3, -1, -1)).latent_dist
        pin = F.mse_loss(posterior.mean, target)
        spread = F.mse_loss(posterior.logvar, torch.full_like(posterior.logvar, 2 * math.log(_LATENT_NOISE)))
        latents = target if step < settings.codec_head_start * settings.codec_steps else posterior.mean
        noise = torch.randn(latents.shape, generator=generator(settings.seed, 2, step)).to(latents)
        drawn = vae.decode(latents + _LATENT_NOISE * noise).sample
        error = drawn - pixels
        sharpness = sum(edge.abs().mean() for edge in _edges(error))
        value = error.abs().mean() + sharpness + 4 * error.square().mean() + 0.2 * pin + 0.001 * spread
        psnr = -10 * torch.log10((drawn.detach().mean(1, keepdim=True) - pixels).square().mean() / 4)
        return value, {"psnr_db": psnr, "latent_error": pin.detach().sqrt(), "loss": value.detach()}

    optimise(vae, loss, settings.codec_steps, settings.codec_learning_rate, settings.ema_decay, accelerator, progress)


def train_denoiser(
    components: Components, latents: torch.Tensor, names: list[tuple[str, str]], settings: Pretraining, steps: int,
    accelerator: Accelerator, progress: Progress,
) -> None:  # fmt: skip
    """Trains components.unet in place on latents [N,C,h,w]; names[i] = (view, class) of sample i.

    The text encoder keeps its random weights. They tell a few dozen words apart, which is all that is asked of them; when it was trained
    along, it sorted prompts by their subject alone within a thousand steps and the word for the size was lost for good.
    """

    def loss(step: int) -> tuple[torch.Tensor, dict]:
        rng = np.random.default_rng([settings.seed, 3, step])
        chosen = rng.integers(len(latents), size=settings.batch)
        texts = [prompts.pretraining_prompt(VIEWS[names[i][0]], names[i][1], rng) for i in chosen]
        texts = ["" if rng.random() < settings.prompt_dropout else text for text in texts]
        # one noise level out of each of `batch` equal slices: a quieter gradient
        levels = ((rng.permutation(settings.batch) + rng.random(settings.batch)) / settings.batch) ** settings.noise_exponent
        timesteps = torch.from_numpy((levels * components.scheduler.config.num_train_timesteps).astype(np.int64)).to(accelerator.device)
        clean = latents[torch.from_numpy(chosen)].to(accelerator.device)
        noise = torch.randn(clean.shape, generator=generator(settings.seed, 4, step)).to(clean)
        with torch.no_grad():
            embeddings = diffusion.embed(components, texts)
        each = diffusion.denoising_loss(components, clean, embeddings, noise, timesteps, settings.min_snr_gamma)
        return each.mean(), {"loss": each.detach().mean()}

    optimise(components.unet, loss, steps, settings.learning_rate, settings.ema_decay, accelerator, progress)


def class_names(points: np.ndarray, view: str) -> list[tuple[str, str]]:
    """(view, class) of each row of key points [N,K,2], as `train_denoiser` wants them."""
    return [(view, CLASSES[i]) for i in VIEWS[view].classify(VIEWS[view].measure(points))]


@torch.no_grad()
def latents_of(components: Components, images: np.ndarray, batch: int = 64) -> torch.Tensor:
    """The codec's own latents of uint8 [N,S,S], for the second half of the denoiser's training."""
    parts = [torch.from_numpy(images[i : i + batch])[:, None] for i in range(0, len(images), batch)]
    return torch.cat([diffusion.encode_images(components, part).cpu() for part in parts])


def reconstruct(components: Components, images: np.ndarray, batch: int = 32) -> np.ndarray:
    """uint8 [N,S,S] through the codec and back."""
    parts = [torch.from_numpy(images[i : i + batch])[:, None] for i in range(0, len(images), batch)]
    return np.concatenate([diffusion.decode_latents(components, diffusion.encode_images(components, part)) for part in parts])


def psnr_db(images: np.ndarray, decoded: np.ndarray) -> float:
    """Mean over the images of 10 log10(255^2 / mean squared error), uint8 [N,S,S] both."""
    error = (images.astype(np.float64) - decoded).reshape(len(images), -1)
    return float((20 * np.log10(255) - 10 * np.log10((error**2).mean(1))).mean())
