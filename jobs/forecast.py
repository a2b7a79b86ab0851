"""`vhs run CONFIG --dry-run`: what a run would do, how long, with how much, and what its test could show. No torch, nothing written.

Amounts follow from the configuration and the data (or `expect`, where the data is elsewhere). Hours are operations over stated rates (jobs/rates.py),
corrected stage by stage by what a run has measured: `--calibrate RUN`, or the run's own folder.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

from jobs import generators, makespan, models, rates, status
from jobs.config import Config, ConfigError
from jobs.data import is_here
from jobs.makespan import Block
from jobs.plan import Run
from vhs.arms import UNTRAINED
from vhs.measure import CLASSES
from vhs.settings import Classifier, DreamBooth


@dataclass(frozen=True)
class Sizes:
    """Images by part, and where these numbers come from. `judged`: test images whose class is known; `sources`: scanners or clinics."""

    train: int
    valid: int
    test: int
    judged: int
    sources: int
    unusable: int
    said: str

    @property
    def images(self) -> int:
        return self.train + self.valid + self.test


LIGHT = ("ingest", "split", "report")  # stages that open no model
SHARDED = ("ingest", "priors", "generate")  # stages whose units are a shard each


@dataclass(frozen=True)
class Row:
    """One stage. Device seconds are of all units one after the other; None where a model is not in the tables of jobs/rates.py. `start_s` of them
    each unit takes before it works. `parts`: what each unit has of the rest, relative; none: all the same."""

    stage: str
    units: int
    images: int = 0
    steps: int = 0
    gb: float | None = 0.0
    seconds: float | None = 0.0
    memory_gb: float | None = 0.5
    measured: bool = False
    start_s: float = 0.0
    parts: tuple[float, ...] = ()
    ranks: int = 1
    rounds: int = 1

    @property
    def blocks(self) -> list[Block]:
        """Its units between barriers, a block a round; none where its seconds are unknown."""
        if self.seconds is None:
            return []
        parts = self.parts or (1.0,) * self.units
        each = max(0.0, self.seconds - self.units * self.start_s) / max(1e-9, sum(parts))
        work, size = tuple(each * part for part in parts), self.units // self.rounds
        return [Block(self.stage, self.ranks, self.start_s, work[n * size : (n + 1) * size]) for n in range(self.rounds)]


@dataclass(frozen=True)
class Forecast:
    """The whole plan. `hours`: on this machine's workers, None where a stage's are unknown."""

    rows: list[Row]
    sizes: Sizes
    machine: rates.Machine
    side_by_side: int
    ceiling: int
    calibrated: str

    @property
    def hours(self) -> float | None:
        each = [self.stage_hours(row) for row in self.rows]
        return None if None in each else sum(each)

    def stage_hours(self, row: Row) -> float | None:
        return None if row.seconds is None else sum(block.wall_s(self.side_by_side) for block in row.blocks) / 3600

    @property
    def blocks(self) -> list[Block]:
        """What is between barriers, in order, of all stages whose seconds are known: generation and labelling alternate, round by round."""
        by_stage, blocks = {row.stage: row.blocks for row in self.rows}, []
        for stage in by_stage:
            if stage == "generate":
                blocks += [block for pair in zip_longest(by_stage["generate"], by_stage["label"]) for block in pair if block]
            elif stage != "label":
                blocks += by_stage[stage]
        return blocks

    @property
    def unknown(self) -> list[str]:
        """Stages whose seconds are not known."""
        return [row.stage for row in self.rows if row.seconds is None]


def forecast(config: Config, sizes: Sizes, calibrate: Run | None = None) -> Forecast:
    """What `config` would do with data of these `sizes`. `calibrate`: a run whose finished units tell this machine's real rates."""
    machine = device(config)
    accepted, factors, peaks, pixel = rates.ACCEPTED, {}, {}, rates.PNG_BYTES_PER_PIXEL
    if calibrate:
        accepted, factors, peaks, pixel = _measured(calibrate, machine)
    planned, ceiling = _rows(config, sizes, machine, accepted, pixel)
    if machine is rates.GPU:
        peaks = {}  # what is recorded is the host's memory
    rows = [
        replace(
            row,
            seconds=row.seconds and row.seconds * factors.get(row.stage, 1),
            start_s=row.start_s * factors.get(row.stage, 1),
            memory_gb=peaks.get(row.stage, row.memory_gb),
            measured=row.stage in factors,
        )
        for row in planned
    ]
    side_by_side = config.execution.workers if machine is rates.CORE else 1  # workers share the one GPU
    return Forecast(rows, sizes, machine, side_by_side, ceiling, calibrate.url if factors else "")


