"""A unit of work: its identity, what it makes, and how that becomes visible.

A unit's identity is a digest of the stage, its name, the science it reads and the digests of its inputs' markers, and it is part of the marker's
name: one listing of the run decides what is left to do. A unit is done when its marker exists; the marker is written last, create-if-absent, and
says what the unit made with the sha256 of every file. Two workers on one unit write the same names or different names, never over each other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from shards import crash, manifest, writer
from shards.sample import Sample
from shards.storage import Storage
from vhs.measure import CLASSES


def digest(value) -> str:
    """sha256 of the canonical JSON of `value`."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()).hexdigest()


@dataclass(frozen=True)
class Unit:
    """One thing to do. Plain values only: it travels to other processes and machines.

    `path`: where its product goes, below the run ("generated/fold-0/small/00003"). `kind`: what its product is ("json": files, "parquet": a shard
    or a table). `inputs`: role -> ((marker path, sha256), ...). `params`: what tells this unit from its siblings. `science`: the settings it reads.
    """

    stage: str
    path: str
    kind: str
    science: dict
    params: dict
    inputs: dict[str, tuple[tuple[str, str], ...]]
    ranks: int = 1
    apart: bool = False  # in processes of their own even if it is one: its libraries leave a process other than they found it

    @cached_property
    def identity(self) -> str:
        inputs = {role: [sha for _, sha in markers] for role, markers in self.inputs.items()}
        return digest([self.stage, self.path, self.science, self.params, inputs])[:12]

    @cached_property
    def marker(self) -> str:
        return f"{self.path}-{self.identity}.{self.kind}"


@dataclass(frozen=True)
class Files:
    """Product: everything the unit wrote into its output folder, and the facts worth knowing without opening it."""

    facts: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Shard:
    """Product: samples for one tar, with a row of `columns` for each."""

    samples: Iterable[Sample]
    columns: pa.Table
    facts: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """Product: one table."""

    table: pa.Table
    facts: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Marker:
    """A committed unit as its marker tells it. `folder`, `files` (relative path -> sha256) and `inputs` are those of a Files product,
    `shard` is the tar of a Shard product."""

    path: str
    sha256: str
    facts: dict
    shard: str = ""
    folder: str = ""
    files: dict = field(default_factory=dict)
    inputs: dict = field(default_factory=dict)


def read_marker(storage: Storage, path: str) -> Marker:
    """The marker at `path`, of either kind."""
    data = storage.read(path)
    sha256 = hashlib.sha256(data).hexdigest()
    if path.endswith(".parquet"):
        metadata = pq.read_schema(pa.BufferReader(data)).metadata
        return Marker(path, sha256, json.loads(metadata[b"facts"]), shard=metadata.get(b"shard", b"").decode())
    content = json.loads(data)
    return Marker(path, sha256, content["facts"], folder=content["folder"], files=content["files"], inputs=content["inputs"])


def commit(storage: Storage, unit: Unit, product: Files | Shard | Table, output: Path) -> bool:
    """Make `product` visible as `unit`'s, once. False when another attempt had already done so: its product stands."""
    if isinstance(product, Shard):
        folder, number = unit.path.rsplit("/", 1)
        about = _metadata(unit, product.facts)
        return writer.commit_shard(storage, folder, int(number), unit.identity, product.samples, product.columns, about, output)
    if isinstance(product, Table):
        return storage.commit(
            unit.marker, manifest.encode(product.table, _metadata(unit, product.facts)), crash_window="table-written-not-linked"
        )
    return _commit_files(storage, unit, product.facts, output)


def _metadata(unit: Unit, facts: dict) -> dict[str, str]:
    about = {
        "classes": CLASSES,
        "stage": unit.stage,
        "params": unit.params,
        "inputs": {role: [path for path, _ in markers] for role, markers in unit.inputs.items()},
    }
    return {"facts": json.dumps(facts, sort_keys=True), "unit": json.dumps(about, sort_keys=True)}


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _commit_files(storage: Storage, unit: Unit, facts: dict, output: Path) -> bool:
    """Files first, under a folder named by their content; then the marker that names the folder. Without the marker nobody looks into the folder."""
    files = {file.relative_to(output).as_posix(): file for file in sorted(output.rglob("*")) if file.is_file()}
    sha256 = {name: _sha256(file) for name, file in files.items()}
    folder = f"{unit.path}/{digest(sha256)[:12]}"
    for name, file in files.items():
        storage.commit(f"{folder}/{name}", file)
    crash.window("files-before-marker")
    content = {
        "classes": CLASSES,
        "stage": unit.stage,
        "identity": unit.identity,
        "params": unit.params,
        "science": unit.science,
        "folder": folder,
        "files": sha256,
        "facts": facts,
        "inputs": {role: [list(marker) for marker in markers] for role, markers in unit.inputs.items()},
    }
    return storage.commit(unit.marker, json.dumps(content, sort_keys=True, indent=1).encode())
