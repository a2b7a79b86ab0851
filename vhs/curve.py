"""A loop's learning curve: what it said of its steps, in a table small enough to plot and to keep with the product (curve.json).

Part of a loop's captured state, so that a resumed run writes the table an undisturbed one would have written, to the last digit.
"""

from __future__ import annotations

import json
from pathlib import Path

ROWS = 300


class Curve:
    """Figures of `total` steps: rows {"step", figure: its mean since the row before}, at most ROWS of them beside those with `seldom` figures."""

    def __init__(self, total: int):
        self.rows: list[dict[str, float]] = []
        self.trained_by: dict = {}  # vhs.engine's `about`; `before`: that of engines of other ranks, whose last step is `until`
        self._total, self._every = total, -(-total // ROWS)
        self._sums: dict[str, float] = {}
        self._count = 0

    def add(self, step: int, figures: dict[str, float], seldom: dict[str, float] | None = None) -> None:
        """The figures of step `step` (from 1). `seldom`: figures not every step has (validation); the step then gets a row of its own."""
        self._sums = {name: self._sums.get(name, 0.0) + value for name, value in figures.items()}
        self._count += 1
        if seldom or step % self._every == 0 or step == self._total:
            self.rows.append({"step": step, **{name: total / self._count for name, total in self._sums.items()}, **(seldom or {})})
            self._sums, self._count = {}, 0

    def state_dict(self) -> dict:
        """All of it, plain values."""
        return {"rows": [dict(row) for row in self.rows], "sums": dict(self._sums), "count": self._count, "trained_by": dict(self.trained_by)}

    def load_state_dict(self, state: dict) -> None:
        """Goes on where `state_dict` was taken. What is random in a step hangs on the ranks, so others than now are taken down."""
        self.rows, self._sums, self._count = [dict(row) for row in state["rows"]], dict(state["sums"]), state["count"]
        then = dict(state["trained_by"])
        before = then.pop("before", [])
        if then.get("ranks") != self.trained_by.get("ranks"):
            before = [*before, {**then, "until": (self.rows[-1]["step"] if self.rows else 0) + self._count}]
        self.trained_by |= {"before": before} if before else {}

    def save(self, folder: Path) -> None:
        """Writes folder/curve.json, one row a line."""
        (Path(folder) / "curve.json").write_text("[\n" + ",\n".join(map(json.dumps, self.rows)) + "\n]\n")
