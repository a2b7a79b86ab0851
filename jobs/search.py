"""`vhs tune`: the hyper-parameters of a run's classifier, searched by Ray Tune's ASHA, each arm by itself and all with the same trials.

RUN/tune/NAME/<identity>.json is a finished trial, committed once: the same command goes on with those that are missing. RUN/tune/NAME.json is the
table of all, made anew from them. Nothing in a run reads either; the report shows the table.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path

from jobs import actors, drive, trial
from jobs.config import ConfigError, changed
from jobs.dispatch import Outcome
from jobs.plan import PlanError, Run
from jobs.trial import Trial
from jobs.unit import Unit
from shards.credentials import without_keys
from shards.storage import TEMPORARY, Storage
from vhs import tuning
from vhs.tuning import METRICS, Search

ROW = ("epoch", "validation_loss", "validation_accuracy", "share", "seconds", "node", "real", "generated", "diverged")  # what a trial says of an epoch


def arms(run: Run) -> dict[str, Unit]:
    """The arms that can be searched, each with the unit that trains it. PlanError where the run is not one to search in."""
    if run.config.split.folds:
        raise PlanError(
            f"{run.url} has {run.config.split.folds} folds: each of its training images is in one whose figures are reported, so none is left to search "
            "with. Search in a run with split.folds=0 (--out NEW --reuse RUN), where the test split stays closed"
        )
    left = drive.frontier(run)
    if left and drive.reaches(left[0], "label"):
        raise PlanError(
            f"{run.url} has {len(left[1])} units of {left[0]} to do: a search needs its generated images, labelled. First: vhs stage label {run.url}"
        )
    drive.check_judged(run)
    return {unit.params["arm"]: unit for unit in run.units("train") if unit.params["seed"] == run.config.seeds[0]}


def trials(run: Run, space: Search, wanted: list[str], count: int) -> list[Trial]:
    """`count` trials of each arm in `wanted`, arm beside arm. ConfigError for an arm that the run does not train."""
    units = arms(run)
    if unknown := [arm for arm in wanted if arm not in units]:
        raise ConfigError(f"--arms {','.join(wanted)}: {', '.join(unknown)} is not trained in {run.url}; legal are {', '.join(units)}")
    drawn = tuning.draw(space, count, run.config.seeds[0])
    return [trial.make(run.config, arm, units[arm], number, settings) for number, settings in enumerate(drawn) for arm in dict.fromkeys(wanted)]


def search(run: Run, space: Search, wanted: list[str], count: int, name: str, on: str, show: drive.Show) -> dict:
    """Finish `count` trials of each arm in `wanted` and write the table -> the table, with what it had of other arms and further trials.

    PlanError if `name` is another space's, or as `arms` has it; ConfigError as `trials` has it; RuntimeError if trials failed.
    """
    records = {_record(name, one): one for one in trials(run, space, wanted, count)}
    said, path = {"space": space.model_dump(mode="json"), "best": {}, "trials": []}, f"tune/{name}.json"
    before = json.loads(run.storage.read(path)) if run.storage.exists(path) else said
    if keys := changed(before["space"], said["space"]):
        raise PlanError(f"{path} was searched in another space: {', '.join(keys)} differ. Keep both: --name ANOTHER")
    run.storage.put(path, _encoded(before))
    show.stage("trials", len(missing := _missing(run.storage, records)), len(records) - len(missing))
    if missing:
        unfinished = {one.arm for one in missing.values()}  # with them the finished ones of their arms, told again: ASHA compares with all
        with actors.Actors(run.config) if on == "ray" else _ray_here(run.config):
            errors = _tune(run, space, {record: one for record, one in records.items() if one.arm in unfinished}, show)
        if missing := _missing(run.storage, records):
            reasons = "\n  ".join(sorted(set(errors))) or "Ray Tune ended early"
            more = f"Tracebacks are in {run.url}/state/tune. The same command tries again."
            raise RuntimeError(f"{len(missing)} of {len(records)} trials failed:\n  {reasons}\n{more}")
    most = max([count, *(one["number"] + 1 for one in before["trials"])])
    known = sorted((_record(name, one) for one in trials(run, space, list(arms(run)), most)), key=lambda record: record not in records)
    found = [json.loads(run.storage.read(record)) for record in known if run.storage.exists(record)]
    table = said | {"best": _best(found, space.metric), "trials": found}
    run.storage.put(path, _encoded(table))
    return table


def tables(run: Run) -> dict[str, dict]:
    """The finished searches of a run: name -> table."""
    names = [name for name in sorted(run.names) if name.startswith("tune/") and name.count("/") == 1]
    found = {name.removeprefix("tune/").removesuffix(".json"): json.loads(run.storage.read(name)) for name in names}
    return {name: table for name, table in found.items() if table["trials"]}


def shown(run: Run, page: bytes) -> bytes:
    """The report's page with a section for each finished search of the run."""
    from vhs import report

    for name, table in tables(run).items():
        best = {arm: overrides(run.config, one["settings"]) for arm, one in table["best"].items()}
        page = report.with_search(page.decode(), name, table, best).encode()
    return page


