"""generate: image number i of a prompted class, from seed i, by a scope's generator. Unit n holds the images [n S, (n + 1) S) for ever."""

from __future__ import annotations

from jobs.unit import Shard, Unit

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
AFTER = ("dreambooth",)


def units(run) -> list[Unit]:
    """Every unit of the rounds listed so far; lists the next round when the ones before it are labelled and the quota is not met."""
    from jobs import rounds
    return [unit for scope in run.scopes for unit in rounds.units(run, scope)]


def unit(run, scope: str, prompted: str, source: str | None, number: int) -> Unit:
    from jobs.drawing import stratum

    generator = run.committed("dreambooth", scope=scope)
    named = {} if source is None else {"source": source}
    return run.unit(
        NAME,
        f"{FOLDER}/{scope}/{stratum(prompted, source)}/{number:05d}",
        {"generator": generator},
        params={"scope": scope, "class": prompted, "number": number, **named},
    )


def wanted(config, params: dict) -> list:
    """The images of a unit with these parameters."""
    from jobs.drawing import Wanted, image_seed
    from vhs.prompts import instance_prompt

    settings, scope, name, source = config.generation, params["scope"], params["class"], params.get("source")
    prompt = instance_prompt(config.dreambooth, config.measure, name, source)
    stream = (settings.seed, scope, name) if source is None else (settings.seed, scope, name, source)
    first = params["number"] * settings.unit_images
    return [Wanted(i, prompt, image_seed(*stream, i)) for i in range(first, first + settings.unit_images)]


def work(config, inputs, output) -> Shard:
    from jobs import drawing

    params = inputs.params
    about = {
        "prompted": params["class"],
        "source": params.get("source"),
        "generator": inputs.markers("generator")[0].path,
        "generated_for": params["scope"],
    }
    return drawing.draw_shard(config, str(inputs.folder("generator")), config.generation, wanted(config, params), about)
