"""Where a run's radiographs lie: a folder, a table, shards, here or in object storage. One way to list them, one to read them.

Names are relative to the place, so the same files under another root are the same science; where they lie now is a word in the run's state.
"""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from jobs.config import PHANTOMS
from shards.storage import Storage, open_storage
from vhs import sources
from vhs.measure import View
from vhs.sources import SUFFIXES, Source, SourceError
from vhs.sources.source import UNREAD

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

    def scan(self, view: View, class_order: tuple[str, ...] | None = None, labelled: bool = True) -> list[Source]:
        return sources.scan(self.storage, view, class_order, self.named, labelled)

    def listed(self, view: View, class_order: tuple[str, ...] | None, labelled: bool = True) -> list[dict]:
        """What `scan` finds, each with the sha256 of its bytes and the name that people know it by (`origin`)."""
        found = [source.as_dict() for source in self.scan(view, class_order, labelled)]
        unread = [source for source in found if not source["reject"] and not source["sha256"]]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for source, (sha256, reject) in zip(unread, pool.map(self.sha256, (source["file"] for source in unread)), strict=True):
                source |= {"sha256": sha256, "reject": reject}
        _name_origins(found)
        return found

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


def _name_origins(found: list[dict]):
    """`origin`: the file's name, or where two have the same its place below the data; what people and evaluators know the image by."""
    often = Counter(PurePosixPath(source["file"]).name for source in found)
    for source in found:
        name = PurePosixPath(source["file"]).name
        source["origin"] = name if often[name] == 1 else source["file"]
        if not source["reject"] and not source["file"].isprintable():  # among these what is no UTF-8
            source["reject"] = f"the name {source['file']!a} has signs that cannot be printed: rename it"


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
    if name.lower().endswith((*SUFFIXES, *UNREAD)) and ("://" in data or Path(place(data)).is_file()):
        raise SourceError(
            f"data = {data!r} is a single image: give the folder that holds it and the others, with class folders, a CSV or a label file for each. "
            "vhs predict measures files one by one"
        )
    whole = open_storage(place(data))
    if name.lower().endswith((".csv", ".tar", ".txt")) or ("://" not in data and not Path(place(data)).is_dir()):
        return Data(open_storage(root), name)
    if "://" in data and not whole.list():
        raise SourceError(f"data = {data}: nothing lies below that name")
    return Data(whole)
