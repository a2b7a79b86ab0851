"""DreamBooth: teaches a base model what this run's radiographs look like without letting it forget what a heart of each size is.

Ruiz et al. 2023, section 3.2: each step sees instance images (a rare token in their prompt) and class images that the base drew itself, and
minimises instance loss + prior_loss_weight x prior loss, each a mean of its own. The loop is for any Stable Diffusion 1.x or 2.x, on one
rank or many; what is random in a batch is a function of (seed, its number, rank), so a resumed run follows the same path. What is trained,
and how its weights move, is vhs/trainable.py's.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import numpy as np
import torch
from accelerate import Accelerator

from vhs import diffusion
from vhs.checkpoint import Progress
from vhs.curve import Curve
from vhs.diffusion import Components
from vhs.settings import DreamBooth
from vhs.trainable import Trainable
from vhs.training import Batches, generator

Priors = tuple[np.ndarray, list[str]]  # class images uint8 [n,S,S] drawn by the base, and the prompts they were drawn from
Show = Callable[[int, Components], None]  # (step, the model as it would leave now): looks, keeps nothing


def learning_rate_at(step: int, settings: DreamBooth) -> float:
    """The rate of optimizer step `step` (0-based): linear warm-up, then constant, or a cosine that reaches zero after the last step."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.learning_rate
    share = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


def train(
    components: Components, batches: Batches, priors: Priors, settings: DreamBooth, batches_per_epoch: int, accelerator: Accelerator,
    progress: Progress, show: Show | None = None, show_steps: int = 0,
) -> Curve:  # fmt: skip
    """Fine-tunes the UNet, and the text encoder if settings.train_text_encoder, in place; leaves `components` frozen, in eval mode.

    batches(epoch, start): dicts from global batch `start` of that epoch on, {"image": uint8 [b,1,S,S], "key": [b], "prompt": [b], "weight":
    float [b] (0 = padding), "total": real samples in the global batch}. The gradient is that of the global batch on any number of ranks,
    averaged over the settings.gradient_accumulation batches of a step. Weights must be float32; mixed precision is the accelerator's.
    `show` is called on the main rank every `show_steps` steps (0: never) and changes nothing.
    Raises ValueError for half-precision weights, missing class images and an epoch shorter than batches_per_epoch, FloatingPointError when
    the loss is no longer a number.
    """
    _check(components, priors, settings)
    trainable, curve, done = Trainable(components, settings, accelerator), Curve(settings.steps), 0
    curve.trained_by = trainable.engine.about()

    def capture() -> dict:
        state = trainable.state_dict()
        return state and {"step": done, "curve": curve.state_dict(), **state}

    if state := progress.resume():
        trainable.load_state_dict(state)
        curve.load_state_dict(state["curve"])
        done = state["step"]
    losses_of = _Losses(trainable.components, priors, settings, accelerator, trainable.engine.network)
    stream = _endless(batches, done * settings.gradient_accumulation, batches_per_epoch)
    while done < settings.steps:
        losses = _gradients(losses_of, stream, done, trainable, settings)
        figures = _figures(losses, done, settings, accelerator)
        trainable.step(figures["learning_rate"])
        done += 1
        curve.add(done, figures)
        progress.step(done, settings.steps, figures, capture)
        if show and show_steps and done % show_steps == 0:
            with trainable.as_they_would_leave() as model:  # every rank puts its share in
                if accelerator.is_main_process:
                    show(done, model)
    trainable.finish()
    return curve


def _check(components: Components, priors: Priors, settings: DreamBooth) -> None:
    images, texts = priors
    if len(images) != len(texts):
        raise ValueError(f"each class image has its prompt, got {len(images)} images and {len(texts)} prompts")
    if settings.prior_loss_weight and not len(images):
        raise ValueError("no class images for prior preservation: draw some (priors.images) or set dreambooth.prior_loss_weight to 0")
    if components.unet.dtype != torch.float32:
        raise ValueError(f"DreamBooth trains float32 weights, the UNet holds {components.unet.dtype}: load it with dtype=torch.float32")


