"""The command line. Nothing heavy is imported until a command needs it: `vhs --help` answers without torch."""

from __future__ import annotations

import os
from typing import Annotated, Optional
from urllib.parse import unquote

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table as Grid

from jobs import elsewhere, tools, upkeep, world
from jobs.bench import commands as bench
from jobs.console import console, drive
from jobs.elsewhere import RunArgument
from jobs.tools import Overrides

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Does generating radiographs help when few are labelled? Fine-tune, generate, measure, train, compare: one config, one answer with an interval.\n\n"
    "Start with **vhs run demo**. Research use, not for diagnosis.",
)


@app.command()
def run(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="A YAML file, or the name of one that comes with vhs: demo, ctr, ctr-cv, dogheart, one_gpu, paper, debug/…")
    ],
    overrides: Overrides = None,
    out: Annotated[Optional[str], typer.Option(help="The run's folder; default runs/CONFIG. The same folder again resumes.")] = None,
    on: elsewhere.On = "local",
    cluster: elsewhere.Cluster = None,
    detach: elsewhere.Detach = False,
    reuse: Annotated[
        Optional[str], typer.Option(help="Another run whose finished units are taken over where they are the same work.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the config; say stages, units, images, bytes, hours, memory and what the test can show.")
    ] = False,
    calibrate: Annotated[
        Optional[str], typer.Option(metavar="RUN", help="With --dry-run: a run on this machine whose measured rates replace the stated ones.")
    ] = None,
    gpus: Annotated[
        Optional[str], typer.Option(metavar="N,N…", help="With --dry-run: wall time and GPU-hours on so many GPUs (cores, where execution.device is cpu).")
    ] = None,
    scope: Annotated[
        Optional[str],
        typer.Option(help="Only this experiment of the plan, up to its predictions: split, fold-0, fold-1 … The report waits for all."),
    ] = None,
):
    """Run the whole pipeline, or go on with it: the same command again resumes.

    Example: vhs run ctr data=my/radiographs --out runs/mine

    Before days of work: vhs run paper --dry-run --calibrate runs/mine --gpus 8,64,512
    """
    from jobs import config as configuration
    from jobs import overview, plan, preflight
    from jobs.data import is_here, open_data
    from jobs.dry_run import dry_run as dry_run_of

    settings = configuration.load(config, overrides or [])
    settings.refuse_sealed()
    if gpus and not dry_run:
        raise configuration.ConfigError(f"--gpus {gpus}: only a dry run plans for numbers of GPUs; add --dry-run")
    if dry_run and scope:
        raise configuration.ConfigError(f"--scope {scope}: a dry run plans every scope; leave one of the two out")
    cluster = elsewhere.site(on, cluster)
    out = out or f"runs/{settings.name}"
    if reuse:
        plan.read_plan(reuse)
    world.set_environment(settings.threads)
    opened = plan.Run(out, settings, read_only=dry_run)
    if settings.data != "phantoms" and is_here(settings.data) and "plan.json" not in opened.names:  # later the data may be away
        console.print(f"data: {open_data(settings.data).layout()}", markup=False, soft_wrap=True)
    preflight.refuse(opened, preflight.Place(on, cluster, planned=dry_run, gpus=bool(gpus)), scope)
    if dry_run:
        return dry_run_of(opened, calibrate, gpus)
    opened = plan.start(settings, out, opened)
    opened.only_scope = scope
    elsewhere.remember(opened, on, cluster)
    if on != "slurm":
        drive(opened, on=on, reuse=reuse)
    elif not elsewhere.on_slurm(opened, cluster, detach, reuse=reuse):
        return
    Console().print(overview.costs(opened), crop=False)
    if scope:
        _validation(opened)
    else:
        _verdict(opened)


@app.command()
def stage(
    name: Annotated[str, typer.Argument(help="ingest, split, labeller, priors, dreambooth, prompts, generate, label, train, evaluate or report.")],
    run: RunArgument,
    part: Annotated[
        Optional[str], typer.Option("--share", metavar="I/N", help="As worker I of N (from 0) that know nothing of each other: slurm/stage.sbatch.")
    ] = None,
    on: elsewhere.On = "local",
    cluster: elsewhere.Cluster = None,
    detach: elsewhere.Detach = False,
):
    """Bring a run up to and including one stage.

    Example: vhs stage split runs/mine
    """
    from jobs import config as configuration
    from jobs import plan, preflight
    from jobs.stages import BY_NAME

    if name not in BY_NAME:
        raise configuration.ConfigError(f"no stage {name!r}; they are, in order, {', '.join(BY_NAME)}")
    opened = plan.reopen(run)
    world.set_environment(opened.config.threads)
    cluster = elsewhere.site(on, cluster)
    preflight.refuse_place(on, cluster)
    elsewhere.remember(opened, on, cluster)
    if part is None:
        return elsewhere.on_slurm(opened, cluster, detach, name) if on == "slurm" else drive(opened, on=on, only=name)
    from jobs import interrupt, share

    try:
        index, count = map(int, part.split("/"))
        assert 0 <= index < count
    except (ValueError, AssertionError):
        raise configuration.ConfigError(f"--share {part}: I/N with 0 <= I < N, for example 0/4") from None
    interrupt.listen()
    share.work(opened, share.Link(name, round=opened.config.generation.max_rounds, ranks=opened.config.largest_ranks), index, count)


