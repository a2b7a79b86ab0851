"""Units of several ranks on several nodes, and many units side by side, on a real SLURM: what one would get from one process, and in one unit's time."""

from __future__ import annotations

import json
import statistics
from datetime import datetime

import pytest
from cluster import until
from conftest import ROOT, vhs
from test_chain import SITE, begin, ended, jobs, on
from test_slurm_scripts import submit

from jobs import config, plan

STILL = "rotation_deg zoom shift gamma randaugment".split()  # augmentation draws for each rank; without it a classifier's curve hangs on no rank
CLASSIFIER = ("classifier.model=test_convnext", "classifier.batch=6", "classifier.drop_rate=0", "classifier.flip=false")  # of layer norm, not batch norm
CURVE = (*CLASSIFIER, *(f"classifier.{name}=0" for name in STILL), "classifier.keep=last", "classifier.schedule=cosine", "classifier.epochs=6")
FEW = ("arms=[real-matched,mixed]", "seeds=[0]", "generation.max_rounds=1", "execution.checkpoint_steps=1000")
ALIKE = 1e-4  # of a classifier's losses, until rounding grows: after 110 steps, at a loss of 0.03, 5e-4 was seen
NOISY = 0.15  # of DreamBooth's mean loss, whose noise is drawn for each rank


def _markers(run, stage: str) -> list:
    opened = plan.reopen(str(run))
    return [opened.marker(path) for path in opened.committed(stage)]


def _curves(run, stage: str) -> list[list[dict]]:
    return [json.loads((run / marker.folder / "curve.json").read_text()) for marker in _markers(run, stage)]


def _mean(curve: list[dict]) -> float:
    return statistics.mean(row["instance_loss"] + row["prior_loss"] for row in curve)


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("sharding", ["null", "zero2"])
@pytest.mark.parametrize("backend", ["slurm", "ray"])
def test_two_nodes_of_two_ranks_learn_what_one_process_learns(backend, sharding, cluster, reference, tmp_path, figure):
    """DreamBooth and the classifiers; no global batch of a classifier is a multiple of its ranks. (That the bytes are those of four ranks here:
    test_chain, test_actors.)"""
    steps, ranks = ("dreambooth.steps=40", *CURVE, *FEW), ("dreambooth.ranks=4", "classifier.ranks=4")
    shared = (f"dreambooth.sharding={sharding}", f"classifier.sharding={sharding}")
    there = begin(tmp_path / "there", reference, *steps, *ranks, *shared)
    if backend == "slurm":
        on(cluster, "stage", "train", there.url, *SITE)
        wide = [row for row in ended(cluster, tmp_path / "there") if "," in row["NodeList"] or "-" in row["NodeList"]]
        assert len(wide) >= 2, "the jobs of both stages have two nodes"
    else:
        submit(cluster, tmp_path, "ray.sbatch", "vhs", "stage", "train", there.url, "--on", "ray", stage="generate", options="--nodes=2")
    engines = [marker.facts["trained_by"] for stage in ("dreambooth", "train") for marker in _markers(tmp_path / "there", stage)]
    assert len(engines) == 3 and {engine["ranks"] for engine in engines} == {4}
    if sharding == "null":
        assert {engine["engine"] for engine in engines} == {"DistributedDataParallel"}
    else:
        assert {(engine["engine"], engine["zero_stage"]) for engine in engines} == {("DeepSpeedEngine", 2)}
        assert all(engine["moments_held"] == pytest.approx(0.25, abs=0.02) for engine in engines), engines

    alone = begin(tmp_path / "alone", tmp_path / "there", *steps, "dreambooth.ranks=4", f"dreambooth.sharding={sharding}")
    once = begin(tmp_path / "once", reference, *steps)
    vhs("stage", "train", alone.url)  # the classifiers of one process, on the very images
    vhs("stage", "dreambooth", once.url)
    ours, theirs = (_curves(tmp_path / name, "train") for name in ("there", "alone"))
    pairs = [(row["loss"], other["loss"]) for mine, other in zip(ours, theirs, strict=True) for row, other in zip(mine, other, strict=True)]
    off = max(abs(a - b) / abs(b) for a, b in pairs)
    (drawn,), (undivided,) = (_curves(tmp_path / name, "dreambooth") for name in ("there", "once"))
    noise = abs(_mean(drawn) / _mean(undivided) - 1)
    figure(f"{backend}, {sharding}: {len(pairs)} losses of {len(ours)} classifiers within {off:.1e} of one process's, DreamBooth's mean loss {noise:.1%} off")
    assert len(pairs) > 20 and off < ALIKE and noise < NOISY


SLEEPER = """
import time

import jobs.stages.train as stage

train = stage.work

def work(config, inputs, output):
    time.sleep(60)
    return train(config, inputs, output)

stage.work = work
"""


@pytest.mark.slow
def test_folds_and_arms_take_the_time_of_one(cluster, tmp_path, figure):
    """Sleep-bound, as on nodes of their own: this machine has fewer cores than the cluster claims. The times are accounting's."""
    run = tmp_path / "run"
    opened = plan.start(config.load("debug/demo", ["split.folds=3", "arms=[real-matched,mixed]", "seeds=[0]"]), str(run))
    vhs("stage", "label", run)
    planted = tmp_path / "planted"
    planted.mkdir()
    (planted / "sitecustomize.py").write_text(SLEEPER)
    on(cluster, "stage", "train", run, *SITE, environment={"PYTHONPATH": f"{planted}:{ROOT}"})
    ended(cluster, run)
    ids = ",".join({job["id"].partition("_")[0] for job in jobs(run)})
    fields = ["JobID", "State", "Start", "End", "ElapsedRaw"]

    def rows() -> list[list[str]] | None:
        lines = cluster.run(["sacct", "-X", "-n", "-P", f"--jobs={ids}", f"--format={','.join(fields)}"]).splitlines()
        found = [line.split("|") for line in lines]
        return found if len(found) == 8 and all(row[1] == "COMPLETED" for row in found) else None

    found = until(rows, "accounting has eight completed jobs")
    moments = [[datetime.fromisoformat(text).timestamp() for text in row[2:4]] for row in found]
    wall, slowest = max(end for _, end in moments) - min(start for start, _ in moments), max(int(row[4]) for row in found)
    units = [unit for unit in plan.reopen(opened.url).units("train")]
    figure(f"4 scopes x 2 arms, {len(found)} jobs: {wall:.0f} s in all, the slowest {slowest} s, ratio {wall / slowest:.2f}")
    assert len(units) == 8 and slowest >= 60 and wall <= 1.3 * slowest