def _endless(batches: Batches, start: int, batches_per_epoch: int) -> Iterator[dict]:
    """Batch number `start` and all after it, epoch upon epoch."""
    for epoch in itertools.count(start // batches_per_epoch):
        first = start % batches_per_epoch if epoch == start // batches_per_epoch else 0
        count = 0
        for batch in itertools.islice(batches(epoch, first), batches_per_epoch - first):
            yield batch
            count += 1
        if count < batches_per_epoch - first:
            raise ValueError(f"epoch {epoch} ended at batch {first + count} of {batches_per_epoch}: batches_per_epoch is wrong")


def _gradients(losses_of: _Losses, stream: Iterator[dict], step: int, trainable: Trainable, settings: DreamBooth) -> torch.Tensor:
    """Leaves the gradients of a step in the networks -> its [instance loss, prior loss] on this rank, means over the step's batches."""
    parts = settings.gradient_accumulation
    losses = []
    for part in range(parts):
        with nullcontext() if part == parts - 1 else trainable.engine.accumulating():
            instance, prior = losses_of(next(stream), step * parts + part)
            trainable.engine.backward((instance + settings.prior_loss_weight * prior) / parts)
        losses.append(torch.stack((instance, prior)).detach())
    return torch.stack(losses).mean(0)


def _figures(losses: torch.Tensor, step: int, settings: DreamBooth, accelerator: Accelerator) -> dict[str, float]:
    """Both losses over all ranks, and the rate. FloatingPointError if they are no numbers: every rank sees it and stops."""
    instance, prior = accelerator.reduce(losses, "mean").tolist()
    if not math.isfinite(instance + prior):
        raise FloatingPointError(
            f"DreamBooth's loss is no longer a number at step {step} (instance {instance}, prior {prior}): lower learning_rate "
            f"({settings.learning_rate:g}), or take bf16 or no mixed precision"
        )
    return {"instance_loss": instance, "prior_loss": prior, "learning_rate": learning_rate_at(step, settings)}


class _Losses:
    """A batch's (instance loss, prior loss) on this rank, scaled so that the average over the ranks is the mean over the global batch.

    `forward(compute)` is to return `compute()`, the loss of each sample.
    """

    def __init__(
        self, components: Components, priors: Priors, settings: DreamBooth, accelerator: Accelerator,
        forward: Callable[[Callable[[], torch.Tensor]], torch.Tensor],
    ) -> None:  # fmt: skip
        self.components, self.settings, self.accelerator, self.forward = components, settings, accelerator, forward
        self.embeddings: dict[str, torch.Tensor] = {}
        self.latents: dict[str, torch.Tensor] = {}
        images, self.prior_texts = priors
        self.prior_count = math.ceil(settings.batch / accelerator.num_processes) if settings.prior_loss_weight else 0
        self.prior_latents = diffusion.encode_images(components, torch.from_numpy(images)[:, None]) if self.prior_count else None

    def __call__(self, batch: dict, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`number`: how many batches this run has seen before, which with the seed and the rank decides all that is random."""
        stream, device = generator(self.settings.seed, number, self.accelerator.process_index), self.accelerator.device
        latents = torch.cat([self._encode(key, image) for key, image in zip(batch["key"], batch["image"], strict=True)])
        dropped = torch.rand(len(latents), generator=stream) < self.settings.prompt_dropout
        texts = ["" if drop else text for text, drop in zip(batch["prompt"], dropped.tolist(), strict=True)]
        if self.prior_count:
            chosen = torch.randint(len(self.prior_latents), (self.prior_count,), generator=stream)
            latents = torch.cat([latents, self.prior_latents[chosen.to(device)]])
            texts += [self.prior_texts[i] for i in chosen.tolist()]
        noise = torch.randn(latents.shape, generator=stream).to(device)
        timesteps = torch.randint(self.components.scheduler.config.num_train_timesteps, (len(latents),), generator=stream).to(device)
        embeddings = None if self.settings.train_text_encoder else self._remembered(texts)

        def each_loss() -> torch.Tensor:
            context = diffusion.embed(self.components, texts) if embeddings is None else embeddings
            return diffusion.denoising_loss(self.components, latents, context, noise, timesteps, self.settings.min_snr_gamma)

        each = self.forward(each_loss)
        instance, prior = each[: len(batch["prompt"])], each[len(batch["prompt"]) :]
        scale = self.accelerator.num_processes / batch["total"]
        return (instance * batch["weight"].to(device)).sum() * scale, prior.mean() if self.prior_count else each.new_zeros(())

    def _encode(self, key: str, image: torch.Tensor) -> torch.Tensor:
        """The image of `key` alone through the codec: beside others its latent would be rounded otherwise, and a cache would show."""
        if not self.settings.cache_latents:
            return diffusion.encode_images(self.components, image[None])
        if key not in self.latents:
            self.latents[key] = diffusion.encode_images(self.components, image[None])
        return self.latents[key]

    def _remembered(self, texts: list[str]) -> torch.Tensor:
        """A frozen text encoder says the same every time: each distinct prompt is embedded once."""
        if new := [text for text in dict.fromkeys(texts) if text not in self.embeddings]:
            with torch.no_grad():
                self.embeddings.update(zip(new, diffusion.embed(self.components, new), strict=True))
        return torch.stack([self.embeddings[text] for text in texts])
