"""`vhs status`: one page of a run, the same for SLURM, Ray and this machine, made of what lies in its folder and of what SLURM says."""

from __future__ import annotations

import time
from collections import Counter

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table as Grid
from rich.text import Text

from jobs import history, rounds, status
from jobs.generators import DREAMBOOTH, outsiders
from jobs.plan import Run
from jobs.status import StageStatus
from vhs.measure import CLASSES

LOOK_S = 2.0


def page(run: Run) -> Group:
    """All of it, now."""
    rows = status.status(run)
    parts = [_stages(run, rows), *_queue(run), *_slow(run, rows), *_again(run), *_failures(run), *_ill(run), costs(run), *_generated(run)]
    return Group(*parts)


def watch(run: Run):
    """The page, again and again until the run is complete."""
    from jobs.drive import frontier

    with Live(page(run), console=Console(), auto_refresh=False) as live:
        while frontier(run):
            time.sleep(LOOK_S)
            run.refresh()
            live.update(page(run), refresh=True)


def _stages(run: Run, rows: list[StageStatus]) -> Grid:
    grid = Grid("stage", "units done", "at work", "waiting", "failed", "an hour", "left", title=f"{run.config.name}  {run.url}")
    for row in rows:
        if row.total is None:
            grid.add_row(row.name)
            continue
        steps = [f"{one.unit} {one.beat['step']}/{one.beat['total']}" if "step" in one.beat else one.unit for one in row.running]
        said = ", ".join(steps[:4]) + (f" and {len(steps) - 4} more" if len(steps) > 4 else "")
        pace = (f"{row.rate:.0f}" if row.rate else "", _spell(row.eta_s) if row.eta_s else "")
        grid.add_row(row.name, f"{row.done} of {row.total}", said, str(row.waiting or ""), ", ".join(row.failed[:4]), *pace)
    return grid


def _queue(run: Run) -> list[Text]:
    """What SLURM has of the run, with its reasons to wait, if it was ever given anything."""
    from jobs import chain

    if not any(name.startswith("state/submissions/") for name in run.names):
        return []
    try:
        states = Counter(chain.queued(run).values())
        said = ", ".join(f"{count} {state}" for state, count in states.most_common()) or "no job"
    except (OSError, RuntimeError) as error:  # another machine than SLURM's, or slurmctld restarting
        said = f"unknown ({error})"
    return [_line(f"SLURM: {said}")]


def _slow(run: Run, rows: list[StageStatus]) -> list[Text]:
    typical = status.typical_seconds(run)
    late = [(one, typical[row.name]) for row in rows for one in row.stragglers(typical.get(row.name))]
    return [_line(f"slow: {one.unit} on {one.node}, at work for {_spell(one.seconds)}; others took {_spell(median)}") for one, median in late]


def _again(run: Run) -> list[Grid]:
    """Attempts that did not do their unit, by cause: work that was, or will be, begun again."""
    groups: dict[str, list[history.Ended]] = {}
    for one in history.ended(run):
        groups.setdefault(one.cause, []).append(one)
    if not groups:
        return []
    paths = {unit.identity: unit.path for _, units in run.named() for unit in units}
    grid = Grid("cause", "attempts", "units", "nodes", title="begun again")
    for cause, group in sorted(groups.items(), key=lambda item: -len(item[1])):
        units = list(dict.fromkeys(paths.get(one.attempt.identity, one.attempt.identity) for one in group))
        grid.add_row(escape(cause.splitlines()[0]), str(len(group)), _some(units), _some(sorted({one.attempt.node for one in group})))
    return [grid]


def _failures(run: Run) -> list[Grid | Text]:
    """Failed units grouped by reason, with where and what to do."""
    groups: dict[str, list] = {}
    for failure in status.failed(run):
        groups.setdefault(failure.reason, []).append(failure)
    if not groups:
        return []
    grid = Grid("failed", "units", "nodes", "tries", "try again", title="what failed")
    for reason, group in groups.items():
        nodes, tries = sorted({failure.node for failure in group}), max(failure.tries for failure in group)
        units, again = [failure.unit for failure in group], f"vhs retry {run.url} {group[0].unit if len(group) == 1 else ''}".strip()
        grid.add_row(escape(reason), _some(units), ", ".join(nodes), f"{tries} of {run.config.execution.tries}", again)
    return [grid, _line(f"more: vhs logs {run.url}")]


def _ill(run: Run) -> list[Text]:
    return [
        _line(f"{node}: {units} units failed there alone, while other nodes did theirs. The next submission leaves it out, the one after tries it again")
        for node, units in history.ill_nodes(run).items()
    ]


def costs(run: Run) -> Group:
    """Core-seconds of every stage, as far as they are recorded, and of each accepted image."""
    if not (stages := status.costs(run)):
        return Group()
    grid = Grid("stage", "units", "core-seconds", "seconds", "peak GB", title="what it took")
    for cost in stages:
        grid.add_row(cost.stage, str(cost.units), f"{cost.core_seconds:.1f}", f"{cost.seconds:.1f}", f"{cost.peak_gb:.2f}")
    total = [sum(cost.core_seconds for cost in stages), sum(cost.seconds for cost in stages), max(cost.peak_gb for cost in stages)]
    grid.add_row("all", str(sum(cost.units for cost in stages)), f"{total[0]:.1f}", f"{total[1]:.1f}", f"{total[2]:.2f}")
    each = status.per_accepted(run)
    return Group(grid, _line(f"an accepted image cost {each:.2f} core-seconds of drawing and measuring")) if each else Group(grid)


def _generated(run: Run) -> list[Text]:
    lines = []
    for place, counts in status.generation(run).items():
        control, _, scope = place.rpartition("/")
        quota = rounds.quota_of_a_class(run, scope, control or DREAMBOOTH)
        left = f", of the {len(run.outside(control, scope)['images'])} that its set has" if control in outsiders(run.config) else ""
        lines.append(
            f"generated for {place}: {counts['accepted']} of {counts['produced']} accepted ({counts['accepted'] / max(1, counts['produced']):.0%}), "
            + ", ".join(f"{counts.get(name, 0)} of {quota} {name}" for name in CLASSES)
            + left
        )
    return [_line(line) for line in lines]


def _line(text: str) -> Text:
    """Whole, however narrow the terminal: commands in it are copied."""
    return Text(text, no_wrap=True, overflow="ignore")


def _some(words: list[str]) -> str:
    return ", ".join(words[:3]) + (f" and {len(words) - 3} more" if len(words) > 3 else "")


def _spell(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
