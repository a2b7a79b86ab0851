"""Two real gloo processes: data that does not divide evenly ends, each sample is trained on and answered once, and checkpoints resume."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from jobs import batches, world
from shards import manifest
from shards.sample import Sample, sample_key
from shards.storage import open_storage
from shards.writer import commit_shard
from vhs.settings import Classifier

IMAGES, BATCH = 23, 6  # 4 global batches, the last of 5: ranks get 3 and 2


def _dataset(folder):
    import pyarrow as pa

    from vhs.radiograph import encode_png

    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, (32, 32), dtype=np.uint8) for _ in range(IMAGES)]
    samples = [Sample(sample_key(encode_png(image)), {"png": encode_png(image)}) for image in images]
    columns = pa.table({"label": [n % 3 for n in range(IMAGES)]})
    commit_shard(open_storage(folder), "real", 0, "0" * 12, samples, columns, {}, folder / "scratch")


def _rank(folder: str, out: str):
    """One rank: train an epoch and a half, then predict; rank r writes what it trained on, rank 0 the joined predictions and the weights' sum."""
    import torch

    from vhs import training
    from vhs.checkpoint import Silent
    from vhs.networks import build_classifier

    torch.set_num_threads(1)
    storage = open_storage(folder)
    rows = manifest.load(storage, "real").to_pandas()
    accelerator = world.accelerator("cpu")
    epochs = batches.Epochs(storage, rows, BATCH, batches.shuffled(len(rows), seed=3))
    trained = []

    def noted(epoch, start):
        for batch in epochs(epoch, start):
            trained.append([epoch, [key for key, weight in zip(batch["key"], batch["weight"].tolist()) if weight]])
            yield batch

    settings = Classifier(model="resnet10t", weights="scratch", head_hidden=0, drop_rate=0.0, size_px=32)
    model = training.fit(
        build_classifier(settings, seed=0),
        training.cross_entropy(),
        noted,
        steps=6,
        steps_per_epoch=epochs.steps,
        learning_rate=1e-3,
        weight_decay=0.0,
        accelerator=accelerator,
        progress=Silent(),
        seed=0,
    )
    found = training.predict(model, batches.Epochs(storage, rows, BATCH, lambda epoch: np.arange(len(rows)))(0, 0), accelerator)
    weights = torch.cat([p.detach().ravel() for p in model.parameters()])
    record = {
        "trained": trained,
        "predicted": found["key"],
        "weights": [float(weights.sum()), float(weights.abs().sum())],
        "ranks": accelerator.num_processes,
    }
    with open(f"{out}/rank-{world.rank()}.json", "w") as file:
        json.dump(record, file)


