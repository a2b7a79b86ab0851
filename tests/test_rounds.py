"""The quota: rounds are a function of committed labels, and the training set is the first accepted by number."""

from __future__ import annotations

import random

import pandas as pd
from hypothesis import given
from hypothesis import strategies as st

from jobs import config, rounds
from jobs.plan import Run
from jobs.stages import generate
from jobs.unit import Files, Table, commit
from vhs.measure import CLASSES


def _run(tmp_path, *overrides: str, **generation) -> Run:
    """A run in which a generator of two sources and a labeller are committed, and generation is next."""
    settings = config.load("debug/demo", [*overrides, *(f"generation.{key}={value}" for key, value in generation.items())])
    run = Run(str(tmp_path / "run"), settings)
    for stage in ("dreambooth", "labeller"):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "weights").write_text("w")
        from jobs.unit import Unit

        unit = Unit(stage, f"{stage}/split", "json", {}, {"scope": "split"}, {})
        commit(run.storage, unit, Files({"sources": ["a/b", "jsrt"]}), tmp_path / stage)
        run._fixed = {**getattr(run, "_fixed", {}), stage: [unit]}
    _see(run)
    return run


def _see(run):
    run.refresh()
    run._units.update(run._fixed)


def _finish(run, units, accepted):
    """Commit the shard and the labels of `units`; `accepted(unit)` -> accepted images of each measured class."""
    import pyarrow as pa

    from jobs.stages import label
    from jobs.unit import Shard
    from shards.sample import Sample, sample_key

    for unit in units:
        data = unit.path.encode()
        scratch = run.storage.root.parent / "scratch"
        commit(run.storage, unit, Shard([Sample(sample_key(data), {"png": data})], pa.table({"number": [0]})), scratch)
        run.names.add(unit.marker)
        commit(run.storage, label.unit(run, unit), Table(pa.table({"key": ["k"]}), {"images": 8, "accepted": accepted(unit)}), scratch)
    _see(run)


def _new(run, seen):
    return [unit for unit in rounds.units(run, "split") if unit.identity not in seen]


def test_rounds_ask_for_what_is_short_until_the_quota(tmp_path):
    run = _run(tmp_path, quota=6, round_units=2, max_rounds=5)
    first = rounds.units(run, "split")
    assert [(u.params["class"], u.params["number"]) for u in first] == [(c, n) for c in CLASSES for n in (0, 1)]
    assert [u.identity for u in rounds.units(run, "split")] == [u.identity for u in first], "listed again, not anew"
    _finish(run, first, lambda u: {"small": 0, "normal": 1, "large": 1})  # by measured class: 6 units give 0, 6, 6
    second = _new(run, {u.identity for u in first})
    assert [(u.params["class"], u.params["number"]) for u in second] == [("small", 2), ("small", 3)]
    _finish(run, second, lambda u: {"small": 3, "normal": 0, "large": 0})
    assert rounds.units(run, "split") == first + second, "the quota is met"
    assert not run.storage.exists("rounds/split/002.json")


def test_by_source_every_class_and_source_has_a_quota(tmp_path):
    prompt = "dreambooth.instance_prompt=a {token} {size} heart on {source} film"
    run = _run(tmp_path, prompt, quota=6, round_units=1, max_rounds=3, by_source=True)
    first = rounds.units(run, "split")
    assert [unit.path for unit in first] == [f"generated/split/{c}-{s}/00000" for c in CLASSES for s in ("a%2Fb", "jsrt")]
    assert rounds.quota_of_a_class(run, "split") == 12
    drawn = {(unit.params["class"], unit.params["source"]): generate.wanted(run.config, unit.params) for unit in first}
    assert drawn["large", "a/b"][0].prompt == "a sks large heart on a/b film"
    assert len({w.seed for images in drawn.values() for w in images}) == 6 * run.config.generation.unit_images
    _finish(run, first, lambda u: {"small": 6, "normal": 6, "large": 0 if u.params["source"] == "jsrt" else 6})
    second = _new(run, {u.identity for u in first})
    assert [(u.params["class"], u.params["source"]) for u in second] == [("large", "jsrt")]
    table = pd.DataFrame({"key": list("abcdef"), "number": range(6), "prompted": "large", "source": ["jsrt", "a/b"] * 3})
    labels = pd.DataFrame({"key": list("abcdef"), "label": 2, "accepted": True})
    assert rounds.accepted(table, labels, 2).key.tolist() == list("abcd")


def test_without_sources_nothing_of_a_unit_s_name_changes(tmp_path):
    unit = rounds.units(_run(tmp_path), "split")[0]
    assert (unit.path, unit.params) == ("generated/split/small/00000", {"scope": "split", "class": "small", "number": 0})


def test_rounds_end_at_the_plan_s_bound(tmp_path):
    run = _run(tmp_path, quota=6, round_units=1, max_rounds=3)
    seen: list = []
    while new := _new(run, {u.identity for u in seen}):
        seen += new
        _finish(run, new, lambda u: dict.fromkeys(CLASSES, 0))
    assert len(seen) == 3 * 3


def test_a_round_is_not_listed_before_the_last_one_is_labelled(tmp_path):
    run = _run(tmp_path, quota=6, round_units=1, max_rounds=3)
    first = rounds.units(run, "split")
    _finish(run, first[:-1], lambda u: dict.fromkeys(CLASSES, 0))
    assert len(rounds.units(run, "split")) == len(first) and not run.storage.exists("rounds/split/001.json")


@given(
    st.lists(
        st.tuples(st.integers(0, 30), st.sampled_from(CLASSES), st.integers(0, 2), st.booleans()), max_size=40, unique_by=lambda t: t[:2]
    ),
    st.integers(1, 6),
    st.randoms(),
)
def test_the_training_set_is_the_first_accepted_by_number(images, quota, shuffler: random.Random):
    generated = pd.DataFrame(
        [{"key": f"{p}{n}", "number": n, "prompted": p, "source": None} for n, p, _, _ in images],
        columns=["key", "number", "prompted", "source"],
    )
    labels = pd.DataFrame(
        [{"key": f"{p}{n}", "label": c, "accepted": ok} for n, p, c, ok in images], columns=["key", "label", "accepted"]
    ).astype({"accepted": bool})
    chosen = rounds.accepted(generated, labels, quota)
    arrived = shuffler.sample(range(len(images)), len(images))
    assert set(chosen.key) == set(rounds.accepted(generated.iloc[arrived], labels, quota).key), "arrival does not matter"
    for label in range(3):
        wanted = sorted((n, CLASSES.index(p), f"{p}{n}") for n, p, c, ok in images if ok and c == label)[:quota]
        assert chosen[chosen.label == label].key.tolist() == [key for _, _, key in wanted]
