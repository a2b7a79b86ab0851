"""A learning curve is short, true, and the same whether or not its loop was interrupted."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhs.curve import ROWS, Curve


def filled(curve, steps, total):
    for step in steps:
        curve.add(step, {"loss": 1 / step}, {"validation_loss": float(step)} if step % max(1, total // 5) == 0 else None)
    return curve


@given(st.integers(1, 2000), st.data())
def test_a_resumed_curve_is_the_undisturbed_one(total, data):
    whole = filled(Curve(total), range(1, total + 1), total)
    stop = data.draw(st.integers(0, total))
    resumed = Curve(total)
    resumed.load_state_dict(json.loads(json.dumps(filled(Curve(total), range(1, stop + 1), total).state_dict())))
    assert filled(resumed, range(stop + 1, total + 1), total).rows == whole.rows
    assert len(whole.rows) <= ROWS + 10 and whole.rows[-1]["step"] == total


def test_rows_are_means_and_seldom_figures_keep_their_step(tmp_path):
    curve = Curve(600)
    for step in range(1, 601):
        curve.add(step, {"loss": float(step)}, {"validation_loss": 7.0} if step == 101 else None)
    assert curve.rows[0] == {"step": 2, "loss": 1.5} and {"step": 101, "loss": 101.0, "validation_loss": 7.0} in curve.rows
    curve.save(tmp_path)
    assert json.loads((tmp_path / "curve.json").read_text()) == curve.rows
    assert sum(row["loss"] for row in curve.rows) / len(curve.rows) == pytest.approx(300.5, rel=0.01)
