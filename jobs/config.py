"""A run's configuration: science (what changes results) beside execution (what does not), from YAML and dotted overrides.

`load("debug/demo", ["dreambooth.steps=20"])` -> Config. Everything but `execution` and `expect` is science: it is frozen in the run's plan.json,
and a unit's identity is made of the parts its stage reads (jobs/unit.py). The scientific sections themselves are in vhs/settings.py.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator

from jobs.generators import CONTROLS
from jobs.legal import explain
from shards import credentials
from vhs.arms import ARMS
from vhs.measure import CLASSES, VIEWS, View
from vhs.prompts import class_prompt, concepts, instance_prompt, names_source
from vhs.settings import CONFIGS, Classifier, DreamBooth, Generation, Labeller, Phantoms, Priors, Prompts, Report, Section, Split, ViewName

FILE_BYTES = 1 << 20
PHANTOMS, FILES = "phantoms", "files"  # what science knows of `data`
SEALED = 1000  # phantoms.seed from here on is for reported figures alone, below 100 for choosing settings
RANKED = ("labeller", "dreambooth", "classifier")  # sections whose units may have several ranks
PLACES = ("data", "trained_on")  # of a generator: where, not what
Arm = Annotated[str, BeforeValidator(lambda name: "null" if name is None else name)]  # null is YAML's word for nothing
SCOPE = "{scope}"  # in a generator's places: split, fold-0, fold-1 …
NOTHING = "nothing"
KINDS = {  # what a file is that has this key
    "view": "the configuration of a run: vhs run {}",
    "question": "a study: vhs study {}",
    "views": "the settings of a base model: vhs pretrain {}",
    "generated_share": "what a search tries: vhs tune RUN --space {}",
    "partition": "a site: vhs run CONFIG --on slurm --cluster {}",
}


class ConfigError(Exception):
    """A configuration that cannot be used; the message says which key, which value, what is legal."""


class Ingest(Section):
    """How a data folder is read (jobs/stages/ingest.py)."""

    shard_images: int = Field(256, ge=1)
    source: str = "unknown"  # of images whose table has no source column
    class_order: tuple[str, str, str] | None = None  # what 0, 1, 2 mean in a table that numbers its classes; asked for, never guessed
    burned_in_annotation: Literal["reject", "keep"] = "reject"  # DICOM whose pixels may show who the patient is

    @model_validator(mode="after")
    def _orders_every_class(self) -> Ingest:
        if self.class_order and sorted(self.class_order) != sorted(CLASSES):
            raise ValueError(f"class_order names each of {', '.join(CLASSES)} once, got {', '.join(self.class_order)}")
        return self


class Generator(Section):
    """A set of images that somebody else's generator drew (jobs/outside.py): what the arm of its name mixes in."""

    name: str = Field(pattern="^[A-Za-z][A-Za-z0-9_-]{0,39}$")
    data: str  # anything that `data` of a run may be, labels or none; {scope} stands for the scope that the images were drawn for
    trained_on: str | None = None  # a text file, a line an image of this run's data by its key or name; `nothing`; {scope} as in data
    dose: int | None = Field(None, ge=1)  # accepted images of each MEASURED class; null: generation.quota

    @model_validator(mode="after")
    def _has_a_lineage(self) -> Generator:
        taken = (*ARMS, *CLASSES, "dreambooth", "split", "corrections", "confirmed")  # names of folders beside its own, and of columns beside its name
        if self.name in taken or re.fullmatch(r"fold-\d+", self.name):
            raise ValueError(f"the name {self.name} is taken: choose another than {', '.join(taken)}, fold-0 …")
        for place in (self.data, self.trained_on or ""):
            credentials.refuse_in(place)
        if self.data == PHANTOMS:
            raise ValueError(f"{self.name}: data is a folder, a table or shards, here or in object storage; fresh phantoms are the arm oracle's")
        return self

    def in_scope(self, scope: str) -> tuple[str, str]:
        """Where its images for a scope lie, and what it was trained on for that scope."""
        return self.data.replace(SCOPE, scope), self.trained_on.replace(SCOPE, scope)


