"""Generators outside of the run (`generators` of the configuration): a GAN, a VAE, another diffuser, whose images somebody drew elsewhere.

They come in by the door of the data and go on as the run's own: numbered by their place in the set's sorted list, committed in shards, measured by the
run's labeller, the first of each measured class trained on. What the set calls them is kept as their prompted class, and is never their label.

Of each set the list of its files, with their sha256, and what it was trained on are frozen when the run begins (outside/NAME/SCOPE.json, its digest in the
plan): where the set lies may change, what it holds may not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from jobs import generators
from jobs.config import NOTHING, Config
from jobs.data import open_data, place
from jobs.unit import Files, Shard, digest
from shards.storage import open_storage
from vhs.sources import SourceError

if TYPE_CHECKING:
    import numpy as np

    from jobs.plan import Run

FOLDER = "outside"
ANY = "any"  # the stratum of images that no class was asked of
KEPT = ("file", "origin", "label", "inside", "sha256", "reject")  # of a source
LIST_BYTES = 1 << 28  # of the names of what a generator was trained on; a million have a tenth


def path(name: str, scope: str) -> str:
    """Where a run keeps what it began with."""
    return f"{FOLDER}/{name}/{scope}.json"


def found(config: Config, name: str, scope: str, real: list[dict]) -> dict:
    """{"images": sources in order, "trained_on": {origin: patient} of images of the data, None for nothing}, as they are now. `real`: the data's sources.
    SourceError for a set, or a list of what its generator was trained on, that cannot be used."""
    data, trained_on = generators.outsiders(config)[name].in_scope(scope)
    try:
        listed = open_data(data).listed(config.measure, config.ingest.class_order, labelled=False)
        seen = declared(trained_on, real)
    except FileNotFoundError:
        raise SourceError(f"generators: {name}: trained_on = {trained_on!r} does not exist: give a text file, or {NOTHING}") from None
    except SourceError as error:
        raise SourceError(f"generators: {name}, {scope}: {error}") from None
    first: dict[str, str] = {}
    for source in (source for source in listed if not source["reject"]):
        if (kept := first.setdefault(source["sha256"], source["file"])) != source["file"]:
            source["reject"] = f"the same bytes as {kept}"
    return {"images": [{what: source[what] for what in KEPT} for source in listed], "trained_on": seen}


def declared(trained_on: str, real: list[dict]) -> dict[str, str | None] | None:
    """What the list at `trained_on` names, {origin: patient}; None for nothing. FileNotFoundError where there is none, SourceError where it cannot be meant."""
    if trained_on == NOTHING:
        return None
    root, _, file = place(trained_on).rpartition("/")
    data = open_storage(root).read(file, 0, LIST_BYTES + 1)
    try:
        names = [line.strip() for line in data.decode("utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise SourceError(f"trained_on = {trained_on!r} is no text in UTF-8: {error}") from None
    if len(data) > LIST_BYTES or not names:
        wrong = f"is longer than {LIST_BYTES} bytes" if names else "names no image"
        raise SourceError(f"trained_on = {trained_on!r} {wrong}: write a line for each image, or trained_on: {NOTHING} where it saw none of this data")
    used = {source["sha256"]: source for source in real if source.get("sha256") and not source.get("reject")}
    known = {}
    for source in real:
        one = used.get(source.get("sha256"), source)  # of copies the one that is used
        known |= dict.fromkeys((source["file"], source["origin"], (source.get("sha256") or "")[:16]), (one["origin"], one.get("patient")))
    if unknown := [name for name in names if name not in known]:
        raise SourceError(
            f"trained_on = {trained_on!r} names {len(unknown)} images that the data do not have, {', '.join(unknown[:5])}{', …' * (len(unknown) > 5)}: "
            "write the data's file names as they lie below its place, or keys, the first 16 hex digits of a file's sha256 (phantoms by their names alone)"
        )
    return dict(sorted(known[name] for name in names))


def places(config: Config) -> dict[str, dict[str, str]]:
    """Where each generator's images lie, and what says what it was trained on, as from any folder."""
    return {one.name: {"data": place(one.data), "trained_on": NOTHING if one.trained_on == NOTHING else place(one.trained_on)} for one in config.generators}


def lists(run: Run) -> dict[tuple[str, str], dict]:
    """Of every generator and scope what is found now."""
    return {(name, scope): found(run.config, name, scope, run.sources) for name in generators.outsiders(run.config) for scope in run.scopes}


def digests(now: dict[tuple[str, str], dict]) -> dict[str, str]:
    """What a plan knows them by."""
    return {path(*key): digest(value) for key, value in now.items()}


