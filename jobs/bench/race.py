"""Contenders for the same work, in one run on one machine.

Every one does the same work; repeats alternate, so that a busy machine slows all alike; figures are medians, and the ratios are what to read.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Row:
    """One contender. `rate`: images a core-second on a CPU, images a second on a GPU; `ratio` to the first row; None where it could not run."""

    name: str
    rate: float | None
    ratio: float | None
    bytes_per_image: int | None = None
    note: str = ""


@dataclass(frozen=True)
class Result:
    """All contenders; `unit` of the rates, `device`, and what was asked of each."""

    what: str
    unit: str
    device: str
    images: int
    repeats: int
    rows: list[Row]

    def as_dict(self) -> dict:
        return asdict(self)


def race(contenders: dict[str, Callable[[], object]], images: int, repeats: int, clock: Callable[[], float]) -> dict[str, float]:
    """Median rate of each, the contenders taking turns; a first, uncounted turn warms up."""
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeats + 1):
        for name, work in contenders.items():
            began = clock()
            work()
            if turn:
                taken[name].append(clock() - began)
    return {name: images / max(statistics.median(times), 1e-9) for name, times in taken.items()}


def rows(rates: dict[str, float], sizes: dict[str, int] | None = None) -> list[Row]:
    first = next(iter(rates.values()))
    return [Row(name, rate, rate / first, (sizes or {}).get(name)) for name, rate in rates.items()]
