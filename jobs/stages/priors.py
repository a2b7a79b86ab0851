"""priors: class images drawn by the base model, which DreamBooth keeps in mind beside the instances. They have seen nothing of the data."""

from __future__ import annotations

from jobs.unit import Shard, Unit

NAME, FOLDER, KIND, TORCH = "priors", "priors", "parquet", True
SCIENCE = ("view", "resolution", "threads", "base", "priors", "dreambooth.class_prompt", "dreambooth.token")
AFTER = ()


def units(run) -> list[Unit]:
    """One unit a class, the classes sharing `priors.images`."""
    from jobs import models
    from vhs.measure import CLASSES

    base = models.fingerprint(models.base(run.config))
    counts = [run.config.priors.images // len(CLASSES) + (c < run.config.priors.images % len(CLASSES)) for c in range(len(CLASSES))]
    return [
        run.unit(NAME, f"{FOLDER}/{name}/00000", {}, params={"class": name, "images": count, "base": base})
        for name, count in zip(CLASSES, counts)
    ]


def work(config, inputs, output) -> Shard:
    from jobs import drawing, models
    from vhs.prompts import class_prompt

    name, count = inputs.params["class"], inputs.params["images"]
    prompt = class_prompt(config.dreambooth, config.measure, name)
    wanted = [drawing.Wanted(number, prompt, drawing.image_seed(config.priors.seed, "priors", name, number)) for number in range(count)]
    return drawing.draw_shard(config, models.base(config), config.priors, wanted, {"prompted": name})
