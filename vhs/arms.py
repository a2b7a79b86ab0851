"""The arms of a run, and the differences between them that are reported."""

from collections.abc import Iterable

ARMS = {  # in the order every table and figure shows them
    "real": "real images as they are, the study's baseline",
    "real-matched": "real images only, drawn with mixed's class prior, optimizer steps, initial weights and augmentation",
    "mixed": "real and generated images together",
    "pretrain": "first generated images, then real ones",
    "null": "control: as mixed, with copies of the training images instead of generated ones",
    "base": "control: as mixed, with images of the base model before DreamBooth",
    "oracle": "control: as mixed, with fresh images of the real ones' kind",
    "measure": "no classifier: the labeller's index cut at the class edges",
    "source": "no image looked at: the class that most training images of its source have",
}
PRIMARY = ("mixed", "real-matched")
UNTRAINED = ("measure", "source")
REAL = ("real", "real-matched")  # these train on real images alone
DIFFERENCES = {  # arm minus arm, and what the difference is worth; the first is the verdict's
    PRIMARY: "what generation brought",
    ("mixed", "base"): "what DreamBooth brought",
    ("pretrain", "real-matched"): "what generation brought, trained on first",
    ("null", "real-matched"): "nothing: how often this is shown to differ from 0 is how often the method errs",
    ("base", "real-matched"): "what the base model brought",
    ("oracle", "real-matched"): "what a perfect generator would bring",
    ("mixed", "real"): "as the study compared: balance and optimizer steps are among it",
}
BESIDE = {  # shown too, and in no plan: those that are frozen know nothing of them
    ("real", "source"): "what images tell beyond where they come from",
    ("mixed", "source"): "the same, with generated images",
}


def outside(arms: Iterable[str]) -> list[str]:
    """The arms that are none of ours: each mixes in the images of the generator that has its name, drawn outside of the run."""
    return sorted(set(arms) - set(ARMS))


def meanings(arms: Iterable[str]) -> dict[str, str]:
    return ARMS | {name: f"as mixed, with {name}'s images instead of generated ones" for name in outside(arms)}


def differences(arms: Iterable[str]) -> dict[tuple[str, str], str]:
    """Of the differences that a plan lists those whose arms are there."""
    there = set(arms)
    more = {(name, PRIMARY[1]): f"what {name}'s images brought" for name in outside(there)}
    more |= {(PRIMARY[0], name): f"what this run's own generator has beyond {name}" for name in outside(there)}
    return {pair: worth for pair, worth in (DIFFERENCES | more).items() if set(pair) <= there}


def reported(arms: Iterable[str]) -> dict[tuple[str, str], str]:
    """Of all differences those whose arms are there, the planned ones first."""
    there = set(arms)
    return differences(there) | {pair: worth for pair, worth in BESIDE.items() if set(pair) <= there}
