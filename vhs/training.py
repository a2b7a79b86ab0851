"""One supervised loop, for the classifier and for the key points, and the prediction pass that goes with it.

The loop knows nothing of files, ranks or clusters: batches, an Accelerator and a Progress come from outside. Two promises shape it. The
gradient of a step is the mean over the global batch's real samples, however they are spread over ranks and however many rows are padding (of a
network without batch norm, which looks at a rank's rows alone).
And every random number is a function of (seed, step, rank), so a run resumed in the middle of an epoch follows the curve it would have had,
to the bit on one rank.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.nn import functional as F

from vhs import checkpoint
from vhs.curve import Curve
from vhs.engine import Engine, build_engine

Batches = Callable[[int, int], Iterator[dict]]  # (epoch, start) -> this rank's batches of `epoch` from global batch number `start` on
Augment = Callable[[torch.Tensor, torch.Tensor | None, torch.Generator], tuple[torch.Tensor, torch.Tensor | None]]
Loss = Callable[[nn.Module, dict, torch.Generator], torch.Tensor]  # -> one loss a sample [b]
Validate = Callable[[nn.Module], dict[str, float]]  # -> figures, `validation_loss` among them; the same on every rank


def seed_of(*numbers: int) -> int:
    """One seed for torch out of several non-negative numbers; close numbers give unrelated seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator(*numbers: int) -> torch.Generator:
    """A CPU generator that is a function of `numbers` alone."""
    return torch.Generator().manual_seed(seed_of(*numbers))


