"""DreamBooth: teaches a base model what this run's radiographs look like without letting it forget what a heart of each size is.

Ruiz et al. 2023, section 3.2: each step sees instance images (a rare token in their prompt) and class images that the base drew itself, and
minimises instance loss + prior_loss_weight x prior loss, each a mean of its own. The loop is for any Stable Diffusion 1.x or 2.x, on one
rank or many; what is random in a step is a function of (seed, step, rank), so a resumed run follows the same path.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import recursively_apply

from vhs import diffusion
from vhs.checkpoint import Progress
from vhs.diffusion import Components
from vhs.settings import DreamBooth
from vhs.training import Batches, generator

Priors = tuple[np.ndarray, list[str]]  # class images uint8 [n,S,S] drawn by the base, and the prompts they were drawn from
_ENCODE_AT_ONCE = 8  # class images a pass through the codec, which at 512 px needs more memory an image than the UNet


def learning_rate_at(step: int, settings: DreamBooth) -> float:
    """The rate of optimizer step `step` (0-based): linear warm-up, then constant, or a cosine that reaches zero after the last step."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.learning_rate
    share = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


def train(
    components: Components, batches: Batches, priors: Priors, settings: DreamBooth, steps_per_epoch: int, accelerator: Accelerator,
    progress: Progress,
) -> Components:  # fmt: skip
    """Fine-tunes the UNet, and the text encoder if settings.train_text_encoder, in place; returns `components`, frozen, in eval mode.

    batches(epoch, start): dicts from global batch `start` of that epoch on, {"image": uint8 [b,1,S,S], "prompt": [b], "weight": float [b]
    (0 = padding), "total": real samples in the global batch}. The gradient is that of the global batch on any number of ranks.
    Weights must be float32; mixed precision is the accelerator's. Raises ValueError for half-precision weights, missing class images and an
    epoch shorter than steps_per_epoch, FloatingPointError when the loss is no longer a number.
    """
    _check(components, priors, settings)
    components.to(accelerator.device)
    trained = {name: getattr(components, name) for name in ("unet", "text_encoder")[: 1 + settings.train_text_encoder]}
    for name, module in components.networks.items():
        module.requires_grad_(name in trained).train(name in trained)
    parameters = [parameter for module in trained.values() for parameter in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    *modules, optimizer = accelerator.prepare(*trained.values(), optimizer)
    done = _restore(trained, optimizer, accelerator, progress.resume())
    step_losses = _StepLosses(replace(components, **dict(zip(trained, modules, strict=True))), priors, settings, accelerator)

    def capture() -> dict:
        scaler = {"scaler": accelerator.scaler} if accelerator.scaler else {}
        parts = trained | {"optimizer": optimizer} | scaler
        state = {"step": done} | {name: part.state_dict() for name, part in parts.items()}
        return recursively_apply(
            lambda tensor: tensor.detach().to("cpu", copy=True), state
        )  # a second set of Adam moments has no room on the GPU

    while done < settings.steps:
        epoch, start = divmod(done, steps_per_epoch)
        wanted = min(steps_per_epoch * (epoch + 1), settings.steps)
        for batch in itertools.islice(batches(epoch, start), wanted - done):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(done, settings)
            losses = step_losses(batch, done)
            figures = _figures(losses, done, settings, accelerator)
            accelerator.backward(losses[0] + settings.prior_loss_weight * losses[1])
            accelerator.clip_grad_norm_(parameters, settings.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            done += 1
            progress.step(done, settings.steps, figures, capture)
        if done < wanted:
            raise ValueError(f"epoch {epoch} ended at batch {done % steps_per_epoch} of {steps_per_epoch}: steps_per_epoch is wrong")
    for module in modules:
        accelerator.unwrap_model(module, keep_fp32_wrapper=False)  # else mixed precision's autocast stays on the networks that leave here
    for module in components.networks.values():
        module.requires_grad_(False).eval()
    return components


def _check(components: Components, priors: Priors, settings: DreamBooth) -> None:
    images, texts = priors
    if len(images) != len(texts):
        raise ValueError(f"each class image has its prompt, got {len(images)} images and {len(texts)} prompts")
    if settings.prior_loss_weight and not len(images):
        raise ValueError("no class images for prior preservation: draw some (priors.images) or set dreambooth.prior_loss_weight to 0")
    if components.unet.dtype != torch.float32:
        raise ValueError(f"DreamBooth trains float32 weights, the UNet holds {components.unet.dtype}: load it with dtype=torch.float32")


def _restore(trained: dict[str, torch.nn.Module], optimizer, accelerator: Accelerator, state: dict | None) -> int:
    """Lays a captured state over networks and optimizer, both on their device already; returns the steps done."""
    if state is None:
        return 0
    parts = trained | {"optimizer": optimizer} | ({"scaler": accelerator.scaler} if accelerator.scaler else {})
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return state["step"]


def _figures(losses: tuple[torch.Tensor, torch.Tensor], step: int, settings: DreamBooth, accelerator: Accelerator) -> dict[str, float]:
    """Both losses over all ranks, and the rate. FloatingPointError if they are no numbers: every rank sees it and stops."""
    instance, prior = accelerator.reduce(torch.stack(losses).detach(), "mean").tolist()
    if not math.isfinite(instance + prior):
        raise FloatingPointError(
            f"DreamBooth's loss is no longer a number at step {step} (instance {instance}, prior {prior}): lower learning_rate "
            f"({settings.learning_rate:g}), or take bf16 or no mixed precision"
        )
    return {"instance_loss": instance, "prior_loss": prior, "learning_rate": learning_rate_at(step, settings)}


class _StepLosses:
    """A step's (instance loss, prior loss) on this rank, scaled so that DDP's average over the ranks is the mean over the global batch."""

    def __init__(self, components: Components, priors: Priors, settings: DreamBooth, accelerator: Accelerator) -> None:
        self.components, self.settings, self.accelerator = components, settings, accelerator
        self.embeddings: dict[str, torch.Tensor] = {}
        images, self.prior_texts = priors
        self.prior_count = math.ceil(settings.batch / accelerator.num_processes) if settings.prior_loss_weight else 0
        parts = [torch.from_numpy(images[i : i + _ENCODE_AT_ONCE])[:, None] for i in range(0, len(images), _ENCODE_AT_ONCE)]
        self.prior_latents = torch.cat([diffusion.encode_images(components, part).float() for part in parts]) if self.prior_count else None

    def __call__(self, batch: dict, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        stream, device = generator(self.settings.seed, step, self.accelerator.process_index), self.accelerator.device
        latents = diffusion.encode_images(self.components, batch["image"]).float()
        dropped = torch.rand(len(latents), generator=stream) < self.settings.prompt_dropout
        texts = ["" if drop else text for text, drop in zip(batch["prompt"], dropped.tolist(), strict=True)]
        if self.prior_count:
            chosen = torch.randint(len(self.prior_latents), (self.prior_count,), generator=stream)
            latents = torch.cat([latents, self.prior_latents[chosen.to(device)]])
            texts += [self.prior_texts[i] for i in chosen.tolist()]
        noise = torch.randn(latents.shape, generator=stream).to(device)
        timesteps = torch.randint(self.components.scheduler.config.num_train_timesteps, (len(latents),), generator=stream).to(device)
        each = diffusion.denoising_loss(self.components, latents, self._embed(texts), noise, timesteps, self.settings.min_snr_gamma)
        instance, prior = each[: len(batch["prompt"])], each[len(batch["prompt"]) :]
        scale = self.accelerator.num_processes / batch["total"]
        return (instance * batch["weight"].to(device)).sum() * scale, prior.mean() if self.prior_count else each.new_zeros(())

    def _embed(self, texts: list[str]) -> torch.Tensor:
        """A frozen text encoder says the same every time: each distinct prompt is embedded once."""
        if self.settings.train_text_encoder:
            return diffusion.embed(self.components, texts)
        if new := [text for text in dict.fromkeys(texts) if text not in self.embeddings]:
            with torch.no_grad():
                self.embeddings.update(zip(new, diffusion.embed(self.components, new), strict=True))
        return torch.stack([self.embeddings[text] for text in texts])
