"""The parts of a Stable Diffusion model as one value: load and save, images to latents and back, prompts to embeddings, the denoising loss.

Works for any SD 1.x or 2.x folder or hub name and for the small base that ships with the package; nothing here assumes a size. Grey images
travel as uint8 and meet the codec as three equal channels.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers import __version__ as diffusers_version
from transformers import CLIPTextModel, CLIPTokenizer

from vhs.supported import unsupported

_PARTS = {
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDPMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
_PIXELS_AT_ONCE = 2**20  # through the codec: 64 images of 128 px, 4 of 512 px, which need more memory each than the UNet does
_ORIGIN = ("_name_or_path", "name_or_path", "is_local", "local_files_only")
_LAST_CALL = ("max_length", "pad_to_multiple_of", "pad_token_type_id", "padding_side", "stride", "truncation_side", "truncation_strategy")


@dataclass(frozen=True)
class Components:
    """A Stable Diffusion model. `scheduler` holds the noise levels and says what the UNet predicts; sampling builds its solver from it."""

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    scheduler: DDPMScheduler

    @property
    def factor(self) -> int:
        """Pixels of the image side a latent stands for (8 in every published SD)."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def networks(self) -> dict[str, torch.nn.Module]:
        """What holds weights, by its folder's name."""
        return {"text_encoder": self.text_encoder, "unet": self.unet, "vae": self.vae}

    def to(self, device: torch.device | str) -> Components:
        """Moves the networks (in place) and returns self."""
        for module in self.networks.values():
            module.to(device)
        return self


