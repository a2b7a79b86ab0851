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
    "generation.solver",
    "generation.steps",
    "generation.guidance",
    "generation.batch",
    "generation.unit_images",
    "generation.seed",
)
AFTER = ("dreambooth",)


def units(run) -> list[Unit]:
    """Every unit of the rounds listed so far; lists the next round when the ones before it are labelled and the quota is not met."""
    from jobs import rounds
    from vhs.split import scopes

    return [unit for scope in scopes(run.config.split) for unit in rounds.units(run, scope)]


def unit(run, scope: str, prompted: str, number: int) -> Unit:
    generator = run.committed("dreambooth", scope=scope)
    return run.unit(
        NAME,
        f"{FOLDER}/{scope}/{prompted}/{number:05d}",
        {"generator": generator},
        params={"scope": scope, "class": prompted, "number": number},
    )


def wanted(config, params: dict) -> list:
    """The images of a unit with these parameters."""
    from jobs.drawing import Wanted, image_seed
    from vhs.prompts import instance_prompt

    settings, scope, name = config.generation, params["scope"], params["class"]
    prompt = instance_prompt(config.dreambooth, config.measure, name)
    first = params["number"] * settings.unit_images
    return [Wanted(i, prompt, image_seed(settings.seed, scope, name, i)) for i in range(first, first + settings.unit_images)]


def work(config, inputs, output) -> Shard:
    from jobs import drawing

    about = {"prompted": inputs.params["class"], "generator": inputs.markers("generator")[0].path, "generated_for": inputs.params["scope"]}
    return drawing.draw_shard(config, str(inputs.folder("generator")), config.generation, wanted(config, inputs.params), about)
