"""Samples of a manifest -> the layouts that other programs read: WebDataset tars, class folders, Hugging Face's Parquet.

What is written where is decided before anything is, by the table alone, so that a second start makes what is missing of the same files. An export is
whole when its last file is there: `shards.txt`, `metadata.parquet` of each split, or the one with the highest number.

    webdataset    SPLIT-00000.tar … shards.txt         png and json of each sample; read by webdataset, and by `vhs ingest`
    imagefolder   SPLIT/CLASS/KEY.png                  SPLIT/metadata.parquet beside; read by torchvision's ImageFolder and datasets' imagefolder
    parquet       data/SPLIT-00000-of-00003.parquet    image {bytes, path} and a ClassLabel; read by datasets.load_dataset
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from shards.reader import ShardReader
from shards.sample import Sample, encode_json
from shards.storage import Storage
from shards.writer import write_tar

ABOUT = "export.json"  # what was begun in a folder; written first
PIECE = 10_000, 1 << 28  # images, bytes of a tar or Parquet file, at most: an object store takes it in one request
GROUP = 100, 1 << 25  # of a Parquet row group: what is in memory
AHEAD = 16  # images read, or written, at once


@dataclass(frozen=True)
class Dataset:
    """Images and what is said of them.

    `reader`: its row i is the image of row i of `about`. `about`: a column for each thing said, among them `split` and, a name or null, `class`.
    `classes`: the names in the order of their numbers.
    """

    reader: ShardReader
    about: pa.Table
    classes: tuple[str, ...]

    @property
    def digest(self) -> str:
        """Of all that an export is a function of."""
        digest = hashlib.sha256(encode_json([self.reader.keys, self.classes]))
        for batch in self.about.to_batches(max_chunksize=10_000):
            digest.update(encode_json(batch.to_pylist()))
        return digest.hexdigest()

    def images(self, rows: Iterable[int]) -> Iterator[tuple[int, bytes]]:
        """(row, its image, which is as it was written), in order, a few read ahead. DamagedShard for another."""
        yield from _ahead(lambda row: (row, self.reader.read(row, check=True)), rows)

    def said(self, row: int) -> dict:
        return {"key": self.reader.keys[row], **self.about.slice(row, 1).to_pylist()[0]}


def export(data: Dataset, layout: str, out: Storage, scratch: Path) -> int:
    """Write `data` into `out` as one of LAYOUTS, or what is left of it -> files written now.

    `scratch`: a folder for the file at work. ValueError where `out` holds anything but a part of this very export.
    """
    about = {"layout": layout, "images": len(data.reader), "digest": data.digest}
    there = set(out.list())
    if there and (ABOUT not in there or _begun(out) != about):
        what = "another export, or the run has other labels now" if ABOUT in there else f"{len(there)} other files, {min(there)} first"
        raise ValueError(f"{out.url} is not empty: it holds {what}. Choose a new folder, or empty this one")
    out.commit(ABOUT, json.dumps(about, indent=1).encode())
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch) as aside:
        return LAYOUTS[layout](data, out, there, Path(aside))


def _begun(out: Storage) -> object:
    try:
        return json.loads(out.read(ABOUT))
    except ValueError:
        return None


def _ahead(work: Callable, items: Iterable) -> Iterator:
    """`work` of each item, in order, AHEAD of them at once."""
    with ThreadPoolExecutor(AHEAD, thread_name_prefix="export") as pool:
        pending: deque = deque()
        for item in items:
            pending.append(pool.submit(work, item))
            if len(pending) > AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _by_split(data: Dataset) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = {}
    for row, split in enumerate(data.about["split"].to_pylist()):
        rows.setdefault(split, []).append(row)
    return dict(sorted(rows.items()))


def _pieces(data: Dataset, rows: list[int], most: tuple[int, int]) -> list[list[int]]:
    """`rows` cut where there would be more than `most` images, or bytes."""
    pieces, held = [[]], 0
    for row, size in zip(rows, data.reader.sizes[rows].tolist(), strict=True):
        if pieces[-1] and (len(pieces[-1]) == most[0] or held + size > most[1]):
            pieces.append([])
            held = 0
        pieces[-1].append(row)
        held += size
    return pieces


def _webdataset(data: Dataset, out: Storage, there: set[str], aside: Path) -> int:
    files = {f"{split}-{n:05d}.tar": piece for split, rows in _by_split(data).items() for n, piece in enumerate(_pieces(data, rows, PIECE))}
    missing = [name for name in files if name not in there]
    for name in missing:
        samples = (Sample(data.reader.keys[row], {"png": image, "json": encode_json(data.said(row))}) for row, image in data.images(files[name]))
        write_tar(samples, aside / name)
        out.commit(name, aside / name)
        os.unlink(aside / name)
    listed = out.commit("shards.txt", "".join(f"{name}\n" for name in files).encode())
    return len(missing) + listed


def _imagefolder(data: Dataset, out: Storage, there: set[str], aside: Path) -> int:
    written = 0
    for split, rows in _by_split(data).items():
        names = {row: f"{label or 'unlabelled'}/{data.reader.keys[row]}.png" for row, label in zip(rows, data.about["class"].take(rows).to_pylist())}
        missing = [row for row in rows if f"{split}/{names[row]}" not in there]
        for _ in _ahead(lambda row: out.commit(f"{split}/{names[row]}", data.reader.read(row, check=True)), missing):  # noqa: B023
            written += 1
        table = data.about.take(rows)  # Parquet, for datasets guesses JSON's types anew in each split
        keys, files = [data.reader.keys[row] for row in rows], [names[row] for row in rows]
        pq.write_table(table.add_column(0, "key", [keys]).add_column(0, "file_name", [files]), aside / "metadata")
        written += out.commit(f"{split}/metadata.parquet", aside / "metadata")
    return written


def _parquet(data: Dataset, out: Storage, there: set[str], aside: Path) -> int:
    schema, written = _schema(data), 0
    for split, rows in _by_split(data).items():
        pieces = _pieces(data, rows, PIECE)
        for n, piece in enumerate(pieces):
            name = f"data/{split}-{n:05d}-of-{len(pieces):05d}.parquet"
            if name in there:
                continue
            with pq.ParquetWriter(aside / "piece", schema, compression="none", version="2.6", write_page_checksum=True) as file:  # PNG is compressed
                for group in _pieces(data, piece, GROUP):
                    file.write_table(_rows(data, group, schema))
            written += out.commit(name, aside / "piece")
    return written


def _rows(data: Dataset, rows: list[int], schema: pa.Schema) -> pa.Table:
    keys = [data.reader.keys[row] for row in rows]
    images = [{"bytes": image, "path": f"{key}.png"} for key, (_, image) in zip(keys, data.images(rows), strict=True)]
    about = data.about.take(rows)
    numbers = [UNLABELLED if name is None else data.classes.index(name) for name in about["class"].to_pylist()]
    return pa.table([images, numbers, keys, *(about[name] for name in schema.names[3:])], schema=schema)


UNLABELLED = -1  # as datasets has it
_VALUES = {pa.string(): "string", pa.int64(): "int64", pa.float64(): "float64", pa.bool_(): "bool"}


def _schema(data: Dataset) -> pa.Schema:
    """Arrow's, and in its metadata what `datasets` makes of the columns."""
    said = [field for field in data.about.schema if field.name not in ("split", "class")]
    features = {"image": {"_type": "Image"}, "label": {"names": list(data.classes), "_type": "ClassLabel"}, "key": _feature(pa.string())}
    features |= {field.name: _feature(field.type) for field in said}
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    fields = [pa.field("image", image), pa.field("label", pa.int64()), pa.field("key", pa.string()), *said]
    return pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": features}})})


def _feature(kind: pa.DataType) -> dict:
    return {"feature": _feature(kind.value_type), "_type": "List"} if pa.types.is_list(kind) else {"dtype": _VALUES[kind], "_type": "Value"}


LAYOUTS = {"webdataset": _webdataset, "imagefolder": _imagefolder, "parquet": _parquet}
