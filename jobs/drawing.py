"""Images by number: seed, prompt, batch, shard. Used for class images, for generated images, and to draw one again (`vhs regenerate`)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

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


@lru_cache(maxsize=1)
def _open(model: str, device):
    """The model stays loaded from unit to unit; folders of a run are named by their content, so a name means one model for ever."""
    from vhs import diffusion

    return diffusion.load(model, device)


def draw(config, model: str, settings, wanted: list[Wanted]) -> Iterator:
    """uint8 [S, S] for each wanted image. Batches are cut from the list's start: the same list gives the same batches and so the same bytes."""
    from vhs.sampling import sample

    components = _open(model, world.device(config.execution.device))
    for start in range(0, len(wanted), settings.batch):
        part = wanted[start : start + settings.batch]
        yield from sample(components, [w.prompt for w in part], [w.seed for w in part], config.resolution, settings)


def draw_shard(config, model: str, settings, wanted: list[Wanted], about: dict[str, str]) -> Shard:
    """The wanted images as a shard; `about` becomes a column each."""
    import pyarrow as pa

    from vhs.radiograph import encode_png

    encoded = [encode_png(image) for image in draw(config, model, settings, wanted)]
    rows = [{"number": w.number, "prompt": w.prompt, "seed": w.seed, **about} for w in wanted]
    numerics = world.numerics(config.threads, world.device(config.execution.device))
    # the seed is part of the source: two black images are two samples
    samples = [Sample(sample_key(f"{w.seed} ".encode() + data), {"png": data}) for w, data in zip(wanted, encoded)]
    return Shard(samples, pa.Table.from_pylist(rows), {"images": len(rows), "numerics": numerics})