def overrides(config, settings: dict) -> str:
    """A trial's settings as they are typed behind `vhs run CONFIG`."""
    return " ".join(f"{key}={value}" for key, value in tuning.Settings(**settings).overrides(config.generation.quota).items())


def _encoded(value: dict) -> bytes:
    return json.dumps(value, indent=1).encode()


def _record(name: str, one: Trial) -> str:
    return f"tune/{name}/{one.unit.identity}.json"


def _missing(storage: Storage, records: dict[str, Trial]) -> dict[str, Trial]:
    return {record: one for record, one in records.items() if not storage.exists(record)}


def _best(found: list[dict], metric: str) -> dict[str, dict]:
    """The best whole trial of each arm; a tie goes to the other metric, then to the first."""
    whole = [one for one in found if one["state"] == "whole"]
    arms = dict.fromkeys(one["arm"] for one in whole)
    return {arm: max((one for one in whole if one["arm"] == arm), key=lambda one: tuning.standing(one, metric)) for arm in arms}


def _result(one: Trial, epochs: list[dict]) -> dict:
    """What is kept of a finished trial. Its score is that of the weights it would have kept: of the last epoch, or of that with the least loss."""
    judged = [row for row in epochs if "diverged" not in row]
    best_inner = one.config["classifier"]["keep"] == "best_inner"
    kept = (min(judged, key=lambda row: row["validation_loss"]) if best_inner else judged[-1]) if judged else {}
    state = "diverged" if len(judged) < len(epochs) else "whole" if len(judged) == one.settings.epochs else "stopped"
    return {
        "identity": one.unit.identity, "arm": one.arm, "number": one.number, "settings": asdict(one.settings), "state": state,
        "score": {name: kept.get(name) for name in METRICS}, **{name: epochs[-1].get(name) for name in ("seconds", "node", "real", "generated")},
        "epochs": epochs,
    }  # fmt: skip


