"""Planning for numbers of GPUs: what must hold of any plan, and what the command says."""

from __future__ import annotations

import itertools
import re

import pytest
from conftest import vhs
from hypothesis import given
from hypothesis import strategies as st

from jobs import makespan, plan
from jobs.config import ConfigError, load
from jobs.dry_run import _counts
from jobs.forecast import forecast, sizes
from jobs.makespan import Block

seconds = st.floats(0, 1e5, allow_subnormal=False)
blocks = st.lists(
    st.builds(Block, st.just("train"), st.integers(1, 16), seconds, st.lists(seconds, min_size=1, max_size=40).map(tuple)), min_size=1, max_size=6
)


@given(blocks, st.integers(1, 700), st.integers(0, 100))
def test_more_devices_are_never_slower_and_no_unit_is_divided(given_blocks, devices, more):
    fewer, many = (makespan.wall_s(given_blocks, count) for count in (devices, devices + more))
    assert many <= fewer * (1 + 1e-9)
    assert many >= sum(block.longest_s for block in given_blocks) * (1 - 1e-9), "a unit took less than itself"
    total = sum(block.device_s for block in given_blocks)
    assert makespan.wall_s(given_blocks, 1) == pytest.approx(total)
    assert fewer * devices >= total * (1 - 1e-9), "more was done than there were devices for"


@given(blocks)
def test_from_enough_devices_on_nothing_gets_faster(given_blocks):
    enough, least = makespan.enough(given_blocks), sum(block.longest_s for block in given_blocks)
    assert makespan.wall_s(given_blocks, enough) == pytest.approx(makespan.wall_s(given_blocks, 10 * enough)) == pytest.approx(least)
    if enough > 1:
        assert makespan.wall_s(given_blocks, enough - 1) > least


def test_equal_units_go_in_waves_and_ranks_take_as_many_devices():
    alike = Block("generate", 1, 10.0, (50.0,) * 7)
    assert [alike.wall_s(devices) for devices in (1, 2, 3, 6, 7, 8)] == [420, 240, 180, 120, 60, 60]
    together = Block("train", 4, 10.0, (400.0,) * 3)
    assert [together.wall_s(devices) for devices in (1, 2, 4, 7, 8, 11, 12)] == [1230, 630, 330, 330, 220, 220, 110]
    assert (alike.enough, together.enough) == (7, 12)


def _planned(*overrides):
    settings = load("paper", list(overrides))
    return forecast(settings, sizes(settings, plan.Run("nowhere", settings, read_only=True)))


def test_a_plan_s_blocks_are_its_stages_and_rounds_in_turn():
    planned = _planned("dreambooth.ranks=4", "classifier.ranks=8")
    order = [stage for stage, _ in itertools.groupby(block.stage for block in planned.blocks)]
    rounds = next(row.rounds for row in planned.rows if row.stage == "generate")
    assert rounds > 1 and order[4:-3] == ["dreambooth", *["generate", "label"] * rounds] and order[-3:] == ["train", "evaluate", "report"]
    for row in planned.rows:
        of_row = [block for block in planned.blocks if block.stage == row.stage]
        assert sum(len(block.work_s) for block in of_row) == row.units and sum(block.device_s for block in of_row) == pytest.approx(row.seconds)
        assert {block.ranks for block in of_row} == {{"dreambooth": 4, "train": 8, "evaluate": 8}.get(row.stage, 1)}
    train = next(block for block in planned.blocks if block.stage == "train")
    assert len(set(train.work_s)) > 1, "arms and folds differ in their steps"
    assert planned.hours == pytest.approx(makespan.wall_s(planned.blocks, 1) / 3600)


def test_numbers_of_gpus_that_are_none_are_named():
    assert _counts("512, 8,64,8") == [8, 64, 512]
    for wrong in ("0,x", "", "8,,64", "-1", "1.5"):
        with pytest.raises(ConfigError, match=r"--gpus .* is no number of GPUs; write whole numbers from 1 on, with commas: --gpus 8,64,512"):
            _counts(wrong)
    assert "add --dry-run" in vhs("run", "debug/demo", "--gpus", "8", code=1)


def _rows(printed: str) -> dict[int, list[str]]:
    cells = [[cell.strip() for cell in line.strip("│ \n").split("│")] for line in printed.splitlines() if line.startswith("│")]
    return {int(row[0]): row for row in cells if row[0].isdecimal()}


def test_the_command_says_a_row_a_number_from_a_calibration(reference):
    options = ("run", "debug/demo", "generation.quota=400", "generation.max_rounds=20", "--dry-run", "--gpus")
    wide = {"COLUMNS": "200"}
    stated = vhs(*options, "8,64,512", environment=wide)
    rows = _rows(stated)
    assert list(rows) == [8, 64, 512] and {row[-1] for row in rows.values()} == {"stated"} and "on so many GPUs" in stated
    assert "one CPU core" in vhs(*options, "8", "--calibrate", reference, code=1), "a core's seconds tell nothing of a GPU's"
    measured = vhs(*options, "1,2,4", "execution.device=cpu", "--calibrate", reference, environment=wide)
    rows = _rows(measured)
    wall, at_work, held = ([float(row[column]) for row in rows.values()] for column in (1, 2, 3))
    assert list(rows) == [1, 2, 4] and "measured" in rows[1][-1] and wall[0] >= wall[1] >= wall[2] > 0 and len(set(at_work)) == 1
    assert wall[0] == at_work[0] == held[0] and int(rows[1][-2]) > 0 and float(rows[1][-3]) > 0, "shards and bytes"
    assert re.search(r"cannot be parallel: .*dreambooth [\d.]+ h.*: [\d.]+ h", measured) and "on nothing gets faster" in measured
