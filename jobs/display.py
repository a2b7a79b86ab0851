"""A run's progress on a terminal; one line a stage where there is none."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from jobs import makespan
from jobs.dispatch import Outcome
from jobs.drive import Show
from jobs.forecast import SHARDED, Forecast


class Display(Show):
    """One bar a stage: units done of all units known; beside it the training step that this process is at."""

    def __init__(self, console: Console):
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description:>10}"),
            BarColumn(30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[word]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._console, self._tasks, self._current = console, {}, ""

    def __enter__(self) -> Display:
        self._bars.start()
        return self

    def __exit__(self, *_):
        self._bars.stop()

    def stage(self, name: str, pending: int, done: int):
        if not self._console.is_terminal and name != self._current:
            self._console.print(f"{name}: {pending} units to do", highlight=False)
        self._current = name
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(name, word="")
        self._bars.update(self._tasks[name], total=pending + done, completed=done)

    def outcome(self, outcome: Outcome):
        if outcome.state == "done":
            self._bars.advance(self._tasks[self._current])
        self._bars.update(self._tasks[self._current], word="" if outcome.state == "done" else f"{outcome.unit.path} {outcome.state}")

    def step(self, path: str, step: int, total: int, metrics: dict):
        figures = " ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in metrics.items() if name.endswith("loss"))
        self._bars.update(self._tasks[self._current], word=f"{path} step {step}/{total} {figures}")


def plan_table(planned: Forecast) -> Table:
    """Every stage with what it would take, and the sum."""
    grid = Table("stage", "units", "images", "steps", "GB", "hours", "rates", "memory GB", title="what it would take")

    def word(value: float | None, digits: int) -> str:
        return "unknown" if value is None else f"{value:.{digits}f}" if value else ""

    for row in planned.rows:
        cells = (row.stage, str(row.units), str(row.images or ""), str(row.steps or ""), word(row.gb, 3), word(planned.stage_hours(row), 2))
        grid.add_row(*cells, "measured" if row.measured else "stated", word(row.memory_gb, 1))
    known = [[value for value in values if value is not None] for values in zip(*((r.gb, planned.stage_hours(r), r.memory_gb) for r in planned.rows))]
    units, (gb, hours, memory) = sum(row.units for row in planned.rows), known
    grid.add_row("all", str(units), "", "", f"{sum(gb):.3f}", f"{sum(hours):.2f}", "", f"{max(memory):.1f}")
    return grid


def scaling_table(planned: Forecast, counts: list[int]) -> Table:
    """The hours on each number of devices. `held`: if all are kept from beginning to end; the rest of it is idle."""
    word, rows = planned.machine.plural, planned.rows
    unit = word.removesuffix("s")
    grid = Table(word, "wall hours", f"{unit}-hours at work", "held", "idle", "longest stage", "GB", "shards", "rates", title=f"on so many {word}")
    measured = {row.measured for row in rows if row.seconds}
    known = "partly measured" if len(measured) > 1 else "measured" if True in measured else "stated"
    at_work = sum(block.device_s for block in planned.blocks) / 3600
    for count in counts:
        by_stage: dict[str, float] = {}
        for block in planned.blocks:
            by_stage[block.stage] = by_stage.get(block.stage, 0.0) + block.wall_s(count) / 3600
        wall, longest = makespan.wall_s(planned.blocks, count) / 3600, max(by_stage, key=by_stage.get)
        hours = (f"{wall:.2f}", f"{at_work:.2f}", f"{wall * count:.2f}", f"{max(0.0, 1 - at_work / (wall * count)):.0%}")
        amounts = (f"{sum(row.gb or 0 for row in rows):.3f}", str(sum(row.units for row in rows if row.stage in SHARDED)))
        grid.add_row(str(count), *hours, f"{longest} {by_stage[longest]:.2f}", *amounts, known)
    return grid