class Expect(Section):
    """Sizes to plan with while the data is on another machine (`vhs run --dry-run`). They change nothing and enter no plan."""

    train: int = Field(ge=1)
    valid: int = Field(0, ge=0)
    test: int = Field(ge=1)
    judged: int | None = Field(None, ge=0)  # test images that have a label; null: all

    @model_validator(mode="after")
    def _no_more_than_there_are(self) -> Expect:
        if (self.judged or 0) > self.test:
            raise ValueError(f"judged is {self.judged} of only {self.test} test images: give 0 to {self.test}")
        return self


class Execution(Section):
    """Where and how fast; may change at any time, between two runs of the same folder too."""

    workers: int = Field(1, ge=1)  # units side by side on this machine
    device: Literal["auto", "cpu", "cuda"] = "auto"
    work_dir: str | None = None  # private scratch, POSIX, disposable; may hold variables ($TMPDIR). null: $VHS_WORK_DIR, else beside the run's files
    checkpoint_steps: int = Field(200, ge=1)  # optimizer steps between checkpoints
    sample_steps: int = Field(0, ge=0)  # optimizer steps between DreamBooth's sample images, one a class, in RUN/state/log; 0: none
    tensorboard: bool = False  # curves of everything that trains, in RUN/state/log
    heartbeat_s: float = Field(2.0, gt=0)
    tries: int = Field(3, ge=1)  # at a unit that fails, by jobs that nobody watches; a start by hand counts anew
    stale_s: float = Field(30.0, gt=0)  # a claim of another machine whose heartbeat stood still this long is taken over


