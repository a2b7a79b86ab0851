"""A training that other ranks go on with: in the middle of an epoch every sample is still seen once, and the curve is that of one process."""

from __future__ import annotations

import json
import os
import signal
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import vhs
from hypothesis import given, settings
from hypothesis import strategies as st
from test_distributed import BATCH, IMAGES, _dataset
from test_streaming import opened, shard

from jobs import batches, config, plan, world
from jobs.stages.train import _together
from shards import manifest
from shards.reader import permutation, stream
from shards.storage import open_storage
from vhs import checkpoint, training
from vhs.curve import Curve
from vhs.networks import build_classifier
from vhs.settings import Classifier

ranks = st.integers(1, 6)


@settings(deadline=None, max_examples=60)
@given(
    shards=st.lists(st.integers(1, 9), min_size=1, max_size=5), batch=st.integers(1, 12), before=ranks, after=ranks, workers=st.integers(0, 3),
    other_workers=st.integers(0, 3), stop=st.integers(0, 40), seed=st.integers(0, 2**40), epoch=st.integers(0, 9),
    pair=st.booleans(),
)  # fmt: skip
def test_each_image_is_read_once_an_epoch_by_ranks_that_change_in_it(shards, batch, before, after, workers, other_workers, stop, seed, epoch, pair):
    with tempfile.TemporaryDirectory() as folder:
        images = [f"{number} {n}".encode() for number, count in enumerate(shards) for n in range(count)]
        for number, count in enumerate(shards):
            shard(folder, number, [f"{number} {n}".encode() for n in range(count)])
        order = permutation(len(images), seed, epoch)
        stop = min(stop, -(-len(images) // batch))
        seen = []
        for world_size, first, last, threads in ((before, 0, stop, workers), (after, stop, None, other_workers)):
            for rank in range(world_size):
                mine = list(stream(opened(folder), order, batch, rank, world_size, first, threads, pair_last=pair))[: None if last is None else last - first]
                seen += [image for _, weights, _, some in mine for image, weight in zip(some, weights, strict=True) if weight]
        assert sorted(seen) == sorted(images)


@settings(deadline=None)
@given(
    real=st.lists(st.integers(0, 2), min_size=3, max_size=30), drawn=st.lists(st.integers(0, 2), min_size=3, max_size=60), batch=st.integers(1, 20),
    before=ranks, after=ranks, stop=st.integers(0, 30), seed=st.integers(0, 2**30), epochs=st.integers(1, 4),
)  # fmt: skip
def test_real_and_generated_are_mixed_exactly_whoever_goes_on(real, drawn, batch, before, after, stop, seed, epochs):
    """An epoch has as many draws of either origin as it has images, each class its share within one, each image its turn over the epochs."""
    real, drawn = pd.DataFrame({"label": [0, 1, 2, *real]}), pd.DataFrame({"label": [0, 1, 2, *drawn]})
    order = _together(real, drawn, len(real), len(drawn), [0.2, 0.3, 0.5], seed)
    labels, used = np.concatenate([real.label, drawn.label]), np.zeros(len(real) + len(drawn), int)
    for epoch in range(epochs):
        seen = []
        for world_size, first, last in ((before, 0, stop), (after, stop, None)):
            for rank in range(world_size):
                own = list(batches.reader.batches(order(epoch), batch, rank, world_size, first))[: None if last is None else last - first]
                seen += [i for indices, weights, _ in own for i in indices[weights == 1]]
        seen = np.array(seen)
        for rows, count in ((seen[seen < len(real)], len(real)), (seen[seen >= len(real)], len(drawn))):
            assert len(rows) == count
            assert (abs(np.bincount(labels[rows], minlength=3) - count * np.array([0.2, 0.3, 0.5])) < 1).all()
        used += np.bincount(seen, minlength=len(used))
    for part in (slice(0, len(real)), slice(len(real), None)):
        for number in range(3):
            turns = used[part][labels[part] == number]
            assert turns.max() - turns.min() <= 1


class Stopped(checkpoint.Silent):
    """Goes on from `file` if it is there; saves it at step `keep` and has every rank killed two steps later."""

    def __init__(self, file: Path, keep: int | None):
        self.file, self.keep = file, keep

    def resume(self):
        return checkpoint.load(self.file) if self.file.exists() else None

    def step(self, step, total, metrics, capture):
        if step == self.keep:
            state = capture()
            if world.rank() == 0:
                checkpoint.save(state, self.file)
        if self.keep and step == self.keep + 2:
            os.kill(os.getpid(), signal.SIGKILL)


STEPS, KEPT = 16, (5, 10)  # 4 to an epoch of 23 images in batches of 6: both lie within one
IN_PIECES = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}


def _part(folder: str, out: str, keep: int | None, sharding) -> None:
    """One rank of one of the launches; a line for each batch says its epoch, its number and its images."""
    import torch

    torch.set_num_threads(1)
    storage = open_storage(folder)
    rows = manifest.load(storage, "real").to_pandas()
    choice = Classifier(model="test_convnext", weights="scratch", head_hidden=0, drop_rate=0.0, size_px=32, sharding=sharding)  # of layer norm
    accelerator, curve = world.accelerator("cpu", "no", choice.sharding), Curve(STEPS)
    epochs = batches.Epochs(storage, rows, BATCH, batches.shuffled(len(rows), seed=3))
    with open(f"{out}/{world.size()} ranks, {world.rank()}.jsonl", "w", buffering=1) as trained:

        def noted(epoch, start):
            for number, batch in enumerate(epochs(epoch, start), start):
                trained.write(json.dumps([epoch, number, [key for key, weight in zip(batch["key"], batch["weight"].tolist()) if weight]]) + "\n")
                yield batch

        training.fit(
            build_classifier(choice, seed=0), training.cross_entropy(), noted, steps=STEPS, steps_per_epoch=epochs.steps, learning_rate=1e-3,
            weight_decay=0.01, accelerator=accelerator, progress=Stopped(Path(out) / "kept.pt", keep), seed=0, curve=curve, sharding=choice.sharding,
        )  # fmt: skip
    if world.rank() == 0:
        (Path(out) / "curve.json").write_text(json.dumps({"rows": curve.rows, "trained_by": curve.trained_by}))


@pytest.mark.slow
@pytest.mark.parametrize("sharding", [None, "zero2", IN_PIECES], ids=["ddp", "zero2", "zero3"])
@pytest.mark.parametrize("numbers", [(4, 2, 3), (2, 3, 4)], ids=str)
def test_a_checkpoint_goes_on_with_other_ranks(numbers, sharding, tmp_path, figure):
    """Killed twice by kill -9 in the middle of an epoch, two steps after a checkpoint, each time others going on."""
    _dataset(tmp_path)
    for name, launches in (("changing", zip(numbers, (*KEPT, None), strict=True)), ("alone", [(1, None)])):
        (tmp_path / name).mkdir()
        for number, keep in launches:
            try:
                world.launch(number, _part, str(tmp_path), str(tmp_path / name), keep, sharding if name == "changing" else None)
            except RuntimeError as error:
                assert keep and "SIGKILL" in str(error) or "exit -9" in str(error), error
            else:
                assert keep is None
    spans = {numbers[0]: range(KEPT[0]), numbers[1]: range(*KEPT), numbers[2]: range(KEPT[1], STEPS)}  # of steps whose outcome was kept
    seen = []
    for number, steps in spans.items():
        for rank in range(number):
            lines = [json.loads(line) for line in (tmp_path / "changing" / f"{number} ranks, {rank}.jsonl").read_text().splitlines()]
            seen += [(epoch, key) for epoch, batch, keys in lines if epoch * 4 + batch in steps for key in keys]
    keys = manifest.load(open_storage(tmp_path), "real")["key"].to_pylist()
    assert sorted(seen) == sorted((epoch, key) for epoch in range(4) for key in keys) and len(keys) == IMAGES
    ours, alone = (json.loads((tmp_path / name / "curve.json").read_text()) for name in ("changing", "alone"))
    pairs = [(row["loss"], other["loss"]) for row, other in zip(ours["rows"], alone["rows"], strict=True)]
    off = max(abs(a - b) / abs(b) for a, b in pairs)
    figure(f"{numbers} ranks one after the other: {len(seen)} samples of {4 * IMAGES}, {len(pairs)} losses within {off:.1e} of one process's")
    assert len(pairs) == STEPS and off < 1e-4
    assert [(part["ranks"], part["until"]) for part in ours["trained_by"]["before"]] == list(zip(numbers, KEPT))
    assert ours["trained_by"]["ranks"] == numbers[2] and "before" not in alone["trained_by"]


def test_ranks_are_science_unless_the_run_is_elastic():
    load = lambda *said: config.load("debug/demo", list(said))  # noqa: E731
    assert config.changed(load().science, load("classifier.ranks=2").science) == ["classifier.ranks"]
    elastic = load("elastic=true", "classifier.ranks=4", "execution.workers=2")
    assert elastic.science == load("elastic=true", "classifier.ranks=2").science != load().science
    assert config.Config.of(elastic.science, elastic.free) == elastic and config.Config.of(load().science, load().free) == load()


@pytest.mark.slow
def test_an_elastic_run_goes_on_with_other_ranks_by_the_same_command(tmp_path):
    """The classifier killed on four ranks, finished on three. The product says by how many it was trained, and until which step."""
    few = ("arms=[real]", "generation.quota=1", "generation.max_rounds=1", "generation.unit_images=2", "generation.batch=2", "dreambooth.steps=1",
           "priors.images=3", "priors.steps=1", "generation.steps=1", "labeller.steps=0", "execution.checkpoint_steps=2")  # fmt: skip
    said = ("run", "debug/demo", *few, "--out", tmp_path / "run")
    vhs(*said, "elastic=true", "classifier.ranks=4", environment={"VHS_CRASH_AT": "training-step:5"}, code=1)
    assert list((tmp_path / "run").glob("checkpoints/*/00000004.pt"))
    assert "elastic" in vhs(*said, "classifier.ranks=3", code=1), "a run is elastic from its beginning"
    vhs(*said, "elastic=true", "classifier.ranks=3")
    opened = plan.reopen(str(tmp_path / "run"))
    facts = [opened.marker(path).facts for path in opened.committed("train")]
    assert opened.config.classifier.ranks == 3 and " 0 errors" in vhs("verify", tmp_path / "run")
    assert [(one["trained_by"]["ranks"], [(part["ranks"], part["until"]) for part in one["trained_by"]["before"]]) for one in facts] == [(3, [(4, 4)])]
