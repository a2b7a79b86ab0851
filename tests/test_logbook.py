"""What is written for whoever watches: tensorboard's files and pictures, in state/, and nothing unless asked."""

from __future__ import annotations

import numpy as np

from jobs.logbook import Logbook
from jobs.unit import Unit
from shards.storage import open_storage
from vhs.radiograph import decode_png

UNIT = Unit("dreambooth", "generator/split", "json", {}, {}, {})
IMAGE = np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)


def write(run, steps, tensorboard):
    book = Logbook(open_storage(run), UNIT, tensorboard)
    for step in steps:
        book.scalars(step, {"loss": 1 / step})
    book.picture(steps[-1], "large", IMAGE)
    book.close()


def test_pictures_are_files_and_scalars_cost_nothing_unless_wanted(tmp_path):
    write(tmp_path, [1, 2, 3], tensorboard=False)
    assert [file.name for file in (tmp_path / "state").rglob("*") if file.is_file()] == ["00000003-large.png"]
    assert np.array_equal(decode_png((tmp_path / "state/log/generator/split/00000003-large.png").read_bytes()), IMAGE)


def test_tensorboard_reads_one_curve_though_a_unit_was_resumed(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(tmp_path, [1, 2, 3, 4], tensorboard=True)
    write(tmp_path, [3, 4, 5], tensorboard=True)  # killed after step 4, back at the checkpoint of step 2
    read = EventAccumulator(str(tmp_path / "state/log/generator/split"))
    read.Reload()
    assert [event.step for event in read.Scalars("loss")] == [1, 2, 3, 4, 5]
    assert read.Tags()["images"] == ["large"]