def learning_rate_at(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first twentieth of `steps`, then a half cosine to zero (Loshchilov & Hutter 2017). `step` counts from 0."""
    warm = max(1, steps // 20)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def cross_entropy(label_smoothing: float = 0.0, class_weights: Sequence[float] | None = None) -> Loss:
    """The classifier's loss; labels are positions in measure.CLASSES.

    `class_weights` multiply each sample's loss. They are not normalised by the batch's own weights (as torch's `weight` would be): a step's
    gradient stays a mean over the global batch, however that is spread over ranks. See `balanced_weights`.
    """

    def loss(model: nn.Module, batch: dict, draw: torch.Generator) -> torch.Tensor:
        each = F.cross_entropy(model(batch["image"]), batch["label"], reduction="none", label_smoothing=label_smoothing)
        return each if class_weights is None else each * each.new_tensor(class_weights)[batch["label"]]

    return loss


def balanced_weights(counts: Sequence[int]) -> list[float]:
    """One weight a class, inverse to its `counts` of samples drawn: classes weigh the same, a sample 1 on average. Absent classes: 0."""
    present = sum(count > 0 for count in counts)
    return [sum(counts) / (present * count) if count else 0.0 for count in map(int, counts)]


def _optimizer(model: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """Decay shrinks weights that multiply, not biases and norms (as timm and big_vision do). Frozen parameters are left out."""
    matrices, rest = [], []
    for parameter in filter(lambda parameter: parameter.requires_grad, model.parameters()):
        (matrices if parameter.ndim > 1 else rest).append(parameter)
    return torch.optim.AdamW([{"params": matrices, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}], lr=learning_rate)


def _resized(images: torch.Tensor, size_px: int | None, device: torch.device) -> torch.Tensor:
    """uint8 [B, 1, S, S] -> float 0..1 on the device at the network's size. Integers travel, a quarter of the bytes."""
    images = images.to(device, non_blocking=True).float() / 255
    if size_px in (None, images.shape[-1]):
        return images
    return F.interpolate(images, size=(size_px, size_px), mode="bilinear", antialias=True, align_corners=False)


def _prepared(batch: dict, augment: Augment | None, draw: torch.Generator, device: torch.device, size_px: int | None) -> dict:
    """The batch on the device, its images at the network's size and augmented there. Points are those of the resized images already."""
    ready = {"image": _resized(batch["image"], size_px, device)}
    ready |= {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items() if name != "image"}
    if augment:
        ready["image"], points = augment(ready["image"], ready.get("points"), draw)
        if points is not None:
            ready["points"] = points
    return ready


def fit(
    model: nn.Module, loss: Loss, batches: Batches, *, steps: int, steps_per_epoch: int, learning_rate: float, weight_decay: float,
    accelerator: Accelerator, progress: checkpoint.Progress, seed: int, augment: Augment | None = None, size_px: int | None = None,
    max_grad_norm: float = 1.0, curve: Curve | None = None, validate: Validate | None = None, plateau: dict | None = None,
    keep_best: bool = False, sharding: dict | None = None,
) -> nn.Module:  # fmt: skip
    """Train `model` for `steps` optimizer steps of AdamW and return it unwrapped, in eval mode, equal on every rank.

    A batch holds image uint8 [b, 1, S, S], what `loss` needs (label int64 [b], points float32 [b, K, 2]), weight float32 [b] (0 = padding
    of a rank that ran out) and total, the number of real samples in the global batch. `augment(images, points, generator)` changes images
    and points together, after they were resized to `size_px` (None: as they come). Every rank must be given the same number of batches;
    ValueError when an epoch has fewer than `steps_per_epoch`.

    `validate` looks at the model after every epoch and after the last step. The learning rate follows a cosine (`learning_rate_at`), or
    with `plateau` (patience, factor: torch's ReduceLROnPlateau) stays until `validation_loss` stops falling; `keep_best` returns the
    weights of the epoch that had the least. `curve` takes down the figures: a global batch's mean loss, the learning rate, what `validate` says.
    `sharding`: of weights and optimizer over the ranks, as vhs/engine.py has it; RuntimeError where the accelerator has another.
    """
    curve, done = curve or Curve(steps), 0
    optimize = partial(_optimizer, learning_rate=learning_rate, weight_decay=weight_decay)
    engine = build_engine(model.train(), optimize, accelerator, sharding=sharding, max_grad_norm=max_grad_norm)
    curve.trained_by = engine.about()
    judge = _Judge(validate, engine.optimizer, plateau, keep_best)

    def capture() -> dict:
        state = engine.state_dict()
        return state and {"step": done, "curve": curve.state_dict(), "judge": copy.deepcopy(judge.state_dict()), **state}

    if state := progress.resume():
        engine.load_state_dict(state)
        curve.load_state_dict(state["curve"])
        judge.load_state_dict(state["judge"])
        done = state["step"]
    while done < steps:
        epoch, start = divmod(done, steps_per_epoch)
        wanted = min(steps_per_epoch * (epoch + 1), steps)
        for batch in itertools.islice(batches(epoch, start), wanted - done):
            if plateau is None:
                engine.learning_rate = learning_rate_at(done, steps, learning_rate)
            draw = generator(seed, done, accelerator.process_index)
            batch = _prepared(batch, augment, draw, accelerator.device, size_px)
            figures = {"learning_rate": engine.learning_rate, "loss": _step(engine, loss, batch, draw, accelerator)}
            done += 1
            if not math.isfinite(figures["loss"]):
                what = f"the loss became {figures['loss']} at step {done} of {steps}"
                raise FloatingPointError(f"{what}: lower the learning rate of {learning_rate:g}")
            curve.add(done, figures, judge(engine) if done == wanted else {})
            progress.step(done, steps, figures, capture)
        if done < wanted:
            raise ValueError(f"epoch {epoch} ended at batch {done % steps_per_epoch} of its {steps_per_epoch}: steps_per_epoch is wrong")

    model = engine.finish()
    if judge.best is not None:
        model.load_state_dict(judge.best)
    return model.eval()


def _step(engine: Engine, loss: Loss, batch: dict, draw: torch.Generator, accelerator: Accelerator) -> float:
    """One optimizer step; returns the global batch's mean loss."""
    cuda = [accelerator.device] if accelerator.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), accelerator.autocast():
        torch.manual_seed(int(torch.randint(2**62, (1,), generator=draw)))  # timm's dropout layers ask the global generator
        each = loss(engine.network, batch, draw)
        # DDP averages over ranks: its mean of (ranks x share) is the sum of the shares
        mean = (each * batch["weight"]).sum() / batch["total"] * accelerator.num_processes
    engine.backward(mean)
    engine.step()
    return float(accelerator.reduce(mean.detach(), reduction="mean"))


class _Judge:
    """What the inner validation decides after an epoch: when the learning rate falls, and whose weights are the best so far."""

    def __init__(self, validate: Validate | None, optimizer: torch.optim.Optimizer, plateau: dict | None, keep_best: bool):
        if validate is None and (plateau is not None or keep_best):
            raise ValueError("plateau and keep_best read off a validation: give `validate`")
        self._validate, self._keep_best = validate, keep_best
        self._scheduler = None if plateau is None else torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, **plateau)
        self._least, self.best = math.inf, None

    def __call__(self, engine: Engine) -> dict[str, float]:
        if self._validate is None:
            return {}
        with engine.showing() as model:
            figures = self._validate(model)
            model.train()
            if self._scheduler:
                self._scheduler.step(figures["validation_loss"])
            if self._keep_best and figures["validation_loss"] < self._least:
                self._least, self.best = figures["validation_loss"], copy.deepcopy(model.state_dict())
        return figures

    def state_dict(self) -> dict:
        return {"scheduler": self._scheduler and self._scheduler.state_dict(), "least": self._least, "best": self.best}

    def load_state_dict(self, state: dict) -> None:
        if self._scheduler:
            self._scheduler.load_state_dict(state["scheduler"])
        self._least, self.best = state["least"], state["best"]