def device(config: Config) -> rates.Machine:
    """The machine that is planned for: the configuration's device; with `auto` a GPU where its driver is installed."""
    wanted = config.execution.device
    return rates.GPU if wanted == "cuda" or (wanted == "auto" and shutil.which("nvidia-smi")) else rates.CORE


def ran_on(run: Run) -> rates.Machine:
    """The machine that `run` went on, as its class images tell it; before there are any, the one its configuration means here."""
    drawn = [run.marker(unit.marker).facts for unit in dict(run.named()).get("priors", []) if run.done(unit)]
    known = [facts["numerics"] for facts in drawn if "numerics" in facts]
    return device(run.config) if not known else rates.GPU if known[0]["cuda"] else rates.CORE


def sizes(config: Config, run: Run) -> Sizes:
    """Parts of the data as it is here, or as `expect` says. SourceError for unusable data, ConfigError where there is neither."""
    if not is_here(config.data):
        if not (expected := config.expect):
            raise ConfigError(f"data = {config.data!r} is not here: give data=FOLDER, or plan with expect={{train: N, valid: N, test: N}}")
        judged = expected.test if expected.judged is None else expected.judged
        return Sizes(expected.train, expected.valid, expected.test, judged, 1, 0, f"data not here ({config.data}), sizes as in expect")
    found = run.sources
    whole = [item for item in found if item.get("copy_of", item["file"]) == item["file"] and item.get("sha256", "") is not None]
    by = {part: [item for item in whole if item.get("split") == part] for part in ("train", "valid", "test")}
    labelled = [item for item in by["test"] if "phantom" in item or item.get("label") or item.get("points")]
    test, valid = len(by["test"]), len(by["valid"])
    judged = len(labelled)
    if not test:
        test = judged = round(len(whole) * config.split.test_fraction)
    valid = valid or round((len(whole) - test) * config.split.inner_fraction)
    said = f"{len(found)} images found" if config.data != "phantoms" else f"{len(found)} phantoms, drawn"
    sources = len({item.get("source") for item in whole})
    return Sizes(len(whole) - test - valid, valid, test, judged, sources, len(found) - len(whole), said)


def base(config: Config) -> rates.Diffusion | None:
    """What is known of the base model: by its UNet's shape in a folder, by its name on a hub."""
    file = Path(models.base(config)) / "unet" / "config.json"
    if file.is_file():
        return rates.DIFFUSION.get(tuple(json.loads(file.read_text())["block_out_channels"]))
    return rates.DIFFUSION[320, 640, 1280, 1280] if "stable-diffusion" in config.base.lower() and "xl" not in config.base.lower() else None