def settle(run: Run, planned: dict[str, str], before: dict, now: dict[tuple[str, str], dict]):
    """Freeze what is not frozen yet. PlanError where a set, or what its generator was trained on, is another than the run was planned with.

    `planned`: digests, `before`: places of the last start, `now`: what has been found already. A set that is where it was is not read through again: each
    image has to be what it was when its turn comes.
    """
    from jobs.plan import SOURCES, PlanError

    way = f"put the former back, or start beside: --out NEW --reuse {run.url}"
    where = places(run.config)
    for name, generator in generators.outsiders(run.config).items():
        moved = before.get(name) != where[name]
        for scope in run.scopes:
            file, real = path(name, scope), run.freeze(SOURCES, lambda: run.sources)
            if file in run.names and not moved:
                try:
                    same = declared(generator.in_scope(scope)[1], real) == run.outside(name, scope)["trained_on"]
                except FileNotFoundError:  # as data may be away once it is read
                    same = True
                if not same:
                    raise PlanError(f"generators: {name} says now that it was trained on other images ({scope}) than when {run.url} began: {way}")
                continue
            content = now.get((name, scope)) or found(run.config, name, scope, real)
            if digest(content) != planned[file]:
                raise PlanError(f"generators: {name} has other images, or was trained on others ({scope}), than when {run.url} began: {way}")
            run.freeze(file, lambda: content)  # noqa: B023


def units(run: Run, name: str, scope: str) -> int:
    """Units that the set makes."""
    return -(-len(run.outside(name, scope)["images"]) // run.config.generation.unit_images)


def sources(run: Run, name: str, scope: str, number: int) -> list[dict]:
    """Those of a unit."""
    size = run.config.generation.unit_images
    return run.outside(name, scope)["images"][number * size : (number + 1) * size]


def record(config: Config, inputs) -> Files:
    """Whom the generator saw, by its owner's word."""
    from jobs import lineage

    params, scope, real = inputs.params, lineage.split_rows(inputs), inputs.samples("real")
    named, by_split = params["trained_on"] or {}, lineage.with_patients(real, inputs.table("splits"))
    about = (params["generator"], params["scope"])
    seen = lineage.declared(about, named, real, by_split, scope.held_out_patients, config.split.duplicate_bits)
    return Files({"scope": params["scope"], "generator": params["generator"], "trained_on": len(named), **seen})


def shard(config: Config, inputs) -> Shard:
    """The images of a unit as every image of a run is stored. LeakError for one that is a film of a held-out patient."""
    import pandas as pd
    import pyarrow as pa

    from jobs import lineage, world
    from jobs.drawing import columns_of
    from shards.sample import Sample, sample_key
    from vhs.duplicates import perceptual_hash
    from vhs.radiograph import encode_png

    params, rejects, samples, rows = inputs.params, [], [], []
    for number, source, data, image in _images(config, inputs, rejects):
        samples.append(Sample(_key(params, number, data), {"png": encode_png(image)}))
        rows.append((number, source["label"], source["origin"], sample_key(data), perceptual_hash(image)))
    drawn = pd.DataFrame(rows, columns=["number", "prompted", "origin", "key", "phash"])
    real = lineage.with_patients(inputs.samples("real"), inputs.table("splits"))
    lineage.refuse_films(
        (params["generator"], params["scope"]), drawn, real, lineage.split_rows(inputs).held_out_patients, config.split.duplicate_bits
    )
    nobody, about = [None] * len(rows), {"source": None, "generator": inputs.markers("generator")[0].path, "generated_for": params["scope"]}
    columns = columns_of(drawn.number.tolist(), nobody, nobody, about)
    for what in ("prompted", "origin"):
        columns = columns.append_column(what, pa.array(drawn[what].tolist(), pa.string()))
    numerics = world.numerics(config.threads, world.device(config.execution.device))
    return Shard(samples, columns, {"images": len(samples), "numerics": numerics, "rejects": rejects})


def again(config: Config, inputs, key: str) -> tuple[int, np.ndarray]:
    """(number, image) of the unit's image `key`, read again."""
    return next((number, image) for number, _, data, image in _images(config, inputs, []) if _key(inputs.params, number, data) == key)


def _images(config: Config, inputs, rejects: list[dict]) -> Iterator[tuple[int, dict, bytes, np.ndarray]]:
    """(number, source, its bytes, image uint8 [S, S]) of a unit, in order; those that cannot be used go to `rejects`, and their numbers are nobody's."""
    from jobs.stages import ingest
    from vhs.radiograph import Letterbox

    params, size = inputs.params, config.generation.unit_images
    data = open_data(generators.outsiders(config)[params["generator"]].in_scope(params["scope"])[0])
    listed = [{**source, "points": None} for source in params["sources"]]
    for number, (source, read) in enumerate(ingest.decoded(data, listed, config), params["number"] * size):
        try:
            content, image, *_ = read()
        except ingest.Rejected as reason:
            rejects.append({"file": source["file"], "reason": str(reason)})
            continue
        height, width = image.shape
        yield number, source, content, Letterbox(width, height, config.resolution).image(image)


def _key(params: dict, number: int, data: bytes) -> str:
    """One file may serve several scopes, and each of its images is a sample of its own."""
    from shards.sample import sample_key

    return sample_key(f"{params['generator']}/{params['scope']}/{number} ".encode() + data)