class Config(Section):
    """The whole of it. `data` is a folder, a CSV, WebDataset shards (a list, or a pattern with braces), each here or in object storage, or `phantoms`."""

    name: str
    view: ViewName
    resolution: int = Field(512, ge=32, multiple_of=8)  # side of every image of the run, real and generated, letterboxed
    threads: int = Field(1, ge=1)  # a rank: part of the numerics, so part of the science
    elastic: bool = False  # true: labeller.ranks, dreambooth.ranks, classifier.ranks may differ at each start, also within a training; bytes then do too
    data: str = "phantoms"
    edges: tuple[float, float] | None = None  # class edges of the index; null: the published ones
    high_is_large: bool | None = None  # true: an index equal to the upper edge is large; null: as the view has it
    base: str = "packaged"  # packaged | a diffusers folder, also s3://… | a hub id of Stable Diffusion 1.x / 2.x
    base_revision: str | None = Field(None, pattern="^[0-9a-f]{40}$")  # the commit of a hub id
    # teacher: a classifier as `classifier` says, but for its schedule, keep, class_weights and what concerns the arms (UNUSED in jobs/teacher.py)
    label_by: Literal["measure", "prompt", "teacher", "hand"] = "measure"  # of generated images (jobs/stages/label.py)
    arms: tuple[Arm, ...] = ("real", "real-matched", "mixed", "measure")  # pretrain, each control (jobs/generators.py), each of `generators`: trainings more
    generators: tuple[Generator, ...] = ()  # outside of this run; each is an arm by its name
    seeds: tuple[int, ...] = (0,)  # of classifier training; one classifier an arm, scope and seed
    purpose: Literal["confirmatory", "descriptive"] = "confirmatory"  # descriptive: the verdict says that it only describes this data
    phantoms: Phantoms = Phantoms()
    ingest: Ingest = Ingest()
    split: Split = Split()
    labeller: Labeller = Labeller()
    priors: Priors = Priors()
    dreambooth: DreamBooth = DreamBooth()
    prompts: Prompts = Prompts()
    generation: Generation = Generation()
    classifier: Classifier = Classifier()
    report: Report = Report()
    execution: Execution = Execution()
    expect: Expect | None = None

    @model_validator(mode="after")
    def _whole(self) -> Config:
        credentials.refuse_in(self.data)
        _refuse_generators(self)
        mixing = ["mixed", *CONTROLS, *(generator.name for generator in self.generators)]
        if bool(set(mixing) & set(self.arms)) != ("real-matched" in self.arms):
            raise ValueError(f"real-matched is what {', '.join(mixing)} are compared with: name it with any of them, not alone")
        if "oracle" in self.arms and self.data != PHANTOMS:
            raise ValueError("the arm oracle trains on fresh images of the real ones' kind, and only phantoms can be drawn: leave it out, or data=phantoms")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds must be distinct and at least one, got {self.seeds}")
        if self.split.folds == 1:
            raise ValueError("split.folds: 0 (test split only) or at least 2")
        if not self.arms:
            raise ValueError(f"arms is empty: name some of {', '.join(ARMS)}")
        if self.generation.by_source and not names_source(self.dreambooth):
            raise ValueError("generation.by_source: a prompt must say the source, so write {source} into dreambooth.instance_prompt or token")
        for name, source in concepts(self.dreambooth) or [(CLASSES[0], None)]:
            for prompt in (instance_prompt, class_prompt):  # a template with an unknown field raises
                prompt(self.dreambooth, self.measure, name, source)  # and so do edges that do not rise
        if self.prompts.candidates and self.dreambooth.concepts:
            raise ValueError("prompts.candidates are templates for every class, and dreambooth.concepts give each its own: leave one of them out")
        for template in self.prompts.candidates:
            said = self.dreambooth.model_copy(update={"instance_prompt": template})
            if self.generation.by_source and not names_source(said):
                raise ValueError(f"prompts.candidates: {template!r} must say {{source}}, for generation.by_source is true")
            if len({instance_prompt(said, self.measure, name, "") for name in CLASSES}) < len(CLASSES):
                raise ValueError(f"prompts.candidates: {template!r} asks for every class in the same words: write {{size}} into it, or a {{token}} that does")
        return self

    @property
    def measure(self) -> View:
        """The view with this run's class edges."""
        return VIEWS[self.view].with_edges(self.edges, self.high_is_large)

    def refuse_sealed(self):
        """ConfigError for phantoms that nobody may look at but a study, which counts how often."""
        if self.data == PHANTOMS and self.phantoms.seed >= SEALED:
            raise ConfigError(f"phantoms.seed = {self.phantoms.seed}: from {SEALED} on they are sealed, for what `vhs study` reports. Take a seed below")

    @property
    def largest_ranks(self) -> int:
        """Ranks of the unit that has most."""
        return max(getattr(self, section).ranks for section in RANKED)

    @property
    def science(self) -> dict:
        """Everything that changes results, as plain JSON values. What the data holds is in the list of sources; where it lies changes nothing, nor do the ranks
        of an elastic run."""
        left_out = {section: {"ranks"} for section in RANKED} if self.elastic else {"elastic": True}
        values = self.model_dump(mode="json", exclude={"execution": True, "expect": True, **left_out})
        for generator in values["generators"]:
            generator |= {name: _somewhere(generator[name]) for name in PLACES}
        return values | {"data": PHANTOMS if self.data == PHANTOMS else FILES}

    @property
    def free(self) -> dict:
        """What may differ at each start, as plain JSON values: where the data and outside generators' images lie, the execution section, `ranks` by section
        where the run is elastic."""
        ranks = {"ranks": {section: getattr(self, section).ranks for section in RANKED}} if self.elastic else {}
        places = {"generators": {one.name: {name: getattr(one, name) for name in PLACES} for one in self.generators}} if self.generators else {}
        return {"data": self.data, "execution": self.execution.model_dump(mode="json")} | ranks | places

    @classmethod
    def of(cls, science: dict, free: dict) -> Config:
        """The configuration that has this `science` and is otherwise `free`. ValueError where they are those of another version."""
        ranked = {section: science[section] | {"ranks": ranks} for section, ranks in free.get("ranks", {}).items()}
        places = free.get("generators", {})
        generators = [one | places.get(one["name"], {}) for one in science.get("generators", ())]
        return cls.model_validate({**science, **ranked, **{name: value for name, value in free.items() if name != "ranks"}, "generators": generators})


