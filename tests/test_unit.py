"""A unit's identity is its work; its product appears once."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from jobs.unit import Files, Table, Unit, commit, read_marker
from shards.storage import open_storage

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
UNITS = st.builds(
    Unit,
    stage=st.sampled_from(["train", "label"]),
    path=st.sampled_from(["a", "b/c"]),
    kind=st.just("json"),
    science=st.dictionaries(st.text(max_size=3), VALUES, max_size=3),
    params=st.dictionaries(st.text(max_size=3), VALUES, max_size=3),
    inputs=st.dictionaries(
        st.sampled_from(["real", "labels"]),
        st.lists(st.tuples(st.text(max_size=3), st.text(max_size=3)), max_size=2).map(tuple),
        max_size=2,
    ),
)


@given(UNITS)
def test_identity_survives_json_and_the_order_of_keys(unit):
    travelled = json.loads(json.dumps({"science": dict(reversed(unit.science.items())), "params": unit.params}))
    again = replace(unit, science=travelled["science"], params=travelled["params"], inputs=dict(reversed(unit.inputs.items())))
    assert again.identity == unit.identity and unit.identity in unit.marker


@given(UNITS, VALUES)
def test_identity_tells_science_params_inputs_and_name_apart(unit, value):
    others = [
        replace(unit, science={**unit.science, "new": value}),
        replace(unit, params={**unit.params, "new": value}),
        replace(unit, path=unit.path + "x"),
        replace(unit, stage=unit.stage + "x"),
        replace(unit, inputs={**unit.inputs, "new": (("m", "sha"),)}),
    ]
    assert len({unit.identity, *(other.identity for other in others)}) == 6


def test_ranks_and_where_an_input_lies_are_no_identity():
    unit = Unit("train", "a", "json", {}, {}, {"real": (("here", "sha"),)})
    assert replace(unit, ranks=4).identity == unit.identity  # the number of ranks is in the science of the stages it matters to
    assert replace(unit, inputs={"real": (("there", "sha"),)}).identity == unit.identity


def _files(tmp_path: Path, name: str, text: str) -> Path:
    folder = tmp_path / name
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "weights.bin").write_text(text)
    return folder


def test_files_are_committed_whole_and_the_first_attempt_stands(tmp_path):
    storage, unit = open_storage(tmp_path / "run"), Unit("train", "classifier/real", "json", {"a": 1}, {}, {})
    assert commit(storage, unit, Files({"steps": 3}), _files(tmp_path, "first", "one"))
    assert not commit(storage, unit, Files({"steps": 4}), _files(tmp_path, "second", "two"))
    marker = read_marker(storage, unit.marker)
    assert marker.facts == {"steps": 3} and marker.files == {"sub/weights.bin": hashlib.sha256(b"one").hexdigest()}
    assert storage.read(f"{marker.folder}/sub/weights.bin") == b"one"


def test_a_table_is_its_own_marker(tmp_path):
    storage, unit = open_storage(tmp_path / "run"), Unit("label", "labels/split/00000", "parquet", {}, {"n": 0}, {})
    assert commit(storage, unit, Table(pa.table({"key": ["a"]}), {"images": 1}), tmp_path)
    assert not commit(storage, unit, Table(pa.table({"key": ["b"]}), {"images": 2}), tmp_path)
    assert read_marker(storage, unit.marker).facts == {"images": 1}
