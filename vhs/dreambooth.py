"""DreamBooth: teaches a base model what this run's radiographs look like without letting it forget what a heart of each size is.

Ruiz et al. 2023, section 3.2: each step sees instance images (a rare token in their prompt) and class images that the base drew itself, and
minimises instance loss + prior_loss_weight x prior loss, each a mean of its own. The loop is for any Stable Diffusion 1.x or 2.x, on one
rank or many; what is random in a step is a function of (seed, step, rank), so a resumed run follows the same path.
"""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import replace

import numpy as np
import torch
from accelerate import Accelerator

from vhs import diffusion
from vhs.checkpoint import Progress
from vhs.diffusion import Components
from vhs.settings import DreamBooth
from vhs.training import Batches, generator

_ENCODE_AT_ONCE = 8  # class images a pass through the codec, which needs more memory than the UNet


def learning_rate_at(step: int, settings: DreamBooth) -> float:
    """The rate of optimizer step `step` (0-based): linear warm-up, then constant, or a cosine that reaches zero after the last step."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.learning_rate
    share = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


class _Prompts:
    """Embeds prompts. A frozen text encoder says the same every time, so each distinct prompt is embedded once."""

    def __init__(self, components: Components, frozen: bool) -> None:
        self.components, self.frozen, self.known = components, frozen, {}

    def __call__(self, texts: list[str]) -> torch.Tensor:
        if not self.frozen:
            return diffusion.embed(self.components, texts)
        new = [text for text in dict.fromkeys(texts) if text not in self.known]
        if new:
            with torch.no_grad():
                self.known.update(zip(new, diffusion.embed(self.components, new), strict=True))
        return torch.stack([self.known[text] for text in texts])


def _encode_priors(components: Components, images: np.ndarray) -> torch.Tensor:
    parts = [torch.from_numpy(images[i : i + _ENCODE_AT_ONCE])[:, None] for i in range(0, len(images), _ENCODE_AT_ONCE)]
    return torch.cat([diffusion.encode_images(components, part).float() for part in parts])


def train(components: Components, batches: Batches, priors: tuple[np.ndarray, list[str]], settings: DreamBooth, steps_per_epoch: int,
          accelerator: Accelerator, progress: Progress) -> Components:
    """Fine-tunes the UNet (and the text encoder, if settings.train_text_encoder) and returns the components with the new weights.

    batches(epoch, start): dicts from global batch `start` of that epoch on, {"image": uint8 [b,1,S,S], "prompt": [b], "weight": float [b]
    (0 = padding), "total": real samples in the global batch}. priors: uint8 [n,S,S] drawn by the base, and the prompts they were drawn from.
    The gradient is that of the whole global batch on any number of ranks. `components` must hold float32 weights (mixed precision is the
    accelerator's); they change in place. Raises ValueError for missing priors, FloatingPointError when the loss is no longer a number.
    """
    _check(components, priors, settings)
    components.to(accelerator.device)
    trained = {"unet": components.unet, **({"text_encoder": components.text_encoder} if settings.train_text_encoder else {})}
    for name in ("unet", "text_encoder", "vae"):
        getattr(components, name).requires_grad_(name in trained).train(name in trained)
    parameters = [parameter for module in trained.values() for parameter in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    state = progress.resume()
    for name, module in trained.items() if state else ():
        module.load_state_dict(state[name])
    *modules, optimizer = accelerator.prepare(*trained.values(), optimizer)
    wrapped = replace(components, **dict(zip(trained, modules, strict=True)))
    if state:
        optimizer.load_state_dict(state["optimizer"])
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(state["scaler"])
    step_loss = _StepLoss(wrapped, priors, settings, accelerator)
    done = state["step"] if state else 0

    def capture() -> dict:
        scaler = {} if accelerator.scaler is None else accelerator.scaler.state_dict()
        weights = {name: module.state_dict() for name, module in trained.items()}
        return copy.deepcopy({"step": done, "optimizer": optimizer.state_dict(), "scaler": scaler, **weights})

    while done < settings.steps:
        epoch, start = divmod(done, steps_per_epoch)
        wanted = min(steps_per_epoch * (epoch + 1), settings.steps)
        for batch in itertools.islice(batches(epoch, start), wanted - done):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(done, settings)
            instance, prior = step_loss(batch, done)
            loss = instance + settings.prior_loss_weight * prior
            figures = dict(zip(("instance_loss", "prior_loss"), accelerator.reduce(torch.stack([instance, prior]).detach(), "mean").tolist(), strict=True))
            if not math.isfinite(sum(figures.values())):
                raise FloatingPointError(f"DreamBooth's loss is no longer a number at step {done} ({figures}): lower learning_rate ({settings.learning_rate}) "
                                         f"or use bf16 instead of {settings.mixed_precision}")
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(parameters, settings.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            done += 1
            progress.step(done, settings.steps, {**figures, "learning_rate": learning_rate_at(done - 1, settings)}, capture)
        if done < wanted:
            raise ValueError(f"epoch {epoch} ended at batch {done % steps_per_epoch} of {steps_per_epoch}: `batches` and steps_per_epoch disagree")
    for module in modules:
        accelerator.unwrap_model(module, keep_fp32_wrapper=False)  # else mixed precision's autocast stays on the networks that leave here
    for name in ("unet", "text_encoder", "vae"):
        getattr(components, name).requires_grad_(False).eval()
    return components


def _check(components: Components, priors: tuple[np.ndarray, list[str]], settings: DreamBooth) -> None:
    images, texts = priors
    if len(images) != len(texts):
        raise ValueError(f"each class image has its prompt, got {len(images)} images and {len(texts)} prompts")
    if settings.prior_loss_weight and not len(images):
        raise ValueError("no class images for prior preservation: draw some (priors.images) or set dreambooth.prior_loss_weight to 0")
    if components.unet.dtype != torch.float32:
        raise ValueError(f"DreamBooth trains float32 weights, the UNet holds {components.unet.dtype}: load it with dtype=torch.float32")


class _StepLoss:
    """One step's (instance loss, prior loss) on this rank, scaled so that DDP's average over the ranks is the global mean."""

    def __init__(self, components: Components, priors: tuple[np.ndarray, list[str]], settings: DreamBooth, accelerator: Accelerator) -> None:
        self.components, self.settings, self.accelerator = components, settings, accelerator
        self.embed = _Prompts(components, frozen=not settings.train_text_encoder)
        self.prior_texts = priors[1]
        self.use_priors = settings.prior_loss_weight > 0
        self.priors = _encode_priors(components, priors[0]) if self.use_priors else None
        self.priors_per_rank = math.ceil(settings.batch / accelerator.num_processes)

    def __call__(self, batch: dict, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        stream = generator(self.settings.seed, step, self.accelerator.process_index)
        device = self.accelerator.device
        latents = diffusion.encode_images(self.components, batch["image"]).float()
        dropped = torch.rand(len(latents), generator=stream) < self.settings.prompt_dropout
        texts = ["" if drop else text for text, drop in zip(batch["prompt"], dropped.tolist(), strict=True)]
        if self.use_priors:
            chosen = torch.randint(len(self.priors), (self.priors_per_rank,), generator=stream)
            latents = torch.cat([latents, self.priors[chosen.to(device)]])
            texts += [self.prior_texts[i] for i in chosen.tolist()]
        noise = torch.randn(latents.shape, generator=stream).to(device)
        timesteps = torch.randint(self.components.scheduler.config.num_train_timesteps, (len(latents),), generator=stream).to(device)
        each = diffusion.denoising_loss(self.components, latents, self.embed(texts), noise, timesteps, self.settings.min_snr_gamma)
        instances = len(batch["prompt"])
        scale = self.accelerator.num_processes / batch["total"]
        instance = (each[:instances] * batch["weight"].to(device)).sum() * scale
        return instance, each[instances:].mean() if self.use_priors else instance.new_zeros(())
