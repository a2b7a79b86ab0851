"""`vhs pretrain`: trains the embedded base model into a diffusers folder. Outside the run's chain; the same command again resumes.

OUT is the model; OUT/training keeps the phantoms, one checkpoint a stage and the figures, and can be deleted afterwards. The stages `codec`
and `denoiser` do not need each other: they may run as two processes on one OUT. `adapt` and `judge` come after both.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import torch
from accelerate import Accelerator

from jobs import config, models, world
from vhs import checkpoint, diffusion, labelling, phantom, pretraining, prompts, sampling, schooling
from vhs.diffusion import Components
from vhs.measure import CLASSES, VIEWS
from vhs.settings import DreamBooth, Generation, Labeller, Pretraining
from vhs.verdict import fit_thresholds

log = logging.getLogger(__name__)
HELD_OUT = 256  # phantoms a view that no stage trains on: the figures are measured on them
DRAWN_PER_CLASS = 64
_SAVE_S = 180.0


class Saving:
    """A Progress that keeps the newest state in one file, written every few minutes and after the last step."""

    def __init__(self, file: Path) -> None:
        self.file, self.saved_s, self.recent = file, time.monotonic(), {}

    def resume(self) -> dict | None:
        return checkpoint.load(self.file) if self.file.is_file() else None

    def step(self, step: int, total: int, metrics: dict[str, float], capture) -> None:
        for name, value in metrics.items():
            self.recent.setdefault(name, []).append(value)
        if step % 100 == 0 or step == total:
            figures = " ".join(f"{name} {np.mean(values):.4f}" for name, values in self.recent.items())
            log.info("%s %d/%d %s core_s %.0f", self.file.stem, step, total, figures, time.process_time())
            self.recent = {}
        if step == total or time.monotonic() - self.saved_s > _SAVE_S:
            checkpoint.save(capture(), self.file)
            self.saved_s = time.monotonic()


def _kept(file: Path, make: Callable[[], Sequence[np.ndarray]]) -> list[np.ndarray]:
    """The arrays `make` returns, made once: a resumed command reads them back."""
    if not file.is_file():
        aside = file.with_suffix(".writing.npz")
        np.savez(aside, *make())
        aside.replace(file)
    with np.load(file) as arrays:
        return list(arrays.values())


def draw_phantoms(settings: Pretraining, out: Path, view: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N,S,S] and key points [N,K,2] of one view, drawn once and kept; the last HELD_OUT are not for training."""
    seeds = range(settings.first_phantom_seed, settings.first_phantom_seed + settings.phantoms_per_view + HELD_OUT)
    images, points = _kept(out / "training" / f"{view}.npz", lambda: _drawn(settings, view, seeds))
    return images, points


def _drawn(settings: Pretraining, view: str, seeds: range) -> tuple[np.ndarray, np.ndarray]:
    """One phantom a seed, each as sharp as the side it was drawn at leaves it."""
    sides, size = settings.phantoms_px or (settings.resolution_px,), settings.resolution_px
    parts = [phantom.draw_many(view, "textbook", seeds[k :: len(sides)], side) for k, side in enumerate(sides)]
    order = np.argsort(np.concatenate([np.arange(len(seeds))[k :: len(sides)] for k in range(len(sides))]))
    images = np.stack([labelling.resized(image, size) for drawn, _ in parts for image in drawn])
    points = np.concatenate([labelling.rescaled(points, side, size) for side, (_, points) in zip(sides, parts)])
    return images[order], points[order].astype(np.float32)


