"""What a run could not use, looked up before it begins: its dry run and its real start ask the same here, and hear all of it at once.

Nothing is written, no image decoded, no model opened: what only shows then (damaged weights, a hub that does not answer) is said where it is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jobs import generators, models, outputs, rates, scheduler
from jobs.config import PHANTOMS, Config, ConfigError
from jobs.data import is_here
from jobs.plan import Run
from vhs.arms import UNTRAINED
from vhs.sources import SourceError


@dataclass(frozen=True)
class Place:
    """How a run is started. `planned`: this is a dry run, which may be meant for a machine that has what this one lacks: where the data is away, and,
    as to GPUs, where their number is given (`gpus`)."""

    on: str = "local"
    cluster: str | None = None
    planned: bool = False
    gpus: bool = False


def refuse(run: Run, place: Place, scope: str | None = None) -> None:
    """ConfigError, with everything found, where `run` (new or begun) could not come to its end as it is about to be started."""
    _raise(list(_found(run, place, scope)), run.config.name)


def refuse_place(on: str, cluster: str | None) -> None:
    """ConfigError where units cannot run `on` there: no such site, no SLURM or Ray to be seen from here."""
    _raise([*_site(on, cluster), *_dispatcher(on)], f"--on {on}")


def _raise(found: list[str], what: str) -> None:
    if found:
        several = f"{what}: {len(found)} things would stop it\n- "
        raise ConfigError(several * (len(found) > 1) + "\n- ".join(found))


def _found(run: Run, place: Place, scope: str | None) -> Iterator[str]:
    config = run.config
    away = place.planned and not is_here(config.data)
    yield from _scope(config, scope)
    yield from _site(place.on, place.cluster)
    yield from _architecture(config)
    if not away:
        yield from _dispatcher(place.on)
        yield from _out(run)
        yield from _weights(config)
        if place.on == "local" and not place.gpus:
            yield from _gpu(config)
        if "plan.json" not in run.names:  # later the data may be away
            yield from _data(run)


def _said(check, *arguments) -> Iterator[str]:
    """What `check` raises for the user, as a word."""
    try:
        check(*arguments)
    except (ConfigError, SourceError, ValueError, OSError) as error:
        yield str(error)


def _scope(config: Config, scope: str | None) -> Iterator[str]:
    if scope is None:
        return
    from vhs.split import scopes

    if scope not in (planned := scopes(config.split)):
        yield f"--scope {scope}: the plan's scopes are {', '.join(planned)}"


def _site(on: str, cluster: str | None) -> Iterator[str]:
    from jobs.site import Site

    if on == "slurm":
        yield from _said(Site.load, cluster)


def _dispatcher(on: str) -> Iterator[str]:
    """Whether what takes the units can be reached from here."""
    if on == "slurm" and (absent := scheduler.absent()):
        yield f"--on slurm: {absent}"
    if on == "ray":
        yield from _said(_find_ray)


def _find_ray() -> None:
    import ray

    from jobs import actors

    actors.reach()
    ray.shutdown()


def _out(run: Run) -> Iterator[str]:
    if run.storage.url.startswith("file:"):  # a store is asked by Storage.prove
        yield from _said(outputs.folder, "--out", run.storage.shared)


def _architecture(config: Config) -> Iterator[str]:
    name = config.classifier.model
    if _trains(config) and name not in rates.CLASSIFIERS:  # those are known without timm, which takes seconds to import
        from vhs.networks import check_known

        yield from _said(check_known, name)


def _weights(config: Config) -> Iterator[str]:
    """Models that lie in folders."""
    yield from _said(models.check_labeller, config)
    yield from _said(models.base, config)
    yield from _said(models.check_classifier, config)
    if (file := config.report.inception) and "://" not in file and not Path(file).is_file():
        yield f"report.inception = {file!r} is no file: give pytorch-fid's pt_inception-2015-12-05-6726825d.pth, or null"


def _trains(config: Config) -> bool:
    return any(arm not in UNTRAINED for arm in config.arms)


def _gpu(config: Config) -> Iterator[str]:
    """Settings that only a GPU can serve, each with the value that does without one."""
    teaches = generators.DREAMBOOTH in generators.wanted(config)
    needed = {
        "dreambooth.optimizer=adamw": teaches and config.dreambooth.optimizer == "adamw_8bit",
        "dreambooth.mixed_precision=no": teaches and config.dreambooth.mixed_precision == "fp16",
        "classifier.mixed_precision=no": _trains(config) and config.classifier.mixed_precision == "fp16",
    }
    without = [instead for instead, needs in needed.items() if needs]
    if config.execution.device == "cpu" and without:
        yield f"execution.device = cpu, and only a GPU serves other than {', '.join(without)}: set these, or execution.device=auto"
    if config.execution.device == "cuda":
        without.insert(0, "execution.device=auto")
    if config.execution.device != "cpu" and without:
        import torch

        if not torch.cuda.is_available():
            yield (
                f"torch sees no GPU here: set {', '.join(without)}; check CUDA_VISIBLE_DEVICES and the driver; or where the run is meant for GPUs elsewhere, "
                "--on slurm or ray starts it there, and --dry-run --gpus 1 plans for one"
            )


def _data(run: Run) -> Iterator[str]:
    """The data as they are listed, and whether they can be shared out as the split asks."""
    try:
        listed = run.sources
    except SourceError as error:
        yield str(error)
        return
    import pandas as pd

    from vhs.measure import UNKNOWN
    from vhs.split import check

    rows = [
        {
            "key": (source.get("sha256") or source["file"])[:16],
            "patient": source.get("patient"),
            "source": source.get("source") or run.config.ingest.source,
            "label": _label(source, run.config),
            "split": source.get("split"),
        }
        for source in listed
        if not source.get("reject")
    ]
    if rows := [row for row in rows if row["label"] != UNKNOWN or row["split"] == "test"]:
        yield from _said(check, pd.DataFrame(rows), run.config.split)


def _label(source: dict, config: Config) -> int:
    if config.data != PHANTOMS:
        from vhs.sources.label import foreseen

        return foreseen(source, config.measure)
    from vhs.phantom import drawn_index

    return int(config.measure.classify(drawn_index(config.view, config.phantoms.style, source["phantom"], config.phantoms.class_prior)))
