"""Do a folder's tars hold what its sidecars say? Findings with what to do about each, never a repair."""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import pyarrow as pa

from shards import manifest
from shards.storage import Storage

_REMAKE = "delete this sidecar and its tar, then run the same command again"


@dataclass(frozen=True)
class Finding:
    """`path` in the storage, what is the matter, what to do. Not an `error`: harmless, readers do not see it.

    `again`: whoever made it makes it anew, the same bytes, once the names in `drop` are gone. Without `again` what is in `drop` is of no use to anybody.
    """

    path: str
    what: str
    to_do: str
    error: bool = True
    again: bool = False
    drop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Findings:
    """What was looked at and what was found; `ok` if no finding is an error."""

    shards: int
    samples: int
    found: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        return not any(finding.error for finding in self.found)


def verify(storage: Storage, folder: str, full: bool = False) -> Findings:
    """Look over every sidecar directly in `folder` and every tar beside them.

    Always: sizes, counts, names, keys used once, orphans, and on a disk positions. `full` also reads every byte and compares tars and images by sha256.
    """
    found, tables = [], {}
    for sidecar in manifest.sidecars(storage, folder):
        try:
            table = manifest.read(storage, sidecar)
        except (ValueError, OSError) as error:
            found.append(Finding(sidecar, f"not readable: {error}", _REMAKE, again=True, drop=(sidecar,)))
            continue
        problem = _sidecar_problem(sidecar, table)
        if problem:
            found.append(Finding(sidecar, problem, _REMAKE, again=True, drop=(sidecar,)))
            continue
        tables[sidecar] = table
        tar = _tar_path(sidecar, table)
        found += [Finding(sidecar, what, _REMAKE, again=True, drop=(sidecar, tar)) for what in _tar_problems(storage, tar, table, full)]
    found += _folder_findings(storage, folder, tables)
    return Findings(len(tables), sum(table.num_rows for table in tables.values()), tuple(found))


def _tar_path(sidecar: str, table: pa.Table) -> str:
    return sidecar[: sidecar.rfind("/") + 1] + manifest.metadata(table)["shard"]


def _sidecar_problem(sidecar: str, table: pa.Table) -> str:
    """Does the sidecar agree with itself and its own name? What is wrong, or ""."""
    if lacking := manifest.lacking(table):
        return f"no sidecar of a shard: it lacks {', '.join(lacking)}"
    about = manifest.metadata(table)
    number = manifest.shard_number(sidecar)
    if sidecar.rpartition("/")[2] != f"{number:05d}-{about['identity']}.parquet":
        return f"its metadata say identity {about['identity']}, its name says otherwise"
    if about["shard"] != (name := f"{number:05d}-{about['shard_sha256'][:12]}.tar"):
        return f"it names the tar {about['shard']}, its number and sha256 make that {name}"
    if strangers := sorted(set(table["shard"].to_pylist()) - {about["shard"]}):
        return f"rows point at {', '.join(strangers)}, the sidecar is that of {about['shard']}"
    return ""


def _tar_problems(storage: Storage, tar: str, table: pa.Table, full: bool) -> Iterator[str]:
    about = manifest.metadata(table)
    if not storage.exists(tar):
        yield f"{tar} is missing"
        return
    if str(size := storage.size(tar)) != about["shard_bytes"]:
        yield f"{tar} has {size} bytes, the sidecar says {about['shard_bytes']}"
        return
    if not full and not storage.url.startswith("file:"):  # its headers lie all over it: to see them is to fetch it
        return
    try:
        with tarfile.open(storage.local(tar), "r:") as opened:
            found = list(opened)
    except (tarfile.TarError, ValueError, OverflowError) as error:
        yield f"{tar} is not a whole tar: {error}"
        return
    if strange := [member.name for member in found if not member.isreg() or "/" in member.name]:
        yield f"{tar} holds {strange[0]!r} (and {len(strange) - 1} more), which is no file of a sample"
    members = {member.name: (member.offset_data, member.size) for member in found}
    if (keys := len({name.partition(".")[0] for name in members})) != table.num_rows:
        yield f"{tar} holds {keys} samples, the sidecar {table.num_rows}"
    rows, there = table.select(manifest.SCHEMA.names).to_pylist(), []
    for row in rows:
        if members.get(row["file"]) != (row["offset"], row["size"]):
            where = members.get(row["file"], "nowhere")
            yield f"{tar}: {row['file']} (offset, size) is {where}, the sidecar says {row['offset'], row['size']}"
        else:
            there.append(row)
    if full:
        with storage.local(tar).open("rb") as data:
            yield from _digest_problems(tar, data, about["shard_sha256"], there)


def _digest_problems(tar: str, data: BinaryIO, sha256: str, rows: list[dict]) -> Iterator[str]:
    """One sample in memory at a time. `rows`: of samples that are where the sidecar says."""
    if (found := hashlib.file_digest(data, "sha256").hexdigest()) != sha256:
        yield f"{tar}: sha256 is {found}, the sidecar says {sha256}"
    for row in rows:
        data.seek(row["offset"])
        if hashlib.sha256(data.read(row["size"])).hexdigest() != row["sha256"]:
            yield f"{tar}: key {row['key']} at offset {row['offset']} is not the image that was written (sha256)"


def _folder_findings(storage: Storage, folder: str, tables: dict[str, pa.Table]) -> Iterator[Finding]:
    """What no single shard can tell: a key in two shards, a number made twice, tars without a sidecar, an old shards.txt."""
    owner_of_key, owner_of_number = {}, {}
    for sidecar, table in tables.items():
        for key in table["key"].to_pylist():
            if (owner := owner_of_key.setdefault(key, sidecar)) is not sidecar:
                yield Finding(sidecar, f"key {key} is also in {owner}", "load only one of the two, or delete the stale one")
        if (owner := owner_of_number.setdefault(manifest.shard_number(sidecar), sidecar)) is not sidecar:
            what = f"the same shard number as {owner}, made under another identity"
            yield Finding(sidecar, what, "nothing while readers choose one; else delete the stale one", error=False)
    beside = [path for path in storage.list(f"{folder}/" if folder else "") if path.rpartition("/")[0] == folder]
    named = {_tar_path(sidecar, table) for sidecar, table in tables.items()}
    for path in beside:
        if path.endswith(".tar") and path not in named:
            yield Finding(path, "orphan: no sidecar names it", "nothing; once no writer is at work it may be deleted", error=False, drop=(path,))
    for path in (path for path in beside if path.rpartition("/")[2] == "shards.txt"):
        listed = set(storage.read(path).decode().split())
        if listed != {tar.rpartition("/")[2] for tar in named}:
            what = f"its {len(listed)} names are not the {len(named)} tars committed here"
            yield Finding(path, what, "write it again once the folder is complete", error=False)