def _rows(config: Config, sizes: Sizes, machine: rates.Machine, accepted: float, pixel: float) -> tuple[list[Row], int]:
    """Every stage by stated rates; and the most images that may be generated."""
    scopes, gb = 1 + config.split.folds, config.resolution**2 * pixel / 1e9
    pool = sizes.train + sizes.valid
    shares, held = [sizes.train], [sizes.test]
    for _ in range(config.split.folds):
        held.append(round(pool / config.split.folds))
        shares.append(round((pool - held[-1]) * (1 - config.split.inner_fraction)))
    diffusion, generation = base(config), config.generation
    groups = len(CLASSES) * (sizes.sources if generation.by_source else 1)
    a_round, makers = generation.unit_images * generation.round_units, generators.wanted(config)
    rounds = _rounds(config, generation.quota, accepted)
    made, ceiling = scopes * groups * rounds * a_round, scopes * groups * generation.max_rounds * a_round * len(makers)  # made: by one generator
    # a set's size is not asked: as many of its images as would be drawn for its dose
    read = {name: scopes * len(CLASSES) * _rounds(config, generators.quota(config, name), accepted) * a_round for name in generators.outsiders(config)}
    mixed = min(groups * generation.quota, round(accepted * made / scopes))
    own = set(makers) - set(read)
    labelled, drawn = made * len(own) + sum(read.values()), made * len(own - set(generators.KNOWING))
    labelled_units, drawn_units = labelled // generation.unit_images, drawn // generation.unit_images
    schooled = scopes * (generators.DREAMBOOTH in makers)
    priors = config.priors.images if schooled else 0
    prompts = len({config.dreambooth.instance_prompt, *config.prompts.candidates}) if config.prompts.candidates else 0
    tried = schooled * prompts * len(CLASSES) * config.prompts.images
    trained, untrained = [arm for arm in config.arms if arm not in UNTRAINED], [arm for arm in config.arms if arm in UNTRAINED]
    seconds_of = _Clock(config, machine, diffusion)

    epoch_images = [share + (0 if arm == "real" else mixed) for share in shares for arm in trained for _ in config.seeds]  # as train lists its units
    steps_each = [config.classifier.epochs * math.ceil(n / config.classifier.batch) for n in epoch_images]
    steps, models_trained, trained_images = sum(steps_each), len(steps_each), sum(epoch_images) // len(config.seeds)
    judged = sum(held) * (len(trained) * len(config.seeds) + len(untrained))
    evaluations = models_trained + scopes * len(untrained)
    weights_gb = None if diffusion is None else (diffusion.unet.parameters_m + diffusion.rest_m) * 2e-3
    network = rates.CLASSIFIERS.get(config.classifier.model.partition(".")[0])
    classifier_gb = None if network is None else models_trained * network.parameters_m * 4e-3
    ingest_units = math.ceil(sizes.images / config.ingest.shard_images)
    memory, passes = _memory(config, diffusion, network), 3 if config.classifier.unfreeze == "all" else 2
    rows = [
        Row("ingest", ingest_units, sizes.images, 0, sizes.images * gb, sizes.images * rates.INGEST_S),
        Row("split", 1, sizes.images),
        Row("labeller", scopes, sum(shares), scopes * config.labeller.steps, scopes * 1e-3, seconds_of.labeller(scopes)),
        Row("priors", len(CLASSES) * bool(priors), priors, 0, priors * gb, seconds_of.drawing(config.priors, priors, 3)),
        Row(
            "dreambooth", scopes * len(makers), sum(shares) * bool(schooled), schooled * config.dreambooth.steps, weights_gb and schooled * weights_gb,
            seconds_of.dreambooth(schooled),
        ),
        Row("prompts", schooled * bool(tried), tried, 0, 0.0, seconds_of.drawing(generation, tried, schooled) if tried else 0.0),
        Row("generate", labelled_units, labelled, 0, labelled * gb, seconds_of.drawing(generation, drawn, drawn_units)),
        Row("label", labelled_units, labelled, 0, 0.0, seconds_of.measuring(labelled, labelled_units)),
        Row("train", models_trained, trained_images, steps, classifier_gb, seconds_of.classifying(network, steps, models_trained, passes)),
        Row("evaluate", evaluations, judged, 0, 0.0, seconds_of.classifying(network, judged / config.classifier.batch, evaluations, 1)),
        Row("report", 1, 0, 0, 0.01, 5.0),
    ]
    more = {
        "train": {"parts": tuple(map(float, steps_each)), "ranks": config.classifier.ranks},
        "evaluate": {"ranks": config.classifier.ranks},
        "labeller": {"ranks": config.labeller.ranks},
        "dreambooth": {"ranks": config.dreambooth.ranks},
        "generate": {"rounds": rounds},
        "label": {"rounds": rounds},
    }
    started = {stage: 0.0 if stage in LIGHT else machine.unit_s for stage in (row.stage for row in rows)}
    return [
        replace(row, memory_gb=memory.get(row.stage, row.memory_gb), start_s=started[row.stage], **more.get(row.stage, {})) for row in rows if row.units
    ], ceiling


def _rounds(config: Config, quota: int, accepted: float) -> int:
    """Rounds until `quota` images of a class are accepted, or the plan allows no more."""
    settings = config.generation
    return min(settings.max_rounds, math.ceil(quota / accepted / (settings.unit_images * settings.round_units)))


