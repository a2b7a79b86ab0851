"""Whether a plan fits the machine that it would run on: what the dry run remarks beside its table."""

from __future__ import annotations

import os
from pathlib import Path

from jobs import rates
from jobs.forecast import Forecast

LONG_H = 24  # what takes longer is worth a word
SMALLER = {  # stage -> what makes it so
    "labeller": "labeller.steps",
    "priors": "priors.images, priors.batch, resolution",
    "dreambooth": "dreambooth.steps, dreambooth.batch, resolution, or dreambooth.gradient_checkpointing=true against memory",
    "prompts": "prompts.images, generation.batch, resolution",
    "generate": "generation.quota, generation.batch, resolution",
    "label": "generation.quota",
    "train": "classifier.size_px, classifier.batch, or another classifier.model (tf_efficientnet_lite0 at 160 px is `ctr`'s)",
    "evaluate": "classifier.size_px, classifier.batch, or another classifier.model",
}


def remarks(planned: Forecast, memory_gb: float | None = None) -> list[str]:
    """A sentence for memory and one for hours, where the machine has not enough of them. `memory_gb`: what it has; None: this machine's, or what is stated
    of the GPU that is planned for."""
    has_gb = memory_gb or (rates.GPU_GB if planned.machine is rates.GPU else here_gb())
    needs = {row.stage: row.memory_gb * min(planned.side_by_side, row.units) for row in planned.rows if row.memory_gb}
    hours = {row.stage: hours for row in planned.rows if (hours := planned.stage_hours(row))}
    said = []
    if needs and needs[most := max(needs, key=needs.get)] > has_gb:
        beside = f", {planned.side_by_side} units side by side" if planned.side_by_side > 1 else ""
        what = "the GPU that is planned for" if planned.machine is rates.GPU else "this machine"
        said.append(f"memory: {most} takes about {needs[most]:.0f} GB{beside}, {what} has {has_gb:.0f}. Less of it: {SMALLER.get(most, 'execution.workers')}")
    if (total := sum(hours.values())) > LONG_H:
        most = max(hours, key=hours.get)
        said.append(
            f"time: about {total:.0f} hours are {total / 24:.0f} days of {planned.machine.name}, {hours[most]:.0f} hours of them {most}. Less of it: "
            f"{SMALLER.get(most, 'fewer images')}; or split.folds=0, fewer seeds; or more machines, for which --gpus 1,8,64 plans"
        )
    return said


def here_gb() -> float:
    """Memory of this machine, or of the container that this process is in."""
    most = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    said = limit.read_text().strip() if limit.is_file() else "max"
    return min(most, int(said) if said.isdecimal() else most) / 1e9
