"""`vhs bench generate|write`: this project's two hot paths beside the libraries it could have used, in one run on one machine.

Every contender does the same work; repeats alternate, so that a busy machine slows all alike; figures are medians, and the ratios are what to read.
"""

from __future__ import annotations

import io
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Row:
    """One contender. `rate`: images a core-second on a CPU, images a second on a GPU; `ratio` to the first row; None where it could not run."""

    name: str
    rate: float | None
    ratio: float | None
    bytes_per_image: int | None = None
    note: str = ""


@dataclass(frozen=True)
class Result:
    """All contenders; `unit` of the rates, `device`, and what was asked of each."""

    what: str
    unit: str
    device: str
    images: int
    repeats: int
    rows: list[Row]

    def as_dict(self) -> dict:
        return asdict(self)


def _race(contenders: dict[str, Callable[[], object]], images: int, repeats: int, clock: Callable[[], float]) -> dict[str, float]:
    """Median rate of each, the contenders taking turns; a first, uncounted turn warms up."""
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeats + 1):
        for name, work in contenders.items():
            began = clock()
            work()
            if turn:
                taken[name].append(clock() - began)
    return {name: images / max(statistics.median(times), 1e-9) for name, times in taken.items()}


def _rows(rates: dict[str, float], sizes: dict[str, int] | None = None) -> list[Row]:
    first = next(iter(rates.values()))
    return [Row(name, rate, rate / first, (sizes or {}).get(name)) for name, rate in rates.items()]


# --- write ---------------------------------------------------------------------------------------------------------------------------
def write(images: int = 96, repeats: int = 5, size_px: int = 512, view: str = "canine_lateral") -> Result:
    """Our encoder and shard writer beside webdataset's ShardWriter, on the same grey phantoms, one core."""
    from jobs import world
    from vhs.phantom import draw_many

    pictures, _ = draw_many(view, "clinic", range(min(images, 8)), size_px)
    pictures = [pictures[i % len(pictures)] for i in range(images)]
    with tempfile.TemporaryDirectory() as scratch:
        files = {"vhs: encode_png, write_tar": Path(scratch) / "vhs.tar"}
        contenders = {"vhs: encode_png, write_tar": lambda: _write_ours(pictures, files["vhs: encode_png, write_tar"])}
        missing = []
        try:
            from webdataset import ShardWriter
        except ImportError:
            missing = [Row("webdataset", None, None, note="not installed: pip install webdataset")]
        else:
            for name, mode in (("webdataset ShardWriter, PNG by default (RGB)", "RGB"), ("webdataset ShardWriter, PNG grey", "L")):
                files[name] = Path(scratch) / f"{mode}-000000.tar"
                pattern = f"{scratch}/{mode}-%06d.tar"
                contenders[name] = lambda mode=mode, pattern=pattern: _write_theirs(ShardWriter, pictures, mode, pattern)
        rates = _race(contenders, images, repeats, time.process_time)
        sizes = {name: file.stat().st_size // images for name, file in files.items()}
    return Result("write", "images per core-second", world.cpu_name(), images, repeats, [*_rows(rates, sizes), *missing])


def _write_ours(pictures: list[np.ndarray], file: Path):
    from shards.sample import Sample
    from shards.writer import write_tar
    from vhs.radiograph import encode_png

    write_tar((Sample(f"{number:016x}", {"png": encode_png(picture)}) for number, picture in enumerate(pictures)), file)


def _write_theirs(writer, pictures: list[np.ndarray], mode: str, pattern: str):
    from PIL import Image

    with writer(pattern, maxcount=len(pictures), verbose=0) as out:
        for number, picture in enumerate(pictures):
            out.write({"__key__": f"{number:016x}", "png": Image.fromarray(picture).convert(mode)})


# --- generate ------------------------------------------------------------------------------------------------------------------------
def generate(
    images: int = 8, repeats: int = 3, batch: int = 8, steps: int = 20, size_px: int = 128, model: str = "packaged", device: str = "auto"
) -> Result:
    """Our sampler beside diffusers' pipeline, one image a call and batched, and beside the networks alone called as often."""
    import torch
    from diffusers import DPMSolverMultistepScheduler, PNDMScheduler, StableDiffusionPipeline

    from jobs import models, world
    from vhs import diffusion, sampling
    from vhs.settings import Generation

    place = world.device(device)
    gpu = place.type == "cuda"
    parts = diffusion.load(models.WEIGHTS / "base" if model == "packaged" else model, place, torch.float16 if gpu else torch.float32)
    settings, prompt = Generation(steps=steps, batch=batch, guidance=2.0), "photo of sks normal dog heart Cardiovascular Thoracic radiograph x-ray"
    groups = [list(range(start, min(start + batch, images))) for start in range(0, images, batch)]

    def pipeline(solver) -> StableDiffusionPipeline:
        made = StableDiffusionPipeline(
            vae=parts.vae, text_encoder=parts.text_encoder, tokenizer=parts.tokenizer, unet=parts.unet, scheduler=solver,
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
        made.set_progress_bar_config(disable=True)
        return made

    config = parts.scheduler.config
    pndm = pipeline(PNDMScheduler.from_config(config, skip_prk_steps=True, timestep_spacing="leading", steps_offset=1))
    dpm = pipeline(DPMSolverMultistepScheduler.from_config(config, algorithm_type="dpmsolver++", timestep_spacing="trailing"))

    def theirs(pipe: StableDiffusionPipeline, of: list[list[int]], calls: int):
        for group in of:
            seeds = [torch.Generator().manual_seed(seed) for seed in group]
            pipe([prompt] * len(group), height=size_px, width=size_px, num_inference_steps=calls, guidance_scale=2.0, generator=seeds)

    def ours():
        for group in groups:
            sampling.sample(parts, [prompt] * len(group), group, size_px, settings)

    @torch.no_grad()
    def bare():
        side = size_px // parts.factor
        for group in groups:
            n = len(group)
            latents = torch.zeros(n, parts.unet.config.in_channels, side, side, device=place, dtype=parts.unet.dtype)
            context = diffusion.embed(parts, [prompt] * (2 * n)).to(parts.unet.dtype)
            for _ in range(steps):
                parts.unet(torch.cat([latents, latents]), 500, context)
            parts.vae.decode(latents)
        if gpu:
            torch.cuda.synchronize()

    alone = [[number] for number in range(images)]
    contenders = {
        f"vhs: DPM-Solver++ {steps}, batch {batch}": ours,
        "diffusers: PNDM 50, one image a call": lambda: theirs(pndm, alone, 50),
        f"diffusers: DPM-Solver++ {steps}, one image a call": lambda: theirs(dpm, alone, steps),
        f"diffusers: DPM-Solver++ {steps}, batch {batch}": lambda: theirs(dpm, groups, steps),
        f"UNet and decoder alone, {steps} calls, batch {batch}": bare,
    }
    with redirect_stderr(io.StringIO()):  # one notice a pipeline of what it was built from
        rates = _race(contenders, images, repeats, time.perf_counter if gpu else time.process_time)
    name = torch.cuda.get_device_name(place) if gpu else world.cpu_name()
    return Result("generate", "images per second" if gpu else "images per core-second", name, images, repeats, _rows(rates))
