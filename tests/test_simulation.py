"""The project's own scheduling on a clock and a cluster that are not there (tests/simulation.py): whatever happens, no unit is lost or committed twice."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from simulation import Faults, Simulation

SMALL = ["generation.unit_images=8", "generation.round_units=4", "generation.quota=40", "generation.max_rounds=3", "split.folds=0"]


def check(run: Simulation):
    """Every unit is there, each marker was made once, and nobody waits for ever (or the clock would have run on)."""
    units = run.units()
    assert len(units) > 10 and {unit.stage for unit in units} >= {"ingest", "generate", "label", "train", "report"}
    assert all(run.view.done(unit) for unit in units), "a unit is lost"
    made = {name: count for name, count in run.medium.committed.items() if name in {unit.marker for unit in units}}
    assert len(made) == len(units) and set(made.values()) == {1}, "a unit was committed twice"


@given(
    workers=st.integers(1, 30), seed=st.integers(0, 10**6), losses=st.sampled_from([0, 0.5, 3]), preemptions=st.sampled_from([0, 0.5, 3]),
    stalls=st.sampled_from([0, 0.5, 3]), errors=st.sampled_from([0, 0.02, 0.1]), stragglers=st.sampled_from([0, 0.1]),
)  # fmt: skip
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
def test_whatever_goes_wrong(workers, seed, losses, preemptions, stalls, errors, stragglers):
    check(Simulation(workers, Faults(losses, preemptions, stalls, errors, stragglers), seed, SMALL).run())


def test_without_faults_nothing_is_done_twice():
    run = Simulation(12, Faults(), 1, SMALL).run()
    check(run)
    assert run.redone == 0 and run.submissions == 1 and not run.failed


SIZES = [(6_400, 64), pytest.param(100_000, 1000, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("images", "workers"), SIZES)
def test_many_images_on_many_workers(images, workers, figure):
    """Lost nodes, preemptions, workers that stand still, errors and stragglers."""
    each_class = images // (3 * 64) + 1
    drawn = ["generation.unit_images=64", f"generation.round_units={each_class}", "generation.quota=23000", "generation.max_rounds=1"]
    run = Simulation(workers, Faults(losses=0.2, preemptions=0.3, stalls=0.1, errors=0.01, stragglers=0.02), 7, drawn).run()
    check(run)
    made = sum(64 for unit in run.units() if unit.stage == "generate")
    figure(
        f"{made} images, {len(run.units())} units, {workers} workers: done in {run.ended_s / 3600:.1f} h of their time in {run.submissions} submissions; "
        f"met {dict(run.hits)}; {run.redone} attempts of {sum(run.started.values())} were begun again"
    )
    assert made >= images and run.hits["node lost"] and run.hits["raised"] and run.redone <= 2 * sum(run.hits.values())
