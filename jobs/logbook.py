"""A unit at work, for whoever watches: sample pictures, and tensorboard's curves if execution.tensorboard. Bookkeeping, part of no product.

Below state/log in the run, a folder a unit: `tensorboard --logdir RUN/state/log`.
"""

from __future__ import annotations

from functools import cached_property

from jobs.unit import Unit
from shards.storage import Storage


class Logbook:
    """Of one unit. A unit that goes on from a checkpoint goes on in its book; what the lost steps wrote is overwritten."""

    def __init__(self, storage: Storage, unit: Unit, tensorboard: bool):
        self._storage, self._folder, self._tensorboard, self._first = storage, f"state/log/{unit.path}", tensorboard, 0

    @cached_property
    def _writer(self):
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self._storage.shared / self._folder), purge_step=self._first)

    def scalars(self, step: int, metrics: dict[str, float]):
        """A step's figures, for tensorboard."""
        if self._tensorboard:
            self._first = self._first or step
            for name, value in metrics.items():
                self._writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, image):
        """A grey image uint8 [S, S] as <step>-<name>.png, and for tensorboard."""
        from vhs.radiograph import encode_png

        self._storage.put(f"{self._folder}/{step:08d}-{name}.png", encode_png(image))
        if self._tensorboard:
            self._writer.add_image(name, image, step, dataformats="HW")

    def close(self):
        """Flush what tensorboard has not written."""
        if "_writer" in vars(self):
            self._writer.close()
