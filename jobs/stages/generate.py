"""generate: image number i of a prompted class, from seed i, by each of a scope's generators. Unit n holds the images [n S, (n + 1) S) for ever.

Image number i of a generator outside of the run is the i-th of its set (jobs/outside.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from jobs.unit import Shard, Unit

if TYPE_CHECKING:
    import numpy as np

NAME, FOLDER, KIND, TORCH = "generate", "generated", "parquet", True
SCIENCE = (
    "view",
    "resolution",
    "threads",
    "dreambooth.instance_prompt",
    "dreambooth.token",
    "dreambooth.concepts",
    "generation.solver",
    "generation.steps",
    "generation.guidance",
    "generation.batch",
    "generation.precision",
    "generation.by_source",
    "generation.unit_images",
    "generation.seed",
)
AFTER = ("dreambooth", "prompts")


def units(run) -> list[Unit]:
    """Every unit of the rounds listed so far; lists the next round when the ones before it are labelled and the quota is not met."""
    from jobs import generators, rounds

    return [unit for scope in run.scopes for name in generators.wanted(run.config) for unit in rounds.units(run, scope, name)]


def unit(run, generator: str, scope: str, prompted: str | None, source: str | None, number: int) -> Unit:
    """`prompted` None: of a generator outside of the run, which is asked for no class."""
    from jobs import generators, outside
    from jobs.drawing import stratum

    inputs = {"generator": generators.committed(run, "dreambooth", generator, scope)}
    drawn = {"phantoms": run.science(("phantoms",))} if generator == "oracle" else {}
    if generator == "null" or prompted is None:
        inputs |= {"real": run.committed("ingest"), "splits": run.committed("split")}
    if prompted is None:
        drawn = {"sources": outside.sources(run, generator, scope, number)}
    named = {} if prompted is None else {"class": prompted}
    named |= {} if source is None else {"source": source}
    if generator == generators.DREAMBOOTH and (tried := run.committed("prompts", scope=scope)):
        inputs["prompts"], named["prompt"] = tried, run.marker(tried[0]).facts["best"]
    return run.unit(
        NAME,
        f"{FOLDER}/{generators.place(generator, scope)}/{stratum(prompted or outside.ANY, source)}/{number:05d}",
        inputs,
        params={"scope": scope, "number": number, **named, **generators.named(generator), **drawn},
    )


def wanted(config, params: dict) -> list:
    """The images of a unit with these parameters. The base model, which has not learnt the token, is asked as for class images."""
    from jobs import generators
    from jobs.drawing import Wanted, image_seed
    from vhs.prompts import class_prompt, instance_prompt

    settings, scope, name, source = config.generation, params["scope"], params["class"], params.get("source")
    generator = generators.made_by(params)
    said = config.dreambooth.model_copy(update={"instance_prompt": params["prompt"]} if "prompt" in params else {})
    prompt = (class_prompt if generator == "base" else instance_prompt)(said, config.measure, name, source)
    place = generators.place(generator, scope)
    stream = (settings.seed, place, name) if source is None else (settings.seed, place, name, source)
    first = params["number"] * settings.unit_images
    return [Wanted(i, prompt, image_seed(*stream, i)) for i in range(first, first + settings.unit_images)]


def images(config, inputs, wanted: list) -> Iterator[np.ndarray]:
    """Those `wanted` of the unit that has these inputs, uint8 [S, S] each."""
    from jobs import drawing, generators, models

    generator = generators.made_by(inputs.params)
    if generator == "null":
        return generators.copies(config, inputs, wanted)
    if generator == "oracle":
        return generators.fresh(config, inputs.params, wanted)
    model = models.base(config) if generator == "base" else str(inputs.folder("generator"))
    return drawing.draw(config, model, config.generation, wanted)


def work(config, inputs, output) -> Shard:
    from jobs import drawing, outside

    if "sources" in inputs.params:
        return outside.shard(config, inputs)
    params, asked = inputs.params, wanted(config, inputs.params)
    about = {
        "prompted": params["class"],
        "source": params.get("source"),
        "generator": inputs.markers("generator")[0].path,
        "generated_for": params["scope"],
    }
    return drawing.as_shard(config, images(config, inputs, asked), asked, about)
