"""Which samples exist: the Parquet sidecars of a folder of shards, read as one table.

A sidecar is the commit of its shard: one row a sample, in the tar's order, and in its metadata the tar's name, size and sha256. A tar that
no sidecar names is an orphan and is never seen here. Filters and joins are views of these tables; shards are never rewritten.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from shards.storage import Storage

SCHEMA = pa.schema(
    {"key": pa.string(), "file": pa.string(), "shard": pa.string(), "offset": pa.int64(), "size": pa.int64(), "sha256": pa.string()}
)  # of the image: the first part of each sample; offset and size in bytes of its data within the tar
METADATA = ("shard", "shard_sha256", "shard_bytes", "identity")
_SIDECAR = re.compile(r"(\d{5,})-([0-9A-Za-z_-]+)\.parquet")


def sidecar_path(folder: str, number: int, identity: str) -> str:
    """Where the sidecar of shard `number` made by the unit `identity` is committed. ValueError for a name that would not be found again."""
    name = f"{number:05d}-{identity}.parquet"
    if not _SIDECAR.fullmatch(name):
        raise ValueError(f"shard {number}, identity {identity!r}: want a number >= 0, and letters, digits, '_' and '-' in the identity")
    return _join(folder, name)


def shard_number(path: str) -> int:
    """The shard number in a sidecar's path."""
    return int(_SIDECAR.fullmatch(path.rpartition("/")[2])[1])


def encode(table: pa.Table, metadata: dict[str, str]) -> bytes:
    """Parquet bytes of `table` with exactly `metadata` in its schema: equal for equal values, in whatever chunks, under one pyarrow."""
    table = table.combine_chunks().replace_schema_metadata({name: metadata[name] for name in sorted(metadata)})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", compression_level=3, version="2.6", row_group_size=1 << 20, write_page_checksum=True)
    return sink.getvalue().to_pybytes()


def read(storage: Storage, path: str) -> pa.Table:
    """One committed table with its schema metadata, page checksums verified. ValueError for one that is damaged."""
    data = storage.read(path)
    try:  # on this thread: one command in eight that ended soon after Arrow had begun its own died of them (apache/arrow issue 34314)
        return pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True).read(use_threads=False)
    except (pa.ArrowException, OSError, MemoryError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def metadata(table: pa.Table) -> dict[str, str]:
    """Schema metadata as text."""
    return {name.decode(): value.decode() for name, value in (table.schema.metadata or {}).items()}


def lacking(table: pa.Table) -> list[str]:
    """Columns, or else metadata, that a sidecar has and `table` has not, or not of that type."""
    wrong = [field.name for field in SCHEMA if field.name not in table.column_names or table.schema.field(field.name).type != field.type]
    return wrong or sorted(set(METADATA) - set(metadata(table)))


def sidecars(storage: Storage, folder: str) -> list[str]:
    """Paths of the committed sidecars directly in `folder`, by shard number, then identity."""
    places = [path.rpartition("/") for path in storage.list(_join(folder, ""))]
    names = [name for parent, _, name in places if parent == folder and _SIDECAR.fullmatch(name)]
    return [_join(folder, name) for name in sorted(names, key=lambda name: (shard_number(name), name))]


def load(
    storage: Storage, folder: str | None = None, *, paths: Iterable[str] | None = None, keep: Callable[[str], bool] | None = None
) -> pa.Table:
    """Every committed sample of `folder` by shard number, or of the sidecars `paths` in the order given, in one table.

    `keep` chooses among a folder's sidecars by path. Columns are SCHEMA's, those the writers gave (null where a sidecar lacks one, the
    wider type where two differ) and `path`, folder/shard, enough to open the image. ValueError if two of the folder's sidecars share a
    number (one unit made under two identities), two samples share a key, or a sidecar is damaged.
    """
    if (folder is None) == (paths is None):
        raise ValueError("manifest.load wants either a folder or paths=[...] of sidecars, not both")
    chosen = _chosen(storage, folder, keep) if paths is None else list(paths)
    tables = []
    for path in chosen:
        table = read(storage, path)
        if missing := lacking(table):
            raise ValueError(f"{path} is no sidecar of a shard: it lacks {', '.join(missing)}")
        tar = _join(path.rpartition("/")[0], metadata(table)["shard"])
        tables.append(table.append_column("path", pa.repeat(pa.scalar(tar), table.num_rows)).replace_schema_metadata(None))
    if not tables:
        return SCHEMA.append(pa.field("path", pa.string())).empty_table()
    table = pa.concat_tables(tables, promote_options="permissive").combine_chunks()
    if repeated := _repeated(table["key"]):
        owners = sorted(set(table.filter(pc.equal(table["key"], repeated[0]))["path"].to_pylist()))
        where = f"first {repeated[0]} in {', '.join(owners)}"
        raise ValueError(f"{len(repeated)} keys occur more than once, {where}: leave one of the sidecars out with keep= or paths=")
    return table


def join(table: pa.Table, other: pa.Table, on: str = "key") -> pa.Table:
    """`table`, rows and order kept, with the columns of the row of `other` that has the same `on`.

    Rows of `other` that `table` does not ask for are left out. ValueError naming the keys that `other` holds twice or lacks, or the columns
    that both have.
    """
    if repeated := _repeated(other[on]):
        raise ValueError(f"cannot join on {on!r}: {len(repeated)} values occur more than once on the right, {_some(repeated)}")
    if clash := sorted(set(table.column_names) & set(other.column_names) - {on}):
        raise ValueError(f"cannot join on {on!r}: both sides have the columns {', '.join(clash)}; drop or rename one side's")
    rows = pc.index_in(table[on], value_set=other[on].combine_chunks().cast(table.schema.field(on).type))
    if rows.null_count:
        missing = table.filter(pc.is_null(rows))[on].to_pylist()
        raise ValueError(f"cannot join on {on!r}: {len(missing)} of {table.num_rows} values are missing on the right, {_some(missing)}")
    for column in (name for name in other.column_names if name != on):
        table = table.append_column(other.schema.field(column), other[column].take(rows))
    return table


def write_shards_txt(storage: Storage, folder: str, keep: Callable[[str], bool] | None = None) -> list[str]:
    """Put `shards.txt`, the committed tars of `folder`, one a line, and return them. For plain webdataset: a glob would meet orphans."""
    names = [metadata(read(storage, path))["shard"] for path in _chosen(storage, folder, keep)]
    storage.put(_join(folder, "shards.txt"), "".join(f"{name}\n" for name in names).encode())
    return names


def _chosen(storage: Storage, folder: str, keep: Callable[[str], bool] | None) -> list[str]:
    by_number = defaultdict(list)
    for path in filter(keep, sidecars(storage, folder)):
        by_number[shard_number(path)].append(path)
    for number, paths in by_number.items():
        if len(paths) > 1:
            raise ValueError(f"shard {number} was committed under {len(paths)} identities: {', '.join(paths)}; choose with keep= or paths=")
    return [path for (path,) in by_number.values()]


def _repeated(values: pa.ChunkedArray) -> list:
    counts = values.value_counts()
    return counts.field("values").filter(pc.greater(counts.field("counts"), 1)).to_pylist()


def _some(values: list) -> str:
    return ", ".join(map(str, values[:5])) + (" ..." if len(values) > 5 else "")


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