@torch.no_grad()  # not inference_mode: what it moves to the device would be lost to training, which goes on after a validation
def predict(model: nn.Module, batches: Iterable[dict], accelerator: Accelerator, size_px: int | None = None) -> dict:
    """Class probabilities of every image on every rank: {"key": list[str] in rising order, "probability": float32 [n, classes]}.

    Each rank iterates its own batches (key list[str], image uint8 [b, 1, S, S], weight [b]); their numbers may differ. Padding (weight 0)
    is dropped. ValueError if a key comes twice: then the split over ranks is wrong, and so would be every average.
    """
    model = model.to(accelerator.device).eval()
    mine: list[tuple[str, np.ndarray]] = []
    for batch in batches:
        with accelerator.autocast():
            logits = model(_resized(batch["image"], size_px, accelerator.device))
        probability = logits.float().softmax(-1).cpu().numpy()
        mine += [(key, row) for key, row, weight in zip(batch["key"], probability, batch["weight"], strict=True) if weight > 0]
    everyone = sorted(gather_object(mine), key=lambda pair: pair[0])
    keys = [key for key, _ in everyone]
    if len(set(keys)) < len(keys):
        twice = sorted({key for key in keys if keys.count(key) > 1})
        raise ValueError(f"{len(twice)} keys were predicted more than once, e.g. {', '.join(twice[:3])}: ranks must share out the images")
    return {"key": keys, "probability": np.stack([row for _, row in everyone]) if everyone else np.zeros((0, 0), np.float32)}


def inner_validation(batches: Callable[[], Iterable[dict]], labels: Mapping[str, int], accelerator: Accelerator, size_px: int) -> Validate:
    """Mean cross-entropy and accuracy on `batches()` (see `predict`) with the true `labels` by key: what schedulers may look at.

    No augmentation, no smoothing, no class weights. Every rank gets the same figures.
    """

    def validate(model: nn.Module) -> dict[str, float]:
        found = predict(model, batches(), accelerator, size_px)
        probability, label = found["probability"], np.array([labels[key] for key in found["key"]])
        true = np.maximum(probability[np.arange(len(label)), label], np.finfo(np.float32).tiny)
        accuracy = float((probability.argmax(1) == label).mean())
        return {"validation_loss": float(-np.log(true).mean()), "validation_accuracy": accuracy}

    return validate
