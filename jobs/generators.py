"""Who makes generated images: the run's own DreamBooth, and the controls, each the generator of the arm that has its name.

null    copies of the scope's training images: nothing new, so what its arm gains is chance, or comes of being trained otherwise
oracle  fresh images of the kind that the real ones are, as a perfect generator would draw them: phantoms know how, no camera does
base    the base model as it was: what mixed has beyond it, DreamBooth brought

Beside them those outside of the run (`generators` of the configuration, jobs/outside.py), each again the generator of the arm that has its name.

Each leaves a marker among the generators that says whom it saw; its images, labels and rounds lie in a folder of its name. Classes of copies and
of fresh phantoms are known; all else is labelled as the run labels (jobs/stages/label.py).
"""

from __future__ import annotations

from collections.abc import Iterator

DREAMBOOTH = "dreambooth"
KNOWING = ("null", "oracle")  # the class of every image they give
CONTROLS = (*KNOWING, "base")


def wanted(config) -> list[str]:
    """Those that a run with this configuration needs. Where only others are mixed in there is no DreamBooth."""
    others = [*(name for name in CONTROLS if name in config.arms), *outsiders(config)]
    return others if others and not {"mixed", "pretrain"} & set(config.arms) else [DREAMBOOTH, *others]


def outsiders(config) -> dict:
    """The generators outside of the run, by name."""
    return {generator.name: generator for generator in config.generators}


def of_arm(config, arm: str) -> str:
    """Whose images the arm trains on."""
    return arm if arm in CONTROLS or arm in outsiders(config) else DREAMBOOTH


def quota(config, generator: str) -> int:
    """Accepted images wanted of a class (and source, where DreamBooth's are counted by source)."""
    theirs = outsiders(config).get(generator)
    return theirs.dose if theirs and theirs.dose else config.generation.quota


def place(generator: str, scope: str) -> str:
    """Where below each stage's folder a generator's products for a scope lie."""
    return scope if generator == DREAMBOOTH else f"{generator}/{scope}"


def named(generator: str) -> dict[str, str]:
    """What a unit's parameters say of the generator: of the run's own nothing."""
    return {} if generator == DREAMBOOTH else {"generator": generator}


def made_by(params: dict) -> str:
    """The generator of a unit with these parameters."""
    return params.get("generator", DREAMBOOTH)


def committed(run, stage: str, generator: str, scope: str) -> list[str]:
    """Markers of a stage's units for this generator and scope."""
    return run.committed(stage, scope=scope, generator=named(generator).get("generator"))


def copies(config, inputs, wanted: list) -> Iterator:
    """null: the scope's training images of the unit's class (and source, where that source has the class), uint8 [S, S] each, every one of them before
    any comes again."""
    from jobs import lineage
    from jobs.batches import load_images
    from shards.reader import permutation
    from vhs.measure import CLASSES

    rows, params = lineage.split_rows(inputs).training, inputs.params
    rows = rows[rows.label == CLASSES.index(params["class"])]
    if (rows.source == params.get("source")).any():
        rows = rows[rows.source == params["source"]]
    for one in wanted:
        again, position = divmod(one.number, len(rows))
        number = permutation(len(rows), config.generation.seed, again)[position]
        yield load_images(inputs.storage, rows.iloc[number : number + 1])[0]


def fresh(config, params: dict, wanted: list) -> Iterator:
    """oracle: phantoms of the unit's class in the style of the run's own, of patients that nobody has seen, uint8 [S, S] each."""
    from vhs.measure import CLASSES
    from vhs.phantom import draw
    from vhs.radiograph import Letterbox

    drawn, prior = config.phantoms, [float(name == params["class"]) for name in CLASSES]
    for one in wanted:
        image = draw(config.view, drawn.style, one.seed, size_px=drawn.size_px, prior=prior).image
        yield Letterbox(image.shape[1], image.shape[0], config.resolution).image(image)
