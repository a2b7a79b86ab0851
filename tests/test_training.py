"""The supervised loop: one curve whatever is interrupted, one gradient however the batch is spread, each key predicted once."""

from __future__ import annotations

import functools
import itertools
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from shards import reader
from vhs import augmentation, checkpoint, radiograph, training
from vhs.curve import Curve
from vhs.networks import build_classifier
from vhs.settings import Classifier

IMAGES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (22, 1, 16, 16), np.uint8))
LABELS = (IMAGES.float().mean((1, 2, 3)) * 7).long() % 3
BATCH, STEPS_PER_EPOCH = 7, 4  # the last batch of an epoch holds one image


def tiny(dropout: float = 0.5) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 4, 3, 2), nn.ReLU(), nn.Flatten(), nn.Dropout(dropout), nn.Linear(196, 3))


def batches(epoch: int, start: int, rank: int = 0, ranks: int = 1):
    """Every image once an epoch; each rank takes every ranks-th of a global batch and pads to the longest share."""
    order = np.random.default_rng([7, epoch]).permutation(len(IMAGES))
    for step in range(start, STEPS_PER_EPOCH):
        whole = order[step * BATCH : (step + 1) * BATCH]
        mine, longest = whole[rank::ranks], -(-len(whole) // ranks)
        rows = np.concatenate([mine, np.repeat(whole[:1], longest - len(mine))])
        weight = torch.tensor([1.0] * len(mine) + [0.0] * (longest - len(mine)))
        yield {"image": IMAGES[rows], "label": LABELS[rows], "weight": weight, "total": len(whole), "key": [f"{row:02d}" for row in rows]}


class Tape(checkpoint.Silent):
    """Keeps the losses and the state after step `keep`; resumes from `state`; stops the loop after step `stop`."""

    def __init__(self, state: dict | None = None, stop: int = 10**9):
        self.state, self.stop, self.losses, self.kept = state, stop, [], None

    def resume(self):
        return self.state

    def step(self, step, total, metrics, capture):
        self.losses.append(metrics["loss"])
        if step == self.stop:
            self.kept = capture()
            raise KeyboardInterrupt



@pytest.mark.parametrize("model", ["mobilenetv4_conv_small", "levit_128s"])
def test_an_epoch_that_is_one_image_more_than_whole_batches_trains_models_that_norm_pooled_features(model):
    """Their batch norms see one value an image and channel: over a batch of one image they raise."""
    choice = Classifier(model=model, weights="scratch", head_hidden=0, size_px=224 if model.startswith("levit") else 32)
    images = torch.randint(0, 256, (9, 1, choice.size_px, choice.size_px), dtype=torch.uint8, generator=training.generator(0))

    def drawn(epoch: int, start: int):
        for rows, weights, total in reader.batches(reader.permutation(len(images), 0, epoch), 4, 0, 1, start, pair_last=True):
            yield {"image": images[rows], "label": LABELS[rows], "weight": torch.from_numpy(weights), "total": total}

    training.fit(
        build_classifier(choice), training.cross_entropy(), drawn, steps=3, steps_per_epoch=3, learning_rate=1e-4, weight_decay=0.0,
        accelerator=Accelerator(cpu=True), progress=checkpoint.Silent(), seed=0, size_px=choice.size_px,
    )  # fmt: skip


def train(progress, steps=8, model=None, source=batches, **changes):
    options = dict(steps=steps, steps_per_epoch=STEPS_PER_EPOCH, learning_rate=1e-2, weight_decay=0.01, seed=3)
    options |= {"accelerator": Accelerator(cpu=True), "loss": training.cross_entropy(0.1)} | changes
    return training.fit(model or tiny(), batches=source, progress=progress, **options)


def validation(accelerator=None, rank=0, ranks=1):
    """The inner validation of this file: the first 14 images with their labels."""
    labels = {f"{row:02d}": int(label) for row, label in enumerate(LABELS)}
    first = lambda: itertools.islice(batches(0, 0, rank, ranks), 2)  # noqa: E731
    return training.inner_validation(first, labels, accelerator or Accelerator(cpu=True), 16)


ROTATED = functools.partial(radiograph.augment, rotation_deg=10, zoom=0.1, shift=0.05, flip=(), gamma=0.2)


@pytest.mark.parametrize("stop", [1, 4, 6])
def test_a_run_resumed_anywhere_follows_its_curve_to_the_bit(stop, tmp_path):
    whole, first = Tape(), Tape(stop=stop)
    expected = train(whole, augment=ROTATED)
    with pytest.raises(KeyboardInterrupt):
        train(first, augment=ROTATED)
    checkpoint.save(first.kept, tmp_path / "state.pt")
    torch.manual_seed(stop)  # nothing may depend on the process's own generator
    second = Tape(checkpoint.load(tmp_path / "state.pt"))
    model = train(second, augment=ROTATED)
    assert first.losses + second.losses == whole.losses
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), expected.state_dict().values(), strict=True))
    assert not model.training


