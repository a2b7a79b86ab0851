"""A run's progress on a terminal; one line a stage where there is none."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from jobs.dispatch import Outcome
from jobs.drive import Show


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
