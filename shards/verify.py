"""Do a folder's tars hold what its sidecars say? Findings with what to do about each, never a repair."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import pyarrow as pa

from shards import manifest
from shards.storage import Storage
from shards.writer import BLOCK, parse_header

PIECE = 1 << 20  # bytes of an image in memory at a time
_SHA256 = re.compile("[0-9a-f]{64}")
_TAR = re.compile(r"(\d{5,})-[0-9a-f]{12}\.tar")
_REMAKE = "delete this sidecar and its tar, then run the same command again"
LOOK_AGAIN = "nothing is known of it: see to the disk, the server or the rights, then verify again"


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

    Always: sizes, counts, names, keys used once, orphans, and on a disk positions. `full` also reads every byte, once and from front to back, and compares
    tars and images by sha256. Of a tar no more than a few pieces is in memory, and nothing of it is unpacked or followed.
    """
    found, tables = [], {}
    for sidecar in manifest.sidecars(storage, folder):
        try:
            table = manifest.read(storage, sidecar)
            problem = _sidecar_problem(sidecar, table)
        except ValueError as error:
            problem = f"not readable: {error}"
        except OSError as error:
            found.append(unread(sidecar, error))
            continue
        if problem:
            found.append(Finding(sidecar, problem, _REMAKE, again=True, drop=(sidecar,)))
            continue
        tables[sidecar] = table
        tar = _tar_path(sidecar, table)
        try:
            found += [Finding(sidecar, what, _REMAKE, again=True, drop=(sidecar, tar)) for what in _tar_problems(storage, tar, table, full)]
        except OSError as error:
            found.append(unread(tar, error))
    found += _folder_findings(storage, folder, tables)
    return Findings(len(tables), sum(table.num_rows for table in tables.values()), tuple(found))


def unread(path: str, error: OSError) -> Finding:
    """`path` could not be read now, which says nothing of its bytes: nobody deletes it for that."""
    return Finding(path, f"cannot be read: {error}", LOOK_AGAIN)


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
    if not _SHA256.fullmatch(about["shard_sha256"]):
        return f"its metadata say sha256 {about['shard_sha256']!r}, which is none"
    if about["shard"] != (name := f"{number:05d}-{about['shard_sha256'][:12]}.tar"):
        return f"it names the tar {about['shard']}, its number and sha256 make that {name}"
    if strangers := sorted(map(str, set(table["shard"].to_pylist()) - {about["shard"]})):
        return f"rows point at {', '.join(strangers)}, the sidecar is that of {about['shard']}"
    return ""


def _tar_problems(storage: Storage, tar: str, table: pa.Table, full: bool) -> Iterator[str]:
    about = manifest.metadata(table)
    try:
        size = storage.size(tar)
    except FileNotFoundError:
        yield f"{tar} is missing"
        return
    if str(size) != about["shard_bytes"]:
        yield f"{tar} has {size} bytes, the sidecar says {about['shard_bytes']}"
        return
    if not full and math.isfinite(storage.room):  # afar, and its headers lie all over it: to see them is to fetch it
        return
    rows, whole = {row["file"]: row for row in table.select(manifest.SCHEMA.names).to_pylist()}, hashlib.sha256() if full else None
    keys, last, changed = 0, "", []
    try:
        with storage.stream(tar) as stream:
            for name, offset, length, sha256 in _members(stream, size, whole):
                keys, last = keys + (name.partition(".")[0] != last), name.partition(".")[0]
                if not (row := rows.pop(name, None)):
                    continue
                if (row["offset"], row["size"]) != (offset, length):
                    yield f"{tar}: {name} (offset, size) is {offset, length}, the sidecar says {row['offset'], row['size']}"
                elif full and sha256 != row["sha256"]:
                    changed.append(f"{tar}: key {row['key']} at offset {offset} is not the image that was written (sha256)")
    except ValueError as error:
        yield f"{tar} is not a whole tar: {error}"
        return
    if keys != table.num_rows:
        yield f"{tar} holds {keys} samples, the sidecar {table.num_rows}"
    yield from (f"{tar}: {row['file']} (offset, size) is nowhere, the sidecar says {row['offset'], row['size']}" for row in rows.values())
    if full and (found := whole.hexdigest()) != about["shard_sha256"]:
        yield f"{tar}: sha256 is {found}, the sidecar says {about['shard_sha256']}"
    yield from changed


def _members(stream: BinaryIO, size: int, whole) -> Iterator[tuple[str, int, int, str]]:
    """(name, offset, bytes, sha256) of each member of a tar of `size` bytes, from front to back: a piece in memory, whatever a header declares.

    `whole`: a hash that is given every byte; None: only headers are read, and sha256 is "". ValueError where it is not what writer.write_tar writes.
    """

    def take(count: int) -> bytes:
        if len(data := stream.read(count)) != count:
            raise ValueError("it ends early")
        if whole:
            whole.update(data)
        return data

    at = 0
    while (block := take(BLOCK)) != bytes(BLOCK):
        try:
            name, length = parse_header(block)
        except ValueError as error:
            raise ValueError(f"at offset {at}, {error}") from None
        at, padded = at + BLOCK, length + -length % BLOCK
        if padded > size - at:
            raise ValueError(f"{name} at offset {at} declares {length} bytes, {size - at} are left")
        digest = hashlib.sha256()
        for start in range(0, length, PIECE) if whole else ():
            digest.update(take(min(PIECE, length - start)))
        if whole:
            take(padded - length)
        else:
            stream.seek(at + padded)
        yield name, at, length, digest.hexdigest() if whole else ""
        at += padded
    if size != at + 2 * BLOCK or take(BLOCK) != bytes(BLOCK):
        raise ValueError(f"its end at offset {at} is not that of a tar of {size} bytes")


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
    yield from (_orphan(path, owner_of_number) for path in beside if path.endswith(".tar") and path not in named)
    for path in (path for path in beside if path.rpartition("/")[2] == "shards.txt"):
        listed = set(storage.read(path).decode(errors="replace").split())
        if listed != {tar.rpartition("/")[2] for tar in named}:
            what = f"its {len(listed)} names are not the {len(named)} tars committed here"
            yield Finding(path, what, "write it again once the folder is complete", error=False)


def _orphan(path: str, owner_of_number: dict[int, str]) -> Finding:
    """A tar that no sidecar names: a killed writer's, a loser's, one whose sidecar is lost, or a stranger's, which is not ours to delete."""
    number = _TAR.fullmatch(path.rpartition("/")[2])
    if not number:
        return Finding(path, "no sidecar names it, nor is its name one of ours: no reader sees it", "nothing, or ingest it (vhs ingest)", error=False)
    if owner := owner_of_number.get(int(number[1])):
        to_do = "nothing; once no writer is at work it may be deleted"
        return Finding(path, f"orphan: no sidecar names it, and {owner} has its number", to_do, error=False, drop=(path,))
    to_do = "nothing, if a writer was killed: it will write it again; if its sidecar is lost, put that back"
    return Finding(path, "orphan: no sidecar names it", to_do, error=False, again=True, drop=(path,))
