"""Commands for a run that goes on elsewhere: hand it over, see what failed, try again, take it back."""

from __future__ import annotations

import json
import os
from typing import Annotated, Optional

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table as Grid

from jobs import failures, world
from jobs.console import console, drive
from jobs.plan import PlanError

app = typer.Typer()

On = Annotated[str, typer.Option(help="Where units run: local; ray (RAY_ADDRESS says which); slurm (job arrays, watched).")]
Cluster = Annotated[
    Optional[str], typer.Option(help="With --on slurm: the site, a name of configs/clusters or a YAML file. Default: $VHS_CLUSTER.")
]
Detach = Annotated[bool, typer.Option("--detach", help="With --on slurm: end once everything is submitted. vhs status RUN watches.")]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="The folder of a run.")]
UnitArgument = Annotated[Optional[str], typer.Argument(metavar="[UNIT]", help="A unit as `vhs status` names it; default: all that failed.")]
STARTED = "state/started.json"  # on what the run was last started


@app.command()
def logs(run: RunArgument, unit: UnitArgument = None):
    """What failed units said: the traceback, and the end of their job's log.

    Example: vhs logs runs/mine train/mixed/split
    """
    from jobs.status import failed, log_of

    opened = _open(run)
    chosen = [failure for failure in failed(opened) if unit is None or failure.unit.startswith(unit)]
    for failure in chosen:
        Console().rule(f"{failure.unit} on {failure.node}, try {failure.tries}")
        Console().print(failure.traceback.strip(), markup=False, highlight=False, soft_wrap=True)
        if said := log_of(opened, failure):
            Console().rule(f"job {failure.job}", style="dim")
            Console().print(said.strip(), markup=False, highlight=False, soft_wrap=True)
    if not chosen:
        console.print(f"no unit of {run} has failed" + (f" whose name begins with {unit}" if unit else ""), soft_wrap=True)


@app.command()
def retry(run: RunArgument, unit: UnitArgument = None):
    """Go on with a run as it was last started, counting the tries at what failed anew.

    Example: vhs retry runs/mine generated/split/small/00003
    """
    from jobs import preflight
    from jobs.status import failed

    opened = _open(run)
    chosen = [failure for failure in failed(opened) if unit is None or failure.unit.startswith(unit)]
    if unit and not chosen:
        raise PlanError(f"{run}: no unit that failed has a name that begins with {unit}; vhs status {run} lists them")
    begun = _begun(opened)
    preflight.refuse_place(begun["on"], begun["cluster"])
    for failure in chosen:
        failures.forget(opened.storage, failure.identity)
    world.set_environment(opened.config.threads)
    if begun["on"] == "slurm":
        on_slurm(opened, begun["cluster"], detach=True)
    else:
        drive(opened, on=begun["on"])


@app.command()
def cancel(run: RunArgument):
    """Take a run's jobs from SLURM. Nothing is lost: `vhs run` goes on.

    Example: vhs cancel runs/mine
    """
    from jobs import chain, scheduler

    opened = _open(run)
    if absent := scheduler.absent():
        on = _begun(opened)["on"]
        other = f" It was last started --on {on}: what runs there ends with its own command, by Ctrl-C." if on != "slurm" else ""
        raise PlanError(f"{run}: its jobs cannot be taken back, {absent}.{other}")
    console.print(f"{chain.cancel(opened)} job arrays of {run} cancelled", soft_wrap=True)


@app.command()
def doctor(
    what: Annotated[Optional[str], typer.Argument(metavar="[RUN|CONFIG]", help="What is to run; default: only the place is looked at.")] = None,
    on: Annotated[str, typer.Option(help="slurm or ray.")] = "slurm",
    cluster: Cluster = None,
    out: Annotated[Optional[str], typer.Option(help="A folder that every node should see: where runs are made. Default: RUN, or runs.")] = None,
    check: Annotated[Optional[str], typer.Option(help="Only this one; an unknown name lists them.")] = None,
):
    """Before a run goes elsewhere: what would stop it there, and what to do. One small job looks around on a node.

    Example: vhs doctor paper --on slurm --cluster example --out /shared/runs
    """
    from pathlib import Path

    from jobs import config as configuration
    from jobs import doctor as examining
    from jobs.site import Site

    if on not in examining.CHECKS:
        raise configuration.ConfigError(f"--on {on}: {' or '.join(examining.CHECKS)}")
    if check and check not in examining.CHECKS[on]:
        listed = "\n".join(f"  {name:<12} {question}" for name, (question, _) in examining.CHECKS[on].items())
        raise configuration.ConfigError(f"--check {check}: with --on {on} there are\n{listed}")
    begun = what is not None and (Path(what) / "plan.json").is_file()
    config = _open(what).config if begun else configuration.load(what, []) if what else None
    cluster = site(on, cluster)
    folder = Path(out or (what if begun else "runs")).expanduser().resolve()
    place = examining.Place(folder, examining.needs(config) if config else [], Site.load(cluster) if on == "slurm" else None)
    grid, verdicts = Grid("check", "", "seen", "to do", title=f"{on} {cluster or ''}".strip()), []
    for found in examining.examine(on, place, check):
        colour = {"ok": "green", "problem": "red"}.get(found.verdict, "yellow")
        grid.add_row(found.check, f"[{colour}]{found.verdict}[/]", escape(found.seen), escape(found.mend))
        verdicts.append(found.verdict)
    Console().print(grid)
    raise typer.Exit(0 if set(verdicts) <= {"ok"} else 1)


def _open(run: str):
    from jobs import plan

    return plan.reopen(run)


def _begun(opened) -> dict:
    """On what the run was last started, and at which site."""
    return json.loads(opened.storage.read(STARTED)) if opened.storage.exists(STARTED) else {"on": "local", "cluster": None}


def remember(opened, on: str, cluster: str | None):
    """For `vhs retry`: where the run was started."""
    opened.storage.put(STARTED, json.dumps({"on": on, "cluster": cluster}).encode())


def site(on: str, cluster: str | None) -> str | None:
    """The site's name, where one is needed."""
    from jobs import config as configuration

    if on not in ("local", "ray", "slurm"):
        raise configuration.ConfigError(f"--on {on}: local, ray or slurm")
    cluster = cluster or os.environ.get("VHS_CLUSTER")
    if on == "slurm" and not cluster:
        raise configuration.ConfigError(f"--on slurm needs a site: --cluster NAME, one of {', '.join(configuration.names('clusters'))} or a YAML file")
    return cluster


def on_slurm(opened, cluster: str, detach: bool, until: str | None = None, reuse: str | None = None) -> bool:
    """Submit what is missing, unless it is submitted already, and watch. Whether it is done."""
    from jobs import chain, plan
    from jobs.display import Display
    from jobs.watch import watch

    if reuse:
        plan.adopt_all(opened, reuse)
    if there := chain.queued(opened):
        console.print(f"{len(there)} jobs of {opened.url} are with SLURM already: nothing is submitted", soft_wrap=True, highlight=False)
    else:
        record = chain.submit(opened, cluster, *([until] if until else []))
        links = len({job["link"] for job in record["jobs"]})
        console.print(f"{len(record['jobs'])} jobs in {links} arrays submitted to {cluster}; logs in {record['log']}", soft_wrap=True, highlight=False)
        if record["left_out"]:
            console.print(f"left out for units that failed there alone: {', '.join(record['left_out'])}", soft_wrap=True, highlight=False)
    if detach:
        return False
    with Display(console) as display:
        watch(opened, display, until)
    return True
