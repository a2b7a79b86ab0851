"""Images by number: seed, prompt, batch, shard. Used for class images, for generated images, and to draw one again (`vhs regenerate`)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import quote

from jobs import world
from jobs.unit import Shard
from shards.sample import Sample, sample_key


@dataclass(frozen=True)
class Wanted:
    """One image to draw."""

    number: int
    prompt: str
    seed: int


def image_seed(seed: int, *name: str | int) -> int:
    """The seed of an image, a function of its name alone: whatever the number of GPUs, the retry or the backend."""
    return int.from_bytes(hashlib.blake2b("/".join(map(str, (seed, *name))).encode(), digest_size=8).digest()) >> 1


def stratum(class_name: str, source: str | None = None) -> str:
    """The folder of images prompted by a class, or by a class and a source."""
    return class_name if source is None else f"{class_name}-{quote(source, safe='')}"


@lru_cache(maxsize=1)
def _open(model: str, device, precision: str):
    """The model stays loaded from unit to unit; folders of a run are named by their content, so a name means one model for ever."""
    import torch

    from vhs import diffusion

    return diffusion.load(model, device, getattr(torch, precision))


def draw(config, model: str, settings, wanted: list[Wanted]) -> Iterator:
    """uint8 [S, S] for each wanted image. Batches are cut from the list's start: the same list gives the same batches and so the same bytes."""
    from vhs.sampling import sample

    components = _open(model, world.device(config.execution.device), settings.precision)
    for start in range(0, len(wanted), settings.batch):
        part = wanted[start : start + settings.batch]
        yield from sample(components, [w.prompt for w in part], [w.seed for w in part], config.resolution, settings)


def as_shard(config, images: Iterator, wanted: list[Wanted], about: dict[str, str | None]) -> Shard:
    """The wanted `images` as a shard; `about` becomes a column each. A batch is encoded while the next one is drawn."""
    from vhs.radiograph import encode_png

    with ThreadPoolExecutor(max_workers=1) as encoder:
        encodings = [encoder.submit(encode_png, image) for image in images]
    numerics = world.numerics(config.threads, world.device(config.execution.device))
    # the seed is part of the source: two black images are two samples
    samples = [Sample(sample_key(f"{w.seed} ".encode() + e.result()), {"png": e.result()}) for w, e in zip(wanted, encodings, strict=True)]
    columns = columns_of([w.number for w in wanted], [w.prompt for w in wanted], [w.seed for w in wanted], about)
    return Shard(samples, columns, {"images": len(samples), "numerics": numerics})


def columns_of(numbers: list[int], prompts: list[str], seeds: list[int | None], about: dict[str, str | None]):
    """What a sidecar says of its images, the same types in every shard. A seed is None for an image that was not drawn."""
    import pyarrow as pa

    said = {name: pa.array([value] * len(numbers), pa.string()) for name, value in about.items()}
    return pa.table(
        {"number": pa.array(numbers, pa.int64()), "prompt": pa.array(prompts, pa.string()), "seed": pa.array(seeds, pa.int64()), **said}
    )
