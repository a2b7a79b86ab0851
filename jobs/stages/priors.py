"""priors: class images, which DreamBooth keeps in mind beside the instances: the user's own where concepts name a folder with some, the rest drawn
by the base model. What is drawn has seen nothing of the data; of the user's own, dreambooth refuses those of held-out patients."""

from __future__ import annotations

from jobs.unit import Shard, Unit

NAME, FOLDER, KIND, TORCH = "priors", "priors", "parquet", True
SCIENCE = (
    "view",
    "resolution",
    "threads",
    "base",
    "base_revision",
    "priors",
    "dreambooth.class_prompt",
    "dreambooth.token",
    "dreambooth.concepts",
)
AFTER = ()


def units(run) -> list[Unit]:
    """A class, or a concept, has a unit for the images to draw and one for the user's own, and all share `priors.images`. No source otherwise: the
    base has no word for it."""
    from jobs import generators, models
    from jobs.drawing import stratum
    from vhs.measure import CLASSES
    from vhs.prompts import concepts

    if generators.DREAMBOOTH not in generators.wanted(run.config):
        return []
    base, settings = models.fingerprint(models.base(run.config)), run.config.dreambooth
    strata = list(concepts(settings)) or [(name, None) for name in CLASSES]
    own = run.freeze(f"{FOLDER}/own.json", lambda: _own(settings)) if any(c.class_data_dir for c in settings.concepts) else {}
    listed = []
    for position, (name, source) in enumerate(strata):
        count = run.config.priors.images // len(strata) + (position < run.config.priors.images % len(strata))
        folder, named = stratum(name, source), {"class": name} | ({} if source is None else {"source": source})
        files = own.get(folder, [])[:count]
        if len(files) < count:
            listed.append(run.unit(NAME, f"{FOLDER}/{folder}/00000", {}, params={**named, "images": count - len(files), "base": base}))
        if files:
            listed.append(run.unit(NAME, f"{FOLDER}/{folder}/00001", {}, params={**named, "files": files}))
    return listed


def _own(settings) -> dict[str, list[dict[str, str]]]:
    """Files in the concepts' class_data_dir, by folder of their class images; of equal files the first, and those that several concepts name are dealt out
    among them, for a run has each image once. A folder that is not there holds none."""
    import hashlib
    from itertools import cycle

    from jobs.data import place
    from jobs.drawing import stratum
    from shards.storage import open_storage
    from vhs.prompts import concepts

    found, named = {}, {}  # folder -> what it has; sha256 -> the file, and each folder that it could be in
    for key, concept in concepts(settings).items():
        found[stratum(*key)] = []
        if concept.class_data_dir:
            there = open_storage(concept.class_data_dir)
            for name in (name for name in there.list() if "/" not in name and not name.startswith(".")):
                file, sha256 = f"{place(concept.class_data_dir).rstrip('/')}/{name}", hashlib.sha256(there.read(name)).hexdigest()
                named.setdefault(sha256, (file, {}))[1][stratum(*key)] = None
    turns = {}
    for sha256, (file, folders) in named.items():
        turn = turns.setdefault(tuple(folders), cycle(folders))
        found[next(turn)].append({"file": file, "sha256": sha256})
    return found


def work(config, inputs, output) -> Shard:
    from jobs import drawing, models
    from vhs.prompts import class_prompt

    name, source = inputs.params["class"], inputs.params.get("source")
    prompt, about = class_prompt(config.dreambooth, config.measure, name, source), {"prompted": name, "source": source}
    if "files" in inputs.params:
        return _read_own(inputs.params["files"], config.resolution, prompt, about)
    stream = (config.priors.seed, "priors", drawing.stratum(name, source))
    wanted = [drawing.Wanted(number, prompt, drawing.image_seed(*stream, number)) for number in range(inputs.params["images"])]
    return drawing.as_shard(config, drawing.draw(config, models.base(config), config.priors, wanted), wanted, about)


def _read_own(files: list[dict[str, str]], resolution: int, prompt: str, about: dict[str, str | None]) -> Shard:
    """The user's class images as every image of a run is stored: grey, letterboxed."""
    import hashlib

    from jobs.data import read_file
    from jobs.drawing import columns_of
    from shards.sample import Sample, sample_key
    from vhs.contained import Contained, Died
    from vhs.radiograph import Letterbox, Unreadable, decode, encode_png

    samples = []
    with Contained() as contained:
        for item in files:
            data = read_file(item["file"])
            if hashlib.sha256(data).hexdigest() != item["sha256"]:
                raise ValueError(f"class image {item['file']} changed since the run began: put it back, or start a new run")
            try:
                image = contained.call(decode, data, item["file"])
            except (Unreadable, Died) as error:
                why = str(error).removeprefix(f"{item['file']}: ")
                raise ValueError(f"{item['file']}: {why}. It lies in a concept's class_data_dir: take it out and start a new run") from None
            height, width = image.shape
            samples.append(Sample(sample_key(data), {"png": encode_png(Letterbox(width, height, resolution).image(image))}))
    numbers = list(range(len(samples)))
    return Shard(samples, columns_of(numbers, [prompt] * len(samples), [None] * len(samples), about), {"images": len(samples)})