@app.command()
def status(
    run: RunArgument,
    watch: Annotated[bool, typer.Option("--watch", help="Look again every few seconds, until it is complete or Ctrl-C.")] = False,
):
    """What is done, at work, waiting and failed, on whatever it runs; what was begun again and why; what to do.

    Example: vhs status runs/mine --watch
    """
    from jobs import overview, plan

    opened = plan.reopen(run, read_only=True)
    if watch:
        overview.watch(opened)
    else:
        Console().print(overview.page(opened), crop=False)


@app.command()
def report(run: RunArgument):
    """Make a finished run's report, and say what it says and where it is. It trains nothing: `vhs run` does.

    Example: vhs report runs/mine
    """
    from jobs import plan
    from jobs.drive import frontier

    opened = plan.reopen(run)
    world.set_environment(opened.config.threads)
    left = frontier(opened)
    if left and left[0] != "report":
        raise plan.PlanError(
            f"{run} is not finished: {len(left[1])} units of {left[0]} are to do before its report. vhs status {run} says more"
        )
    drive(opened)
    _verdict(opened)


def _validation(opened):
    """A single scope's arms on its inner validation: what may be looked at before every scope is done."""
    from jobs.status import validation

    grid = Grid("arm", "inner validation", "images", title=f"scope {opened.only_scope}: no held-out figure is looked at before the report")
    for arm, accuracy, images in validation(opened):
        grid.add_row(arm, f"{accuracy:.1%}", str(images))
    Console().print(grid)


def _verdict(opened):
    """The arms with their intervals, the answer, and where the page is."""
    import json

    storage = opened.storage
    summary = json.loads(storage.read("report/summary.json"))
    grid = Grid("arm", "validation", "test", *(["cross-validated"] if opened.config.split.folds else []), title="accuracy (95% interval)")
    if not summary["patients_known"]:
        grid.caption = "patients unknown"
    for arm, figures in summary["arms"].items():
        parts = [figures["validation"], figures["test"], *([figures["cv"]] if opened.config.split.folds else [])]
        grid.add_row(arm, *("{:.1%} ({:.1%} to {:.1%})".format(part["accuracy"], *part["ci95"]) if part else "–" for part in parts))
    out = Console()
    out.print(grid)
    from vhs.metrics import verdict

    out.print(verdict(summary))
    out.print(f"report: {unquote(storage.url.removeprefix('file://'))}/report/index.html", soft_wrap=True)


app.add_typer(elsewhere.app)
app.add_typer(upkeep.app)
app.add_typer(tools.app)
app.add_typer(bench.app, name="bench")


def main():
    """Entry point: an error of the user's is a sentence, not a traceback."""
    from jobs import interrupt
    from jobs.config import ConfigError
    from jobs.drive import Failed
    from jobs.plan import PlanError
    from shards.credentials import without_keys
    from vhs.sources import SourceError

    os.umask(os.umask(0) | 0o002)  # for all that this command starts
    try:
        app()
    except (ConfigError, PlanError, SourceError, Failed, ValueError, KeyError, RuntimeError, OSError) as error:
        if os.environ.get("VHS_TRACEBACK"):
            raise
        said = escape(without_keys(str(error.args[0] if isinstance(error, KeyError) else error)))
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError) and "s3://" in said and not os.environ.get("AWS_ACCESS_KEY_ID"):
            said += (
                ". AWS_ACCESS_KEY_ID is not set: export it, AWS_SECRET_ACCESS_KEY and AWS_REGION (AWS_SESSION_TOKEN for keys that end, AWS_ENDPOINT_URL where "
                "the store is not Amazon's), or give this machine a role that may read there"
            )
        console.print(f"[red]error[/] {said}", soft_wrap=True, highlight=False)
        raise SystemExit(1) from None
    except interrupt.Interrupted:
        console.print("asked to stop: what trained has saved its step, and the same command goes on from there", soft_wrap=True, highlight=False)
        raise SystemExit(128 + interrupt.asked_by) from None


if __name__ == "__main__":
    main()
