"""Samples -> one tar and its sidecar, whole or not at all, the same bytes every time.

The tar is named by its own sha256, so writing it twice is harmless; the sidecar is named by the unit's identity and created only if absent,
so exactly one attempt becomes the shard. Between the two a kill leaves an orphan tar that no reader sees.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from shards import crash, manifest
from shards.sample import Sample
from shards.storage import Storage

BLOCK = 512
_MEMBER_LIMIT = 8 << 30  # eleven octal digits
# POSIX.1-1988 ustar: name mode uid gid size mtime checksum type linkname magic version uname gname devmajor devminor prefix
_HEADER = struct.Struct("100s8s8s8s12s12s8s1s100s6s2s32s32s8s8s155s12x")
_NAME, _SIZE = 100, slice(124, 136)  # bytes of a header


@dataclass(frozen=True)
class Member:
    """One part of one sample in a tar; `offset` and `size` in bytes, of its data."""

    key: str
    file: str
    offset: int
    size: int
    sha256: str


def write_tar(samples: Iterable[Sample], file: Path) -> list[Member]:
    """Write a plain ustar whose bytes depend on the samples alone (owner 0, mode 0644, time 0). ValueError for a repeated key."""
    members, keys, offset = [], set(), 0
    with open(file, "wb") as out:
        for sample in samples:
            if sample.key in keys:
                raise ValueError(f"key {sample.key} occurs twice in {file.name}: a key is the digest of its source, so drop one of the two")
            keys.add(sample.key)
            for extension, data in sample.parts.items():
                name = f"{sample.key}.{extension}"
                members.append(Member(sample.key, name, offset + BLOCK, len(data), hashlib.sha256(data).hexdigest()))
                offset += out.write(_header(name, len(data))) + out.write(data) + out.write(bytes(-len(data) % BLOCK))
        out.write(bytes(2 * BLOCK))  # end of archive
    return members


def commit_shard(
    storage: Storage, folder: str, number: int, identity: str,
    samples: Iterable[Sample], columns: pa.Table, metadata: dict[str, str], scratch: Path,
) -> bool:
    """Commit `samples` as `<folder>/<number>-<sha256[:12]>.tar` with the sidecar `<folder>/<number>-<identity>.parquet`; True if this call did.

    columns   one row a sample, in the same order: what the sidecar says beside manifest.SCHEMA (its schema metadata is dropped)
    metadata  what the sidecar says about the whole shard, beside manifest.METADATA
    scratch   a folder private to this attempt; the tar is written there first

    If another attempt has committed this identity, its sidecar stands and these samples are dropped. ValueError if the columns do not fit.
    """
    sidecar = manifest.sidecar_path(folder, number, identity)
    clash = {*manifest.SCHEMA.names, "path"} & set(columns.column_names) | set(manifest.METADATA) & set(metadata)
    if clash:
        raise ValueError(f"{sidecar}: the names {', '.join(sorted(clash))} are the sidecar's own; rename those columns or metadata")
    scratch.mkdir(parents=True, exist_ok=True)
    aside = scratch / f"{number:05d}-{identity}.tar"
    members = write_tar(_passing_half(samples, columns.num_rows), aside)
    with open(aside, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    tar = f"{number:05d}-{digest[:12]}.tar"
    table = _with_columns(members, tar, columns, sidecar)
    described = {"shard": tar, "shard_sha256": digest, "shard_bytes": str(aside.stat().st_size), "identity": identity, **metadata}
    won = False
    if not storage.exists(sidecar):  # a loser whose bytes differ would leave an orphan
        storage.commit(f"{folder}/{tar}" if folder else tar, aside)
        crash.window("tar-before-sidecar")
        won = storage.commit(sidecar, manifest.encode(table, described), crash_window="sidecar-written-not-linked")
    aside.unlink()
    return won


def _passing_half(samples: Iterable[Sample], count: int) -> Iterator[Sample]:
    for position, sample in enumerate(samples):
        if position == count // 2:
            crash.window("tar-half-written")
        yield sample


def _with_columns(members: list[Member], tar: str, columns: pa.Table, sidecar: str) -> pa.Table:
    """The sidecar's table: the first part of each sample, then `columns`."""
    first: dict[str, Member] = {}
    for member in members:
        first.setdefault(member.key, member)
    images = list(first.values())
    if len(images) != columns.num_rows:
        raise ValueError(f"{sidecar}: {len(images)} samples but {columns.num_rows} rows of columns; give one row a sample, in their order")
    table = pa.Table.from_pylist([{**vars(image), "shard": tar} for image in images], schema=manifest.SCHEMA)
    for field, values in zip(columns.schema, columns.columns, strict=True):
        table = table.append_column(field, values)
    return table


def _header(name: str, size: int) -> bytes:
    """Own header, not tarfile's: its bytes name a shard, so they must not change with the Python version."""
    if size >= _MEMBER_LIMIT:
        raise ValueError(f"{name}: {size} bytes, a ustar member holds less than {_MEMBER_LIMIT}; split it")

    def block(checksum: bytes) -> bytes:
        mode, owner, time = b"0000644", b"0000000", b"00000000000"
        return _HEADER.pack(name.encode(), mode, owner, owner, b"%011o" % size, time, checksum, b"0", b"", b"ustar", b"00", *[b""] * 5)

    return block(b"%06o\0 " % sum(block(b" " * 8)))


def parse_header(block: bytes) -> tuple[str, int]:
    """Name and size in bytes of the member that this header begins. ValueError unless `write_tar` would have written it: then it is a plain file of a
    sample, no link, no device, and its name leads nowhere else."""
    try:
        name, size = block[:_NAME].rstrip(b"\0").decode(), int(block[_SIZE].rstrip(b"\0"), 8)
        key, _, extension = name.partition(".")
        Sample(key, {extension: b""})
        if size >= 0 and block == _header(name, size):
            return name, size
    except ValueError:
        pass
    raise ValueError(f"no header of a sample's file: {block[:_NAME].rstrip(bytes(1))!r}")