def everything() -> dict:
    """Whatever the loop has to remember: plateau, best weights, curve; and draws of every kind."""
    return {
        "augment": augmentation.for_classifier(Classifier(randaugment=9), ()),
        "loss": training.cross_entropy(0.1, training.balanced_weights(np.bincount(LABELS))),
        "validate": validation(),
        "plateau": {"patience": 0, "factor": 0.3},
        "keep_best": True,
        "curve": Curve(STEPS),
    }


STEPS = 8 * STEPS_PER_EPOCH


@pytest.mark.parametrize("stop", [3, 4, 17, 24])
def test_plateau_best_weights_and_curve_are_resumed_to_the_bit(stop, tmp_path):
    whole, first, second = everything(), everything(), everything()
    expected = train(Tape(), steps=STEPS, **whole)
    with pytest.raises(KeyboardInterrupt):
        train(tape := Tape(stop=stop), steps=STEPS, **first)
    checkpoint.save(tape.kept, tmp_path / "state.pt")
    model = train(Tape(checkpoint.load(tmp_path / "state.pt")), steps=STEPS, **second)
    assert second["curve"].rows == whole["curve"].rows
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), expected.state_dict().values(), strict=True))
    rates = {row["learning_rate"] for row in whole["curve"].rows}
    assert len(rates) > 2, "the plateau never fell, so nothing is shown of it"


def test_the_global_generator_is_left_alone():
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    train(Tape(), augment=ROTATED)
    assert torch.equal(torch.rand(3), expected)


def test_seeds_change_the_draws():
    curves = [Tape(), Tape()]
    for seed, tape in enumerate(curves):
        train(tape, seed=seed)
    assert curves[0].losses != curves[1].losses


def test_padding_weighs_nothing():
    def padded(epoch, start):
        for batch in batches(epoch, start):
            white = torch.full((5, 1, 16, 16), 255, dtype=torch.uint8)
            junk = {"image": white, "label": torch.zeros(5, dtype=torch.int64), "weight": torch.zeros(5)}
            yield batch | {name: torch.cat([batch[name], extra]) for name, extra in junk.items()}

    plain, other = Tape(), Tape()
    a, b = train(plain, model=tiny(0)), train(other, model=tiny(0), source=padded)
    assert np.allclose(plain.losses, other.losses, rtol=1e-5)
    assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_it_learns():
    tape = Tape()
    model = train(tape, steps=100, model=tiny(0))
    assert np.mean(tape.losses[-5:]) < 0.8 * np.mean(tape.losses[:5])
    predicted = training.predict(model, batches(0, 0), Accelerator(cpu=True))
    assert (predicted["probability"].argmax(1) == LABELS.numpy()).mean() > 0.8


def scripted(losses: list[float], seen: list):
    """A validation that gives these losses one epoch after the other and keeps the weights it saw."""
    told = iter(losses)

    def validate(model):
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return {"validation_loss": next(told)}

    return validate


def rate_after(curve: Curve, epoch: int) -> float:
    return next(row["learning_rate"] for row in curve.rows if row["step"] == epoch * STEPS_PER_EPOCH + 1)