@dataclass(frozen=True)
class _Clock:
    """Device seconds of a stage at stated rates; a backward pass counts as two forward ones."""

    config: Config
    machine: rates.Machine
    diffusion: rates.Diffusion | None

    def labeller(self, units: int) -> float:
        images = units * self.config.labeller.steps * self.config.labeller.batch
        network, side = rates.KEYPOINTS, self.config.labeller.size_px
        return self._sum(units, images, 3 * images * network.gflop * network.at(side) / self.machine.gflops(network))

    def measuring(self, images: int, units: int) -> float:
        network, side = rates.KEYPOINTS, self.config.labeller.size_px
        work = images * (1 + self.config.labeller.passes) * network.gflop * network.at(side)
        return self._sum(units, images, work / self.machine.gflops(network))

    def drawing(self, settings, images: int, units: int) -> float | None:
        if self.diffusion is None:
            return None
        guided = 2 if settings.guidance > 1 else 1
        each = settings.steps * guided * self.diffusion.unet.gflop + self.diffusion.decode_gflop
        return self._sum(units, 0, images * each * self.diffusion.unet.at(self.config.resolution) / self.machine.diffusion_gflops)

    def dreambooth(self, units: int) -> float | None:
        if self.diffusion is None:
            return None
        settings = self.config.dreambooth
        images = settings.steps * settings.gradient_accumulation * settings.batch * (2 if settings.prior_loss_weight else 1)
        passes = 3 - bool(settings.lora_rank) + settings.gradient_checkpointing
        each = passes * self.diffusion.unet.gflop + (0 if settings.cache_latents else self.diffusion.encode_gflop)
        return self._sum(units, 0, units * images * each * self.diffusion.unet.at(self.config.resolution) / self.machine.diffusion_gflops)

    def classifying(self, network: rates.Network | None, steps: float, units: int, passes: int) -> float | None:
        if network is None:
            return None
        images = steps * self.config.classifier.batch
        work = passes * images * network.gflop * network.at(self.config.classifier.size_px)
        return self._sum(units, images, work / self.machine.gflops(network))

    def _sum(self, units: int, images: float, device_s: float) -> float:
        read_s = images * self.machine.image_s  # beside a GPU, before a CPU's own work
        return units * self.machine.unit_s + (max(read_s, device_s) if self.machine is rates.GPU else read_s + device_s)


def _memory(config: Config, diffusion: rates.Diffusion | None, network: rates.Network | None) -> dict[str, float | None]:
    """Gigabytes of the largest process of a stage: weights, gradients and Adam's two averages, activations; an estimate."""
    found: dict[str, float | None] = dict.fromkeys(("priors", "dreambooth", "generate", "train", "evaluate"))
    if diffusion:
        unet, area, settings = diffusion.unet, diffusion.unet.at(config.resolution), config.dreambooth
        all_m = unet.parameters_m + diffusion.rest_m
        for stage, batch in (("priors", config.priors.batch), ("prompts", config.generation.batch), ("generate", config.generation.batch)):
            found[stage] = rates.PROCESS_GB + all_m * 4e-3 + batch * area * unet.activations_gb / 8
        state = 0 if settings.lora_rank else _state_bytes(settings) if settings.optimizer == "adamw" else 6
        half = 0.5 if settings.mixed_precision != "no" else 1
        images = settings.batch * (2 if settings.prior_loss_weight else 1) * half / (4 if settings.gradient_checkpointing else 1)
        found["dreambooth"] = rates.PROCESS_GB + (all_m * 4 + unet.parameters_m * state) * 1e-3 + images * area * unet.activations_gb
    if network:
        half = 0.5 if config.classifier.mixed_precision != "no" else 1
        kept = 1 if config.classifier.unfreeze == "all" else 0.3  # a frozen body keeps no activations
        images = config.classifier.batch * network.at(config.classifier.size_px) * network.activations_gb * kept
        found["train"] = rates.PROCESS_GB + network.parameters_m * (4 + _state_bytes(config.classifier)) * 1e-3 + images * half
        found["evaluate"] = rates.PROCESS_GB + network.parameters_m * 4e-3 + images / 8
    return found | {"labeller": rates.PROCESS_GB, "label": rates.PROCESS_GB}


def _state_bytes(settings: DreamBooth | Classifier) -> float:
    """What a rank keeps in training of each weight beside itself: gradient, Adam's averages, and where they are shared out, another copy of it."""
    return 16 / settings.ranks if settings.sharding else 12