def _in_two_halves(out: str):
    """One rank: six steps at once, and three in a first wrapper and three in a new one, as after a checkpoint; by our accelerator and by plain DDP."""
    import torch
    from torch.nn.parallel import DistributedDataParallel

    def trained(wrap, restarts: int) -> list[float]:
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(40, 60), torch.nn.Tanh(), torch.nn.Linear(60, 50), torch.nn.Tanh(), torch.nn.Linear(50, 3))
        for part in range(restarts):
            wrapped = wrap(net)
            for step in range(6 * part // restarts, 6 * (part + 1) // restarts):
                data = torch.Generator().manual_seed(100 * step + world.rank())
                wrapped(torch.randn(16, 40, generator=data)).square().mean().backward()
                with torch.no_grad():
                    for weight in net.parameters():
                        weight -= 0.5 * weight.grad
                        weight.grad = None
        return [float(weight.sum(dtype=torch.float64)) for weight in net.parameters()]

    torch.set_num_threads(1)
    accelerator = world.accelerator("cpu")
    found = {
        name: trained(wrap, 1) == trained(wrap, 2) for name, wrap in {"ours": accelerator.prepare_model, "plain": DistributedDataParallel}.items()
    }
    with open(f"{out}/halves-{world.rank()}.json", "w") as file:
        json.dump(found, file)


def test_three_ranks_add_up_in_the_same_order_after_a_restart(tmp_path):
    """Of two numbers the order is nothing; of three it shows in the last bit."""
    world.launch(3, _in_two_halves, str(tmp_path))
    assert [json.loads(file.read_text()) for file in sorted(tmp_path.iterdir())] == 3 * [{"ours": True, "plain": False}]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two ranks and, on the same data, one rank recorded."""
    folder = tmp_path_factory.mktemp("distributed")
    _dataset(folder)
    records = {}
    for number in (2, 1):
        out = folder / f"ranks-{number}"
        out.mkdir()
        if number > 1:
            world.launch(number, _rank, str(folder), str(out))
        else:
            _rank(str(folder), str(out))
        records[number] = [json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(number)]
    return records, set(manifest.load(open_storage(folder), "real").to_pandas().key)


def test_two_ranks_train_on_every_sample_once_an_epoch(ranks, figure):
    records, keys = ranks
    assert [record["ranks"] for record in records[2]] == [2, 2]
    assert len({len(record["trained"]) for record in records[2]}) == 1, "ranks took different numbers of steps"
    first_epoch = [key for record in records[2] for epoch, batch in record["trained"] if epoch == 0 for key in batch]
    figure(
        f"epoch 0 on two ranks: {len(first_epoch)} samples, {[sum(len(b) for e, b in r['trained'] if e == 0) for r in records[2]]} a rank"
    )
    assert len(first_epoch) == IMAGES and set(first_epoch) == keys


def test_predictions_are_joined_once(ranks):
    records, keys = ranks
    for record in records[2]:
        assert len(record["predicted"]) == IMAGES and set(record["predicted"]) == keys


def test_both_ranks_end_with_the_same_weights(ranks):
    first, second = ranks[0][2]
    assert first["weights"] == second["weights"]


def test_global_batches_do_not_depend_on_the_number_of_ranks(ranks):
    one, two = (
        pd.DataFrame(
            [(step, key) for record in ranks[0][n] for step, (_, batch) in enumerate(record["trained"]) for key in batch],
            columns=["step", "key"],
        )
        for n in (1, 2)
    )
    assert one.groupby("step").key.apply(sorted).tolist() == two.groupby("step").key.apply(sorted).tolist()


@pytest.mark.slow
def test_a_run_with_two_ranks_resumes_after_a_kill(tmp_path):
    """The classifier stage of the debug run on two ranks, its rank 0 killed in the middle of training, then finished by the same command."""
    from conftest import committed, vhs

    overrides = [
        "classifier.ranks=2",
        "arms=[real]",
        "generation.quota=1",
        "generation.max_rounds=1",
        "generation.unit_images=2",
        "generation.batch=2",
        "dreambooth.steps=1",
        "priors.images=3",
        "priors.steps=1",
        "generation.steps=1",
        "labeller.steps=0",
    ]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    printed = vhs("run", "debug/demo", *overrides, "--out", killed, environment={"VHS_CRASH_AT": "training-step:5"}, code=1)
    assert "train" in printed and not list(killed.glob("classifier/real/split/*.json")) and list(killed.glob("checkpoints/*/*.pt")), printed
    vhs("run", "debug/demo", *overrides, "--out", killed)
    vhs("run", "debug/demo", *overrides, "--out", whole)
    ours, theirs = committed(killed), committed(whole)
    assert len(theirs) > 0 and {n for n in theirs if ours[n] != theirs[n]} == set(), "two ranks repeat themselves on one machine"


def test_blas_that_was_loaded_first_has_the_runs_threads():
    """As in a worker of Ray, which loads numpy before any code of ours: a sum over more threads has other last bits."""
    count = "[pool['num_threads'] for pool in threadpool_info() if pool['user_api'] == 'blas']"
    program = f"import numpy; from threadpoolctl import threadpool_info; from jobs import world; print({count}); world.set_numerics(1); print({count})"
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")} | {"OPENBLAS_NUM_THREADS": "2"}
    printed = subprocess.run([sys.executable, "-c", program], env=environment, text=True, capture_output=True, check=True).stdout
    before, after = (json.loads(line) for line in printed.splitlines())
    assert set(before) == {2} and set(after) == {1}