def test_the_rate_falls_where_the_validation_stands_still_and_nowhere_else():
    losses = [5.0, 4.0, 4.0, 4.0, 3.0, 3.0]
    curve = Curve(24)
    train(Tape(), steps=24, validate=scripted(losses, []), plateau={"patience": 1, "factor": 0.5}, curve=curve)
    assert [rate_after(curve, epoch) for epoch in range(6)] == [1e-2, 1e-2, 1e-2, 1e-2, 5e-3, 5e-3]
    assert [row["validation_loss"] for row in curve.rows if "validation_loss" in row] == losses
    steady = Curve(24)
    train(Tape(), steps=24, validate=scripted([6.0, 5.0, 4.0, 3.0, 2.0, 1.0], []), plateau={"patience": 1, "factor": 0.5}, curve=steady)
    assert {row["learning_rate"] for row in steady.rows} == {1e-2}


@pytest.mark.parametrize(("keep_best", "kept"), [(True, 1), (False, 3)])
def test_the_weights_kept_are_the_last_or_those_of_the_best_validation(keep_best, kept):
    seen = []
    model = train(Tape(), steps=16, validate=scripted([3.0, 1.0, 2.0, 1.0], seen), keep_best=keep_best)
    same = [all(torch.equal(state[name], value) for name, value in model.state_dict().items()) for state in seen]
    assert same == [epoch == kept for epoch in range(4)]


def test_a_plateau_needs_a_validation():
    for wish in ({"plateau": {"patience": 1}}, {"keep_best": True}):
        with pytest.raises(ValueError, match="give `validate`"):
            train(Tape(), **wish)


def test_inner_validation_is_the_plain_mean_over_its_images():
    model = tiny().eval()
    first = list(itertools.islice(batches(0, 0), 2))
    logits, label = (torch.cat(parts) for parts in ([model(batch["image"] / 255) for batch in first], [batch["label"] for batch in first]))
    found = validation()(model)
    assert found["validation_loss"] == pytest.approx(nn.functional.cross_entropy(logits, label).item(), rel=1e-5)
    assert found["validation_accuracy"] == pytest.approx((logits.argmax(1) == label).float().mean().item())


@given(st.lists(st.integers(0, 1000), min_size=3, max_size=3).filter(any))
def test_balanced_weights_give_every_class_the_same_part(counts):
    weights = training.balanced_weights(counts)
    parts = [weight * count for weight, count in zip(weights, counts)]
    assert sum(parts) == pytest.approx(sum(counts)) and {round(part, 6) for part in parts} <= {0.0, round(max(parts), 6)}
    assert [weight > 0 for weight in weights] == [count > 0 for count in counts]


def test_class_weights_multiply_each_sample():
    model, batch, draw = tiny(0), next(batches(0, 0)), torch.Generator()
    batch = batch | {"image": batch["image"] / 255}
    plain, weighted = (training.cross_entropy(0.0, weights)(model, batch, draw) for weights in (None, [2.0, 0.5, 0.0]))
    assert torch.allclose(weighted, plain * torch.tensor([2.0, 0.5, 0.0])[batch["label"]])


def test_batches_that_disagree_with_the_plan_are_an_error():
    with pytest.raises(ValueError, match="epoch 0 ended at batch 2 of its 4"):
        train(Tape(), source=lambda epoch, start: list(batches(epoch, start))[:2])


def test_a_loss_that_is_no_number_stops_the_run():
    model = tiny()
    nn.init.constant_(model[-1].weight, torch.nan)
    with pytest.raises(FloatingPointError, match="step 1 of 8"):
        train(Tape(), model=model)


@given(st.integers(1, 5000), st.floats(1e-6, 1))
@settings(deadline=None)
def test_schedule_warms_up_to_the_peak_and_falls_to_nothing(steps, peak):
    rates = [training.learning_rate_at(step, steps, peak) for step in range(steps)]
    top = int(np.argmax(rates))
    assert max(rates) <= peak * (1 + 1e-9) and min(rates) > 0 and rates[top] == pytest.approx(peak)
    assert (np.diff(rates[: top + 1]) >= 0).all() and (np.diff(rates[top:]) <= 1e-12).all()
    assert steps < 40 or rates[-1] < 0.01 * peak


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=4), st.lists(st.integers(0, 2**40), min_size=1, max_size=4))
def test_seeds_are_functions_of_their_numbers(a, b):
    assert training.seed_of(*a) == training.seed_of(*a)
    assert (training.seed_of(*a) == training.seed_of(*b)) == (np.trim_zeros(a, "b") == np.trim_zeros(b, "b"))


