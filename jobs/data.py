"""Where a run's radiographs lie: a folder, a table, shards, here or in object storage. One way to list them, one to read them.

Names are relative to the place, so the same files under another root are the same science; where they lie now is a word in the run's state.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from jobs.config import PHANTOMS
from shards.storage import Storage, open_storage
from vhs import sources
from vhs.measure import View
from vhs.sources import Source, SourceError

FILE_BYTES = 1 << 29  # of an image; 100 million pixels of 16 bits have 200 MB
AT_ONCE = 8  # files on their way
EMPTY = hashlib.sha256(b"").hexdigest()


@dataclass(frozen=True)
class Data:
    """`named`: what of the place is meant, a CSV, a list of shards or a pattern of their names; None: all of it."""

    storage: Storage
    named: str | None = None

    def layout(self) -> str:
        return sources.layout(self.storage, self.named)

    def scan(self, view: View, class_order: tuple[str, ...] | None = None) -> list[Source]:
        return sources.scan(self.storage, view, class_order, self.named)

    def sha256(self, file: str) -> tuple[str, str | None]:
        """-> (of the bytes of `file`, why it cannot be used)."""
        if (size := self.storage.size(file)) > FILE_BYTES:
            return "", f"holds {size} bytes, an image at most {FILE_BYTES}"
        with self.storage.local(file).open("rb") as data:
            digest = hashlib.file_digest(data, "sha256").hexdigest()
        return digest, "empty file" if digest == EMPTY else None

    def read(self, source: dict) -> bytes:
        """The bytes of a source, as they were when the run began. ValueError if they are others now."""
        if source["inside"]:
            data = self.storage.read(*source["inside"])
        else:
            data = self.storage.local(source["file"]).read_bytes()
        if hashlib.sha256(data).hexdigest() != source["sha256"]:
            where = sources.typed(self.storage, source["file"])
            raise ValueError(f"{where} changed since the run began: put it back, or start a new run with the new data")
        return data

    def read_ahead(self, wanted: Iterable[dict]) -> Iterator[tuple[dict, bytes | None]]:
        """(source, its bytes) in order, a few ahead of who decodes them; None for one that was rejected."""
        with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="data") as pool:
            coming: deque = deque()
            for source in wanted:
                coming.append((source, None if source["reject"] else pool.submit(self.read, source)))
                if len(coming) > AT_ONCE:
                    source, data = coming.popleft()
                    yield source, data and data.result()
            for source, data in coming:
                yield source, data and data.result()


def place(data: str) -> str:
    """`data` as it is meant from any folder: an absolute path, a URL, or the word phantoms."""
    return data if data == PHANTOMS or "://" in data else str(Path(data).expanduser().absolute())


def read_file(file: str) -> bytes:
    """The file that a person named, a path here or s3://bucket/name. OSError where it cannot be read."""
    folder, _, name = place(file).rpartition("/")
    return open_storage(folder or "/").read(name)


def is_here(data: str) -> bool:
    """Whether `data` can be looked at from this machine, as far as that can be told without asking a network."""
    whole = Path(data).expanduser()
    return data == PHANTOMS or "://" in data or whole.exists() or ("{" in data and whole.parent.exists())


def open_data(data: str) -> Data:
    """The data that a configuration names. SourceError where there is none."""
    if not is_here(data):
        raise SourceError(f"data = {data!r} does not exist: give a folder, a CSV, shards, s3://bucket/folder, or the word phantoms")
    root, _, name = place(data).rstrip("/").rpartition("/")
    whole = open_storage(place(data))
    if name.lower().endswith((".csv", ".tar", ".txt")) or ("://" not in data and not Path(place(data)).is_dir()):
        return Data(open_storage(root), name)
    if "://" in data and not whole.list():
        raise SourceError(f"data = {data}: nothing lies below that name")
    return Data(whole)