def _refuse_generators(config: Config):
    """ValueError for arms that nobody knows, and for generators outside of the run that cannot be used as they are declared."""
    names, folds = [generator.name for generator in config.generators], config.split.folds
    if len(set(names)) != len(names):
        raise ValueError(f"generators: a name twice among {', '.join(names)}")
    if unknown := [arm for arm in config.arms if arm not in ARMS and arm not in names]:
        raise ValueError(f"arms: no arm {', '.join(unknown)}; legal are {', '.join(ARMS)}, and the name of each of generators ({', '.join(names) or 'none'})")
    for name, generator in zip(names, config.generators):
        if name not in config.arms:
            raise ValueError(f"generators: {name} is in no arm: name it in arms too, arms=[{','.join([*config.arms, name])}]")
        how = f"write trained_on: FILE, a line for each image of this data that it was trained on (its key or file name), or trained_on: {NOTHING}"
        if generator.trained_on is None and folds:
            raise ValueError(
                f"generators: {name} does not say what it was trained on, and every image is held out in one of {folds} folds: it would carry them into "
                f"training. Teach it anew for each fold, then {how}, with {SCOPE} in the place"
            )
        if generator.trained_on is None:
            raise ValueError(f"generators: {name} does not say what it was trained on, so nobody knows whether it saw the test part: {how}")
        if folds and generator.trained_on != NOTHING and not (SCOPE in generator.data and SCOPE in generator.trained_on):
            raise ValueError(
                f"generators: {name} was trained on images of this data once, and each of {folds} folds holds out some of them: teach it anew for each, "
                f"and write {SCOPE} into data and trained_on where split, fold-0 … fold-{folds - 1} stand in their places"
            )
        if config.label_by == "prompt":
            raise ValueError(f"generators: {name} had no prompt of this run, and what its images are called is not believed: label_by=measure, teacher or hand")


def _somewhere(place: str) -> str:
    """What science knows of a generator's place: whether it differs by scope. What is there is frozen in the run."""
    return place if place == NOTHING else f"{FILES}/{SCOPE}" if SCOPE in place else FILES


def names(kind: str = "") -> list[str]:
    """The configurations that come with the program and describe a run, or those in the folder `kind`: clusters."""
    folder = CONFIGS / kind
    found = [file.relative_to(folder).with_suffix("") for file in folder.rglob("*.yaml")]
    return sorted(name.as_posix() for name in found if name.parts[0] not in ("base", "clusters", "ray", "search", "studies"))


def find(name: str, kind: str = "") -> Path:
    """The YAML file that `name` means: a path, or the name of a packaged configuration of this `kind`."""
    for file in (Path(name), CONFIGS / kind / f"{name}.yaml"):
        if file.suffix in (".yaml", ".yml") and file.is_file():
            return file
    what = {"studies": "study", "clusters": "site"}.get(kind, "configuration")
    raise ConfigError(f"no {what} {name!r}: {_meant(name, kind)}give a YAML file or one of {', '.join(names(kind))}")


def _meant(name: str, kind: str) -> str:
    """What `name` is instead, and the command that takes it."""
    place = Path(name).expanduser()
    if kind == "" and (CONFIGS / "studies" / f"{name}.yaml").is_file():
        return f"it is a study, so: vhs study {name}. Or "
    if kind == "studies" and (CONFIGS / f"{name}.yaml").is_file():
        return f"it is the configuration of a run, so: vhs run {name}. Or "
    if kind == "" and (place / "plan.json").is_file():
        return f"it is a run, which goes on with the CONFIG that it began with: vhs run CONFIG --out {name}; vhs status {name} says where it is. Or "
    if kind == "" and ("://" in name or place.is_dir() or (place.is_file() and place.suffix.lower() in (".csv", ".tar", ".txt"))):
        return f"it is data, for which vhs init {name} --out mine.yaml writes a configuration. Or "
    return ""