def _tune(run: Run, space: Search, records: dict[str, Trial], show: drive.Show) -> list[str]:
    """Put the trials through Ray Tune; each is committed to its record when it ends -> what went wrong, a line for each trial that failed."""
    os.environ.update(TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1", TUNE_DISABLE_SIGINT_HANDLER="1", RAY_CHDIR_TO_TRIAL_DIR="0", RAY_AIR_NEW_OUTPUT="0")
    import ray
    from ray import tune

    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # one display a run: ours; tracebacks are kept below
    config = run.config
    scratch = run.storage.shared / TEMPORARY / f"tune-{os.getpid()}"  # every node sees it
    share = {"cpu": config.threads, "gpu": min(1, int(ray.cluster_resources().get("GPU", 0)))}
    try:
        tuner = tune.Tuner(
            tune.with_resources(partial(_perform, run.storage.url, records), share),
            param_space={"record": tune.grid_search(list(records))},
            tune_config=tune.TuneConfig(scheduler=_halving(space, {record: one.arm for record, one in records.items()}), reuse_actors=True),
            run_config=tune.RunConfig(
                name="trials", storage_path=str(scratch), callbacks=[_bookkeeping(run.storage, records, show)], verbose=0,
                failure_config=tune.FailureConfig(max_failures=config.execution.tries - 1),
            ),
        )  # fmt: skip
        failed = {result.config["record"]: without_keys(str(result.error).strip()) for result in tuner.fit() if result.error}
        for record, traceback in failed.items():
            run.storage.put(f"state/tune/{records[record].unit.identity}.txt", traceback.encode())
        return [traceback.splitlines()[-1] for traceback in failed.values()]
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _perform(url: str, records: dict[str, Trial], chosen: dict):
    from ray import tune

    trial.perform(url, chosen["record"], records[chosen["record"]], tune.report)


def _halving(space: Search, arms: dict[str, str]):
    """ASHA for each arm by itself: an arm that is worse than another loses no more of its trials than that one. `arms`: record -> arm."""
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

    options = {"time_attr": "share", "max_t": 1, "grace_period": space.grace, "reduction_factor": space.reduction}
    by_arm = {arm: ASHAScheduler(metric=space.metric, mode=METRICS[space.metric], **options) for arm in set(arms.values())}

    def of(one) -> ASHAScheduler:
        return by_arm[arms[one.config["record"]]]

    class ByArm(FIFOScheduler):
        def on_trial_add(self, controller, one):
            of(one).on_trial_add(controller, one)

        def on_trial_result(self, controller, one, result):
            return of(one).on_trial_result(controller, one, result)

        def on_trial_complete(self, controller, one, result):
            of(one).on_trial_complete(controller, one, result)

        def on_trial_remove(self, controller, one):
            of(one).on_trial_remove(controller, one)

    return ByArm()


def _bookkeeping(storage: Storage, records: dict[str, Trial], show: drive.Show):
    """Collects what trials say, commits those that end, and tells `show`."""
    from ray.tune import Callback

    class Bookkeeping(Callback):
        def __init__(self):
            self._epochs: dict[str, list[dict]] = {}

        def __reduce__(self):  # Tune writes down how to take up a search of its own; ours is taken up from the records
            return Callback, ()

        def on_trial_result(self, iteration, trials, trial, result, **info):
            row = {name: result[name] for name in ROW if name in result}
            if row.get("epoch") == 1:  # begun, or begun anew after its node was lost
                self._epochs[trial.config["record"]] = []
            self._epochs.setdefault(trial.config["record"], []).append(row)
            one = records[trial.config["record"]]
            show.step(one.name, row.get("epoch", 0), one.settings.epochs, {name: row[name] for name in METRICS if name in row})

        def on_trial_complete(self, iteration, trials, trial, **info):
            record, one = trial.config["record"], records[trial.config["record"]]
            if storage.commit(record, _encoded(_result(one, self._epochs[record]))):
                storage.delete(f"state/tune/{one.unit.identity}.txt")
                show.outcome(Outcome(one.unit, "done"))

    return Bookkeeping()


@contextmanager
def _ray_here(config) -> Iterator[None]:
    """A Ray of our own on this machine, on loopback, for this process alone: `execution.workers` trials side by side."""
    with tempfile.TemporaryDirectory(prefix="vhs-ray-", ignore_cleanup_errors=True) as folder:
        token = Path(folder, "token")
        token.touch(0o600)
        token.write_text(secrets.token_hex(32))
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token))
        import ray  # which reads them once

        try:
            ray.init(
                address="local", num_cpus=config.execution.workers * config.threads, include_dashboard=False, log_to_driver=False,
                logging_level="ERROR", _temp_dir=folder, _node_ip_address="127.0.0.1",
            )  # fmt: skip
            yield
        finally:
            ray.shutdown()