def load(model: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Components:
    """Opens a diffusers folder, or id@commit from the hub, with its networks in eval mode.

    Raises FileNotFoundError for a local folder that is not a diffusers model, and for a name that is no folder and cannot be had from the hub;
    ValueError for a model of another kind (vhs/supported.py), before its weights are asked for.
    """
    where, _, commit = (str(model), "", None) if Path(model).is_dir() else str(model).partition("@")
    if Path(where).is_dir() and not (Path(where) / "model_index.json").is_file():
        raise FileNotFoundError(f"{model} is no diffusers model: it has no model_index.json beside unet/, vae/, tokenizer/")
    kinds = {
        "tokenizer": CLIPTokenizer,
        "text_encoder": CLIPTextModel,
        "unet": UNet2DConditionModel,
        "vae": AutoencoderKL,
        "scheduler": DDPMScheduler,
    }
    try:
        # of a hub the UNet and the scheduler tell enough; the index may not be among what a machine without a network has kept
        index = json.loads((Path(where) / "model_index.json").read_text()) if Path(where).is_dir() else {}
        unet, scheduler = (kinds[part].load_config(where, subfolder=part, revision=commit) for part in ("unet", "scheduler"))
        if why := unsupported(index, unet, scheduler):
            raise ValueError(f"{model} cannot be used: {why}")
        parts = Components(**{name: kind.from_pretrained(where, subfolder=name, revision=commit) for name, kind in kinds.items()})
    except OSError as error:
        if Path(where).is_dir():
            raise
        raise FileNotFoundError(
            f"{model} is no folder here and cannot be had from the hub ({str(error).splitlines()[0]}). Where there is a network, "
            "`vhs fetch CONFIG --to DIR` downloads it; then set base=DIR/base"
        ) from error
    for module in parts.networks.values():
        torch.nn.Module.to(module, device, dtype).eval()  # torch's own `to`: diffusers' warns of modules to keep in float32 and lists none
    return parts


def save(components: Components, folder: str | Path, dtype: torch.dtype = torch.float16) -> None:
    """Writes a folder that `StableDiffusionPipeline.from_pretrained` opens; the same weights give the same bytes wherever they came from.

    Half precision halves a generator's folder. Images are always sampled from such a folder, so what is recorded can be drawn again.
    """
    folder = Path(folder)
    for name, module in components.networks.items():
        torch.nn.Module.to(copy.deepcopy(module), "cpu", dtype).save_pretrained(folder / name, safe_serialization=True)
        _forget_origin(folder / name / "config.json")
    _open_in_float32(folder / "text_encoder" / "config.json")
    components.tokenizer.save_pretrained(folder / "tokenizer")
    _forget_origin(folder / "tokenizer" / "tokenizer_config.json")
    components.scheduler.save_pretrained(folder / "scheduler")
    index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": diffusers_version, **_PARTS, "requires_safety_checker": False}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def _forget_origin(config_file: Path) -> None:
    """The libraries note where a part came from and how it was last called: a path of one machine, and equal weights in unequal bytes."""
    config = json.loads(config_file.read_text())
    for key in (*_ORIGIN, *_LAST_CALL):
        config.pop(key, None)
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _open_in_float32(config_file: Path) -> None:
    """transformers opens a model in the precision its config names, diffusers in float32: a plain `from_pretrained` would mix the two."""
    config = json.loads(config_file.read_text())
    config_file.write_text(json.dumps({**config, "dtype": "float32"}, indent=2, sort_keys=True) + "\n")


def as_input(images: torch.Tensor, like: torch.nn.Module) -> torch.Tensor:
    """uint8 [N,1,S,S] -> [N,3,S,S] in -1..1 on the device and in the dtype of `like`."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 1:
        raise ValueError(f"the codec takes uint8 images [N,1,S,S], got {images.dtype} {tuple(images.shape)}")
    return (images.to(like.device, torch.float32) / 127.5 - 1).to(like.dtype).expand(-1, 3, -1, -1)


def _at_once(side_px: int) -> int:
    return max(1, _PIXELS_AT_ONCE // side_px**2)


@torch.no_grad()
def encode_images(components: Components, images: torch.Tensor) -> torch.Tensor:
    """uint8 [N,1,S,S] -> latents float32 [N,C,S/f,S/f], the posterior's mean scaled to the UNet's range. S must be a multiple of f."""
    if images.shape[-1] % components.factor or images.shape[-2] % components.factor:
        raise ValueError(f"images of {tuple(images.shape[-2:])} px do not fit this codec: sides must be multiples of {components.factor}")
    vae = components.vae
    parts = images.split(_at_once(images.shape[-1]))
    return torch.cat([vae.encode(as_input(part, vae)).latent_dist.mode().float() for part in parts]) * vae.config.scaling_factor


@torch.no_grad()
def decode_latents(components: Components, latents: torch.Tensor) -> np.ndarray:
    """Latents [N,C,h,w] -> uint8 [N,S,S], the mean of the decoder's three channels, rounded."""
    vae = components.vae
    parts = (latents.to(vae.dtype) / vae.config.scaling_factor).split(_at_once(latents.shape[-1] * components.factor))
    grey = torch.cat([vae.decode(part).sample.float().mean(1) for part in parts])
    if not torch.isfinite(grey).all():
        raise FloatingPointError("the codec decoded NaN or infinity (some VAEs overflow in half precision): load it in float32 or bfloat16")
    return ((grey + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu().numpy()


def tokenize(components: Components, prompts: list[str]) -> torch.Tensor:
    """Prompts -> token ids [N,L], padded to the model's length; words beyond it are cut as Stable Diffusion does."""
    tokenizer = components.tokenizer
    return tokenizer(prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt").input_ids


def embed(components: Components, prompts: list[str]) -> torch.Tensor:
    """Prompts -> embeddings [N,L,D] for cross attention, with gradients where the text encoder has them."""
    parameter = next(components.text_encoder.parameters())
    return components.text_encoder(tokenize(components, prompts).to(parameter.device))[0]


def _snr_weight(scheduler: DDPMScheduler, snr: torch.Tensor, gamma: float | None) -> torch.Tensor:
    """Min-SNR-gamma (Hang et al. 2023, section 3.4) for this scheduler's prediction type; 1 without a gamma."""
    if gamma is None:
        return torch.ones_like(snr)
    return snr.clamp(max=gamma) / (snr if scheduler.config.prediction_type == "epsilon" else snr + 1)


def denoising_loss(
    components: Components, latents: torch.Tensor, embeddings: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor,
    min_snr_gamma: float | None = None,
) -> torch.Tensor:  # fmt: skip
    """Loss of each sample [N]: squared error of the UNet's prediction, averaged over the latent, weighted by min-SNR if a gamma is given.

    latents, noise: [N,C,h,w]; embeddings: [N,L,D]; timesteps: int64 [N]. What the UNet predicts is what the scheduler's config says.
    Raises ValueError for a prediction type other than epsilon and v_prediction.
    """
    scheduler = components.scheduler
    noisy = scheduler.add_noise(latents, noise, timesteps)
    match scheduler.config.prediction_type:
        case "epsilon":
            target = noise
        case "v_prediction":
            target = scheduler.get_velocity(latents, noise, timesteps)
        case other:
            raise ValueError(f"cannot train a model that predicts {other!r}: epsilon (SD 1.x) and v_prediction (SD 2.x) are supported")
    prediction = components.unet(noisy, timesteps, embeddings).sample
    signal = scheduler.alphas_cumprod.to(latents.device)[timesteps]
    weight = _snr_weight(scheduler, signal / (1 - signal), min_snr_gamma)
    return weight * ((prediction.float() - target.float()) ** 2).mean((1, 2, 3))
