"""Every sample once per epoch, on any number of ranks, from any point on."""

from __future__ import annotations

import multiprocessing
import os
import pickle
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards import manifest
from shards.reader import DamagedShard, ShardReader, batches, deck, permutation, stream
from shards.sample import Sample, sample_key
from shards.storage import open_storage
from shards.writer import commit_shard

sizes = st.integers(0, 60)
ranks = st.integers(1, 9)
seeds = st.integers(0, 2**40)


pairs = st.booleans()


@given(n=sizes, batch=st.integers(1, 70), world=ranks, seed=seeds, epoch=st.integers(0, 50), pair=pairs)
def test_every_sample_once_per_epoch_on_any_ranks(n, batch, world, seed, epoch, pair):
    order = permutation(n, seed, epoch)
    shares = [list(batches(order, batch, rank, world, 0, pair)) for rank in range(world)]
    assert {len(share) for share in shares} == {-(-n // batch)}
    for step, together in enumerate(zip(*shares, strict=True)):
        real = np.concatenate([indices[weights == 1] for indices, weights, _ in together])
        alone = pair and n > batch > 2 and n % batch == 1  # the last batch's only row
        begin, end = (edge - (alone and edge == n - 1) for edge in (step * batch, min((step + 1) * batch, n)))
        assert real.tolist() == order[begin:end].tolist() and (len(real) > 1 or n == 1 or batch <= 2 or not pair)
        assert {total for *_, total in together} == {len(real)} and sum(weights.sum() for _, weights, _ in together) == len(real)
        assert all(len(indices) == len(weights) >= 1 and set(weights) <= {0, 1} for indices, weights, _ in together)
        padded = [weights for _, weights, _ in together if not weights.all()]
        assert all(len(weights) == 1 for weights in padded) and len(padded) == max(0, world - len(real))


@pytest.mark.parametrize(
    ("n", "batch", "expected"),
    [(9, 4, [4, 3, 2]), (4, 3, [2, 2]), (5, 2, [2, 2, 1]), (3, 1, [1, 1, 1]), (1, 4, [1]), (8, 4, [4, 4]), (10, 4, [4, 4, 2]), (0, 4, [])],
)
def test_the_last_batch_of_an_epoch_is_not_one_image(n, batch, expected):
    assert [total for *_, total in batches(np.arange(n), batch, 0, 1, pair_last=True)] == expected


@given(n=sizes, batch=st.integers(1, 20), world=ranks, rank=st.integers(0, 8), start=st.integers(0, 70), pair=pairs)
def test_resume_is_the_tail_of_the_undisturbed_sequence(n, batch, world, rank, start, pair):
    order = permutation(n, 3, 4)
    whole, tail = (list(batches(order, batch, rank % world, world, first, pair)) for first in (0, start))
    assert [(i.tolist(), w.tolist(), t) for i, w, t in tail] == [(i.tolist(), w.tolist(), t) for i, w, t in whole[start:]]


@given(n=st.integers(1, 60), batch=st.integers(1, 20), world=ranks, other=ranks, start=st.integers(0, 5), pair=pairs)
def test_a_run_may_go_on_with_other_ranks(n, batch, world, other, start, pair):
    order = permutation(n, 1, 0)
    before = [i for rank in range(world) for i, w, _ in list(batches(order, batch, rank, world, 0, pair))[:start] if w.all()]
    after = [i for rank in range(other) for i, w, _ in batches(order, batch, rank, other, start, pair) if w.all()]
    assert sorted(np.concatenate(before + after).tolist()) == list(range(n))


@given(n=sizes, seed=seeds, epoch=st.integers(0, 1000))
def test_permutation_is_one_and_depends_on_its_arguments_alone(n, seed, epoch):
    order = permutation(n, seed, epoch)
    assert sorted(order.tolist()) == list(range(n))
    assert (order == permutation(n, seed, epoch)).all()


def test_permutations_differ_by_seed_and_epoch_and_never_change():
    seen = {tuple(permutation(20, seed, epoch)) for seed in range(20) for epoch in range(20)}
    assert len(seen) == 400
    # A resumed run reads on in this order: it must not change with NumPy or with this file.
    assert permutation(10, 137, 0).tolist() == [7, 6, 9, 0, 1, 4, 3, 2, 5, 8]
    assert deck(np.arange(9) % 3, (0.2, 0.3, 0.5), 10, 137, 2).tolist() == [5, 2, 5, 3, 7, 8, 6, 2, 1, 4]


@settings(deadline=None)
@given(
    classes=st.lists(st.integers(0, 2), min_size=1, max_size=30), weights=st.tuples(*[st.integers(0, 10)] * 3),
    n=st.integers(1, 80), epochs=st.integers(1, 6), seed=seeds,
)
def test_a_deck_deals_each_class_its_share_and_each_row_its_turn(classes, weights, n, epochs, seed):
    classes = np.array(classes)
    shares = np.where(np.isin(range(3), classes), np.array(weights) + 1e-3, 0)
    prior = shares / shares.sum()
    used: Counter = Counter()
    for epoch in range(epochs):
        order = deck(classes, prior, n, seed, epoch)
        assert len(order) == n and (order == deck(classes, prior, n, seed, epoch)).all()
        counts = np.bincount(classes[order], minlength=3)
        assert (abs(counts - n * prior) < 1).all()
        used.update(order.tolist())
        for number in range(3):
            turns = [used[row] for row in np.flatnonzero(classes == number)]
            assert not turns or max(turns) - min(turns) <= 1


def test_a_deck_over_its_own_prior_is_a_permutation():
    classes = np.repeat([0, 1, 2], [2, 5, 3])
    for epoch in range(5):
        assert sorted(deck(classes, (0.2, 0.5, 0.3), 10, 1, epoch).tolist()) == list(range(10))


def test_the_largest_remainders_get_the_rest():
    classes = np.arange(300) % 3
    assert np.bincount(classes[deck(classes, (1 / 3, 1 / 3, 1 / 3), 100, 0, 0)]).tolist() == [34, 33, 33]
    assert np.bincount(classes[deck(classes, (0.15, 0.41, 0.44), 120, 0, 0)]).tolist() == [18, 49, 53]


def test_decks_that_cannot_be_dealt_are_refused():
    for classes, prior, n, message in (
        ([0, 0, 1], (0.5, 0.3, 0.2), 10, "class 2 has the prior 0.2 but no rows"), ([0, 1], (0.5, 0.6), 10, "add up to 1"),
        ([0, 3], (0.5, 0.5), 10, "legal are 0 to 1"), ([0, 1], (1.5, -0.5), 10, "add up to 1"), ([0, 1], (0.5, 0.5), 0, "one draw"),
    ):
        with pytest.raises(ValueError, match=message):
            deck(np.array(classes), prior, n, 0, 0)


def test_batches_refuse_ranks_outside_the_world():
    for arguments in ((0, 0, 1), (4, 2, 2), (4, -1, 2), (4, 0, 1, -1)):
        with pytest.raises(ValueError, match="want batch >= 1"):
            next(batches(np.arange(4), *arguments))


@pytest.fixture
def reader(tmp_path) -> ShardReader:
    storage = open_storage(tmp_path / "run")
    for number in range(3):
        images = [f"image {number} {n} ".encode() * (50 + n) for n in range(7)]
        samples = [Sample(sample_key(image), {"png": image, "txt": b"x"}) for image in images]
        commit_shard(storage, "g", number, "id", samples, pa.table({"image": images}), {}, tmp_path / "scratch")
    table = manifest.load(storage, "g")
    reader = ShardReader(storage, table)
    reader.expected = table["image"].to_pylist()
    return reader


def test_reads_by_row_in_any_view(reader):
    table = manifest.load(reader.storage, "g").take(permutation(len(reader), 5, 5)[:9])
    view = ShardReader(reader.storage, table)
    assert len(view) == 9 and view.keys == table["key"].to_pylist()
    assert [view.read(i, check=True) for i in range(9)] == table["image"].to_pylist()
    assert len(ShardReader(reader.storage, table.slice(0, 0))) == 0


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("read_ahead", [0, 2, 50])
def test_stream_is_batches_with_bytes_in_order(reader, workers, read_ahead):
    order = permutation(len(reader), 0, 0)
    streamed = list(stream(reader, order, 4, 1, 2, start=2, workers=workers, read_ahead=read_ahead))
    plain = list(batches(order, 4, 1, 2, start=2))
    assert len(streamed) == len(plain) == 4
    for (indices, weights, total, data), (expected, same_weights, same_total) in zip(streamed, plain, strict=True):
        assert (indices == expected).all() and (weights == same_weights).all() and total == same_total
        assert data == [reader.expected[i] for i in indices]


def test_a_stream_left_early_reads_again(reader):
    order = permutation(len(reader), 0, 0)
    for _ in range(3):
        running = stream(reader, order, 2, 0, 1, workers=2, read_ahead=3)
        assert next(running)[3] == [reader.expected[i] for i in order[:2]]
        running.close()


def send_images(reader: ShardReader, pipe) -> None:
    pipe.send([reader.read(i) for i in range(len(reader))])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_reader_in_use_goes_to_other_processes(reader, method):
    reader.read(0)
    assert pickle.loads(pickle.dumps(reader)).read(20) == reader.expected[20]
    context = multiprocessing.get_context(method)
    receiving, sending = context.Pipe(duplex=False)
    child = context.Process(target=send_images, args=(reader, sending))
    child.start()
    assert receiving.poll(60) and receiving.recv() == reader.expected
    child.join()


def test_more_shards_than_open_files(tmp_path):
    storage = open_storage(tmp_path)
    names = [f"tars-{n}" for n in range(300)]
    for n, name in enumerate(names):
        (tmp_path / name).write_bytes(b"%03d" % n)
    many = pa.table({"key": names, "path": names, "offset": [0] * 300, "size": [3] * 300, "sha256": [""] * 300})
    reader, before = ShardReader(storage, many), len(os.listdir("/proc/self/fd"))
    assert [reader.read(i) for i in (*range(300), *range(300))] == [b"%03d" % n for n in range(300)] * 2
    assert len(os.listdir("/proc/self/fd")) <= before + 256


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tar: tar[:2000], "0 of 560 bytes are there"), (lambda tar: tar[: tar.rindex(b"image 1 6") + 5], "of 560 bytes are there"),
        (lambda tar: b"", "0 of 560"), (lambda tar: tar.replace(b"image 1 6", b"damage!!!"), "sha256 is"),
    ],
)
def test_damage_is_named_by_shard_key_and_offset(reader, damage, message):
    row = manifest.load(reader.storage, "g").to_pylist()[13]
    reader.storage.put(row["path"], damage(reader.storage.read(row["path"])))
    with pytest.raises(DamagedShard, match=message) as error:
        reader.read(13, check=True)
    assert all(part in str(error.value) for part in (row["path"], row["key"], f"offset {row['offset']}"))
    assert reader.read(0, check=True) == reader.expected[0]


def test_a_missing_tar_is_named(reader):
    path = manifest.load(reader.storage, "g")["path"][0].as_py()
    reader.storage.delete(path)
    with pytest.raises(DamagedShard, match=path):
        reader.read(0)