def _measured(run: Run, machine: rates.Machine) -> tuple[float, dict[str, float], dict[str, float], float]:
    """From a run's records: share accepted; for each stage, device seconds over what was stated for them; peaks; bytes a pixel."""
    if (there := ran_on(run)) is not machine:
        mend = "execution.device=cpu plans for cores" if there is rates.CORE else "execution.device=cuda plans for GPUs"
        raise ConfigError(f"--calibrate {run.url} was planned for {there.name}, this configuration is for {machine.name}: {mend}")
    spent = status.costs(run)
    counts = [count for place, count in status.generation(run).items() if "/" not in place]  # of the run's own generator
    produced, kept = sum(count["produced"] for count in counts), sum(count["accepted"] for count in counts)
    stated, _ = _rows(run.config, sizes(run.config, run), machine, rates.ACCEPTED, rates.PNG_BYTES_PER_PIXEL)
    factors = {}
    for cost in spent:
        row = next(row for row in stated if row.stage == cost.stage)
        if row.seconds:
            took = cost.core_seconds if machine is rates.CORE else cost.seconds * row.ranks
            factors[cost.stage] = took / cost.units / (row.seconds / row.units)
    stored = [run.storage.size(name) for name in run.under("real/") if name.endswith(".tar")]
    images = sum(run.marker(unit.marker).facts["images"] for unit in dict(run.named()).get("ingest", []) if run.done(unit))
    pixel = sum(stored) / images / run.config.resolution**2 if images else rates.PNG_BYTES_PER_PIXEL
    return max(0.05, kept / produced) if produced else rates.ACCEPTED, factors, {cost.stage: cost.peak_gb for cost in spent}, pixel


def notes(planned: Forecast) -> list[str]:
    """What to know beside the table, a sentence each."""
    sizes = planned.sizes
    said = [f"{sizes.said}: {sizes.train} training, {sizes.valid} inner validation, {sizes.test} test, of {sizes.sources} source{'s' * (sizes.sources > 1)}"]
    if sizes.unusable:
        said.append(f"{sizes.unusable} files cannot be used (copies, or not there)")
    said.append(f"generate is planned until the quota is met; at most {planned.ceiling} images in all")
    said.append(
        f"hours: {planned.machine.name}{f', {planned.side_by_side} units side by side' if planned.side_by_side > 1 else ''}; stated rates are jobs/rates.py's"
        + (f", measured ones {planned.calibrated}'s" if planned.calibrated else ", to be corrected with --calibrate RUN")
    )
    if planned.hours is None:
        said.append("unknown: a model that jobs/rates.py does not list; the total leaves it out")
    return said


def scaled(planned: Forecast, counts: list[int]) -> list[str]:
    """What to know beside the hours on several numbers of devices, a sentence each."""
    blocks, word = planned.blocks, planned.machine.plural
    longest: dict[tuple[str, float], int] = {}
    for block in blocks:
        if block.longest_s >= 1:
            longest[block.stage, round(block.longest_s)] = longest.get((block.stage, round(block.longest_s)), 0) + 1
    path = ", ".join(f"{stage} {seconds / 3600:.2f} h" + f" x {rounds} rounds" * (rounds > 1) for (stage, seconds), rounds in longest.items())
    started = sum(block.start_s * len(block.work_s) for block in blocks) / 3600
    said = [
        f"cannot be parallel: the longest unit of each stage and round, one after the other: {path}: {sum(b.longest_s for b in blocks) / 3600:.2f} h",
        f"from {makespan.enough(blocks)} {word} on nothing gets faster",
        f"hours at work hold {started:.2f} of start-up; a stage waits for the one before, a unit is not divided, one of several ranks takes as many {word}",
        "left out: time in a queue, what ranks tell each other, storage that more readers slow down",
    ]
    if short := {row.stage: row.ranks for row in planned.rows if row.ranks > min(counts)}:
        said.append(f"on fewer {word} than a unit has ranks they share them: {', '.join(f'{stage} has {ranks}' for stage, ranks in short.items())}")
    if planned.unknown:
        said.append(f"without {', '.join(planned.unknown)}: a model that jobs/rates.py does not list")
    return said


def detectable(sizes: Sizes, folds: int) -> list[str]:
    """What the tests can show, a sentence each: the difference that is found four times in five, were trainings all alike and each image its own patient."""
    from vhs.metrics import minimum_detectable

    said = []
    for what, count in (("test part", sizes.judged), ("folds together", (sizes.train + sizes.valid) * bool(folds))):
        if count:
            smallest = 100 * minimum_detectable(count, rates.DISCORDANCE)
            said.append(
                f"the {what}, {count} images, can at best find a difference of {smallest:.1f} points four times in five, if the arms disagree on "
                f"{rates.DISCORDANCE:.0%}"
            )
    if sizes.test and not sizes.judged:
        said.append(f"the {sizes.test} test images carry no labels: nothing can be judged on them")
    return said