def read(name: str, overrides: list[str], model: type[BaseModel]):
    """YAML file + `a.b=value` overrides -> a validated `model`. ConfigError names the key, the value and the legal ones."""
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        written = _written(find(name))
        values = merged(written, overrides)
    except (OmegaConfBaseException, YAMLError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{name}: {credentials.without_keys(str(error))}") from None
    _refuse_another_kind(name, values, model)
    return validated(values, model)


def merged(values, overrides: list[str]) -> dict:
    """`values`, a mapping or what OmegaConf made of one, with each `a.b=value` of `overrides` in it. ConfigError for one that cannot be read."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    changed = []
    for item in overrides:
        if not item.partition("=")[0].strip() or "=" not in item:
            raise ConfigError(f"{item!r} is no override: write key=value, for example classifier.epochs=20")
        try:
            changed.append(OmegaConf.from_dotlist([item]))
        except (OmegaConfBaseException, YAMLError, ValueError) as error:
            why = getattr(error, "problem", None) or str(error).partition("\n")[0]
            raise ConfigError(
                f"{credentials.without_keys(repr(item))} cannot be read ({why}): close what is opened, brackets and quotes, and quote "
                "the whole for the shell where it has spaces: 'arms=[real, real-matched, mixed]'"
            ) from None
    # values only: ${...} stays what it is, for it could take a key from the environment into the plan
    return OmegaConf.to_container(OmegaConf.merge(values, *changed), resolve=False)


def _refuse_another_kind(name: str, values: dict, model: type[BaseModel]):
    """ConfigError for a file that lacks what a `model` needs and has what it does not know: its author meant another command."""
    lacking = [key for key, field in model.model_fields.items() if field.is_required() and key not in values]
    unknown = [str(key) for key in values if key not in model.model_fields]
    if lacking and unknown:
        looks = next((f"It looks like {kind.format(name)}" for key, kind in KINDS.items() if key in values), "vhs init DATA writes a run's configuration")
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise ConfigError(
            f"{name} is another kind of file than is wanted here: it has no {' and no '.join(lacking)}, and nobody knows its {', '.join(unknown[:3])}{more}. "
            + looks
        )


def _written(file: Path):
    """The YAML in `file`. ValueError for one that is longer than any configuration, or that repeats parts of itself, which a few lines do a billion times."""
    import yaml
    from omegaconf import OmegaConf

    data = file.read_bytes()
    if len(data) > FILE_BYTES:
        raise ValueError(f"{len(data)} bytes, a configuration has at most {FILE_BYTES}")
    events = list(yaml.parse(data, yaml.SafeLoader))
    if any(isinstance(event, yaml.AliasEvent) for event in events):
        raise ValueError("an alias (*name) repeats a part of the file; write the values out")
    if not any(isinstance(event, yaml.MappingStartEvent) for event in events[2:3]):  # after the stream's and the document's beginning
        raise ValueError("holds no keys: write `name: …`, `view: …`, one a line")
    return OmegaConf.create(data.decode())


def validated(values: dict, model: type[BaseModel]):
    """`values` as a `model`. ConfigError names the key, the value and the legal ones."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain(error, model)) from None


def load(name: str, overrides: list[str] = ()) -> Config:
    """The run configuration `name` with `overrides`."""
    return read(name, list(overrides), Config)


def changed(old: dict, new: dict, prefix: str = "") -> list[str]:
    """Dotted keys whose values differ between two science dictionaries."""
    keys = []
    for key in sorted(set(old) | set(new)):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            keys += changed(a, b, f"{prefix}{key}.")
        elif a != b:
            keys.append(f"{prefix}{key}")
    return keys