def test_predict_gives_each_key_once_and_without_padding():
    def twice():
        yield from batches(0, 0)
        yield from batches(0, 2)

    result = training.predict(tiny(), batches(0, 0, rank=0, ranks=3), Accelerator(cpu=True))
    assert result["key"] == sorted(result["key"]) and len(result["key"]) == 10 and result["probability"].shape == (10, 3)
    assert np.allclose(result["probability"].sum(1), 1, atol=1e-6)
    with pytest.raises(ValueError, match="8 keys were predicted more than once"):
        training.predict(tiny(), twice(), Accelerator(cpu=True))


def judged(curve: Curve, accelerator: Accelerator, rank: int = 0, ranks: int = 1) -> dict:
    """Class weights in the loss, and a plateau that falls at once, read off a validation that is shared out over the ranks."""
    weights = training.cross_entropy(0.0, [3.0, 0.5, 0.2])
    return {"loss": weights, "validate": validation(accelerator, rank, ranks), "plateau": {"patience": 0, "threshold": 1.0}, "curve": curve}


def _rank(rank: int, ranks: int, port: int, out: Path) -> None:
    place = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=ranks, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    os.environ |= {name: str(value) for name, value in place.items()}
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True, kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
    source, curve = functools.partial(batches, rank=rank, ranks=ranks), Curve(8)
    model = train(Tape(), model=tiny(0), source=source, accelerator=accelerator, **judged(curve, accelerator, rank, ranks))
    mine = list(batches(0, 0, rank, ranks))
    predicted = training.predict(model, mine, accelerator)
    uneven = training.predict(model, mine[:1] if rank else mine, accelerator)
    predicted["probability"] = torch.from_numpy(predicted["probability"])
    torch.save({"model": model.state_dict(), "curve": curve.rows, "uneven": len(uneven["key"]), **predicted}, out / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_take_the_gradient_of_one(tmp_path):
    """22 images in batches of 7 over 2 ranks: shares of 4 and 3, at last 1 and nothing but padding."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_rank, (2, port, tmp_path), nprocs=2)
    curve = Curve(8)
    model = train(Tape(), model=tiny(0), **judged(curve, Accelerator(cpu=True)))
    assert curve.rows[-1]["learning_rate"] < curve.rows[0]["learning_rate"]
    alone = training.predict(model, batches(0, 0), Accelerator(cpu=True))
    for rank in range(2):
        there = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(model.state_dict().values(), there["model"].values(), strict=True))
        for mine, theirs in zip(curve.rows, there["curve"], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-4)
        assert there["key"] == alone["key"] == [f"{row:02d}" for row in range(len(IMAGES))] and there["uneven"] == (4 + 4 + 4 + 1) + 3
        assert np.allclose(there["probability"], alone["probability"], atol=1e-5)


def test_a_checkpoint_is_whole_or_refused(tmp_path):
    file = tmp_path / "state.pt"
    checkpoint.save({"step": 4, "model": {"w": torch.arange(3)}}, file)
    assert checkpoint.load(file)["model"]["w"].tolist() == [0, 1, 2] and [entry.name for entry in tmp_path.iterdir()] == ["state.pt"]
    with pytest.raises(Exception, match="pickle"):
        checkpoint.save({"step": 5, "model": lambda: None}, file)
    assert checkpoint.load(file)["step"] == 4 and [entry.name for entry in tmp_path.iterdir()] == ["state.pt"]
    whole = file.read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="no whole checkpoint"):
            checkpoint.load(file)
    torch.save({"step": 1, "hook": tmp_path}, file)  # a path needs code to load
    with pytest.raises(ValueError, match="no whole checkpoint"):
        checkpoint.load(file)
