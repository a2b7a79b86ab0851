"""What a training loop needs in order to go on after a crash: a state file, and someone to say when to write it.

A loop captures one dictionary of tensors and plain values. It never writes a file itself: it hands the capture to its `Progress`, who
decides when a state is worth keeping and where (jobs implements the one that saves, heartbeats and gives way to a newer attempt). Random
numbers in the loops are functions of (seed, step, rank), so no generator state is part of a checkpoint.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch


class Progress(Protocol):
    """The loop's view of whoever runs it."""

    def resume(self) -> dict | None:
        """The newest complete state, as `capture` once returned it, or None to start at step 0."""
        ...

    def step(self, step: int, total: int, metrics: dict[str, float], capture: Callable[[], dict]) -> None:
        """Called on every rank after step `step` (from 1) of `total`; may raise to stop the loop.

        `capture` costs a copy: only to save, and then on every rank, for each may hold a share of the state. It returns the whole on rank 0.
        """
        ...


class Silent:
    """A Progress that starts at step 0 and keeps nothing."""

    def resume(self) -> dict | None:
        return None

    def step(self, step: int, total: int, metrics: dict[str, float], capture: Callable[[], dict]) -> None:
        pass


def save(state: dict, file: Path) -> None:
    """Writes `state` (tensors and plain values) so that `file` is at every moment either its old whole self or its new whole self."""
    file = Path(file)
    aside = file.with_name(f".{file.name}.{os.getpid()}.writing")
    try:
        with aside.open("wb") as out:
            torch.save(state, out)
            out.flush()
            os.fsync(out.fileno())  # else a power cut after the rename can leave the new name with no bytes behind it
        os.replace(aside, file)
    except RuntimeError as error:  # torch writes an end to what a full disk has cut off, fails again and hides why
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
    finally:
        aside.unlink(missing_ok=True)


def load(file: Path) -> dict:
    """The state in `file`, tensors on the CPU. Only tensors and plain values are unpickled. ValueError for a torn or foreign file."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{file} is no whole checkpoint ({type(error).__name__}): delete it, the one before will do") from error
    if not isinstance(state, dict) or "step" not in state:
        raise ValueError(f"{file} holds no training state: a checkpoint is a dict with a 'step'")
    return state