def training_set(settings: Pretraining, out: Path) -> tuple[np.ndarray, list[tuple[str, str]], pretraining.PatchBasis]:
    """Every view's training images, their (view, class), and the linear targets fitted on some hundred of them."""
    drawn = {view: draw_phantoms(settings, out, view) for view in settings.views}
    images = np.concatenate([images[:-HELD_OUT] for images, _ in drawn.values()])
    names = [name for view, (_, points) in drawn.items() for name in pretraining.class_names(points[:-HELD_OUT], view)]
    return images, names, pretraining.PatchBasis.fit(images[:: max(1, len(images) // 800)], 2 ** (len(settings.codec_channels) - 1))


def assemble(settings: Pretraining, out: Path, init: str | None) -> Components:
    """The model as far as its stages have come: fresh or `init` weights, with the averages of every checkpoint in OUT laid over them."""
    fresh = pretraining.build(settings) if init is None else diffusion.load(models.WEIGHTS / "base" if init == "packaged" else init)
    for stage, network in (("codec", fresh.vae), ("denoiser", fresh.unet), ("adapt", fresh.unet)):
        if state := Saving(out / "training" / f"{stage}.pt").resume():
            network.load_state_dict(state["average"])
    return fresh


def codec(settings: Pretraining, out: Path, init: str | None, accelerator: Accelerator) -> None:
    """Stage 1: images to latents and back."""
    components = assemble(settings, out, init).to(accelerator.device)
    images, _, basis = training_set(settings, out)
    pretraining.train_codec(components, images, basis, settings, accelerator, Saving(out / "training" / "codec.pt"))


def denoiser(settings: Pretraining, out: Path, init: str | None, accelerator: Accelerator) -> None:
    """Stage 2: the UNet on the linear targets, which are known before the codec is."""
    components = assemble(settings, out, init).to(accelerator.device)
    images, names, basis = training_set(settings, out)
    parts = np.array_split(images, max(1, len(images) // 256))
    targets = torch.cat([basis.encode(torch.from_numpy(part)[:, None] / 127.5 - 1) for part in parts])
    saving = Saving(out / "training" / "denoiser.pt")
    pretraining.train_denoiser(components, targets, names, settings, settings.steps, accelerator, saving)


def adapt(settings: Pretraining, out: Path, init: str | None, accelerator: Accelerator) -> None:
    """Stage 3: the denoiser goes on with the latents the codec really gives."""
    components = assemble(settings, out, init).to(accelerator.device)
    images, names, _ = training_set(settings, out)
    latents = _kept(out / "training" / "latents.npz", lambda: [pretraining.latents_of(components, images).numpy()])[0]
    saving = Saving(out / "training" / "adapt.pt")
    pretraining.train_denoiser(components, torch.from_numpy(latents), names, settings, settings.adapt_steps, accelerator, saving)


def labellers(settings: Pretraining, out: Path, init: str | None) -> None:
    """Stage 4: the key-point network of each view, from scratch or the one beside `init`, on the same phantoms, in full precision, into OUT/labeller/<view>."""
    choice = Labeller(init="scratch", size_px=settings.resolution_px, steps=settings.labeller_steps, learning_rate=settings.labeller_learning_rate)
    for view in settings.views if settings.labeller_steps else ():
        images, points = (part[:-HELD_OUT] for part in draw_phantoms(settings, out, view))

        def draw(step: int, images=images, points=points) -> tuple[np.ndarray, np.ndarray]:
            rows = np.random.default_rng([settings.seed, 2, step]).integers(len(images), size=choice.batch)
            return images[rows], points[rows]

        saving = Saving(out / "training" / f"labeller_{view}.pt")
        schooled = schooling.school(VIEWS[view], choice, draw, world.accelerator("auto"), saving, _labeller(view, init))
        measured = schooled.measure(images[:1000], [f"phantom-{i}" for i in range(len(images[:1000]))], choice.passes)
        replace(schooled, thresholds=fit_thresholds(measured, choice.keep_quantile)).save(out / "labeller" / view)


def judge(settings: Pretraining, out: Path, components: Components, guidances: Sequence[float] = (1.5, 2.0, 3.0)) -> dict:
    """What the base is worth, on held-out phantoms: codec PSNR, key-point error through the codec, class agreement of drawn images.

    The latter two need the packaged labeller of the view and are left out without it. Sheets of what was drawn go to OUT/training.
    """
    figures: dict = {}
    for view in settings.views:
        images, points = (part[-HELD_OUT:] for part in draw_phantoms(settings, out, view))
        decoded = pretraining.reconstruct(components, images)
        figures[view] = {"psnr_db": pretraining.psnr_db(images, decoded)}
        _sheet([images[:8], decoded[:8]], out / "training" / f"codec_{view}.png")
        labeller = _labeller(view, "packaged")
        if labeller is not None:
            index = VIEWS[view].measure(points)
            for name, pictures in (("phantoms", images), ("reconstructions", decoded)):
                measured = labeller.measure(pictures, [f"{name}{i}" for i in range(len(pictures))], passes=1)
                figures[view][f"index_error_{name}"] = float(np.abs(measured.index - index).mean())
        for guidance in guidances:
            drawn = _draw(components, view, guidance, settings.resolution_px)
            _sheet([row[:10] for row in drawn], out / "training" / f"drawn_{view}_{guidance}.png")
            figures[view][f"guidance_{guidance}"] = {} if labeller is None else _agreement(labeller, view, drawn)
    (out / "training" / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    return figures


def _sheet(rows: list[np.ndarray], file: Path) -> None:
    """Rows of uint8 images [n,S,S] as one picture, to look at."""
    file.write_bytes(cv2.imencode(".png", np.concatenate([np.concatenate(list(row), axis=1) for row in rows]))[1].tobytes())


def _labeller(view: str, init: str | None) -> labelling.Labeller | None:
    """The labeller of a view that lies beside the base `init`, or None."""
    folder = (models.WEIGHTS if init == "packaged" else Path(init or "")) / "labeller" / view
    return labelling.Labeller.load(folder) if init and folder.is_dir() else None


def _draw(components: Components, view: str, guidance: float, size_px: int) -> list[np.ndarray]:
    """DRAWN_PER_CLASS images of each class, from the class prompt and seeds 0, 1, ..."""
    settings, drawn = Generation(guidance=guidance), []
    for class_name in CLASSES:
        prompt = prompts.class_prompt(DreamBooth(), VIEWS[view], class_name)
        batches = np.arange(DRAWN_PER_CLASS).reshape(-1, settings.batch).tolist()
        drawn.append(np.concatenate([sampling.sample(components, [prompt] * len(seeds), seeds, size_px, settings) for seeds in batches]))
    return drawn


def _agreement(labeller, view: str, drawn: list[np.ndarray]) -> dict:
    index = [labeller.measure(images, [f"{i}-{j}" for j in range(len(images))], passes=1).index for i, images in enumerate(drawn)]
    agree = [float((VIEWS[view].classify(values) == i).mean()) for i, values in enumerate(index)]
    return {"class_agreement": float(np.mean(agree)), "by_class": agree, "mean_index": [float(values.mean()) for values in index]}


def pretrain(config_file: str, out: Path, init: str | None = None, overrides: Sequence[str] = ()) -> dict:
    """Trains every stage, writes the diffusers folder OUT in half precision and returns the figures.

    init: None (fresh weights), "packaged", or a diffusers folder (or its hub id) of the same architecture. Raises ConfigError for any other, and when OUT
    was begun otherwise.
    """
    settings = config.read(str(config_file), list(overrides), Pretraining)
    if init not in (None, "packaged"):
        models.check_diffusers("--init", init)
    out = Path(out)
    (out / "training").mkdir(parents=True, exist_ok=True)
    begun, mine = out / "training" / "settings.json", {"init": init, **settings.model_dump(mode="json")}
    theirs = json.loads(begun.read_text()) if begun.is_file() else mine
    if keys := config.changed(theirs, mine):
        raise config.ConfigError(f"{out} was begun with other values of {', '.join(keys)}: resume with the same, or take another --out")
    begun.write_text(json.dumps(mine, indent=2) + "\n")
    torch.set_num_threads(1)
    accelerator = Accelerator(mixed_precision=settings.mixed_precision)
    for stage in (codec, denoiser, adapt):
        stage(settings, out, init, accelerator)
    labellers(settings, out, init)
    diffusion.save(assemble(settings, out, init), out)
    return judge(settings, out, diffusion.load(out, accelerator.device))  # what was written, in its half precision
