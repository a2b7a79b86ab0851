"""The one door to files that outlive a process: read ranges, list names, and `commit` = create if absent.

Every promise about shards and markers rests on `commit`: a name appears with all its bytes or not at all, and of any number of writers that
race for it exactly one wins. Names are relative POSIX paths, as in an object store: no "..", no empty part, and nothing under `.tmp/`, where a file
system's bytes are written aside.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

from shards.credentials import refuse_in

TEMPORARY = ".tmp"
OBJECTS = ("s3", "gs", "az")  # schemes
_NO_PART = frozenset(("", ".", ".."))


def open_storage(url: str | Path) -> Storage:
    """The storage at a local path, a file:// URL (the folder need not exist yet) or s3://bucket/prefix. ValueError for any other kind of URL, and for one with
    a key in it."""
    from shards.posix import Posix

    if isinstance(url, Path) or "://" not in url:
        return Posix(Path(url).expanduser().absolute())
    refuse_in(url)
    parts = urlsplit(url)
    if parts.scheme in OBJECTS and parts.netloc:
        if "#" in url or "//" in parts.path:
            raise ValueError(f"{url}: an address in an object store has no '#' and no empty part ('//'): choose another prefix")
        from shards.objects import Objects

        return Objects(url)
    if parts.scheme != "file" or parts.netloc not in ("", "localhost"):
        raise ValueError(f"{url}: no storage of this kind; use a local path, file:///absolute/path or s3://bucket/prefix")
    return Posix(Path(unquote(parts.path)))


def checked(path: str, url: str) -> str:
    """`path`, if it is a name in the storage at `url`. ValueError says what names are."""
    parts = path.split("/")
    if not _NO_PART.isdisjoint(parts) or "\0" in path or parts[0] == TEMPORARY:
        raise ValueError(f"{path!r} is no name in {url}: want 'folder/file' without '.', '..', empty parts or {TEMPORARY}/ first")
    return path


class Storage(ABC):
    """A place for files under names, at `url`."""

    url: str
    work: Path  # on this machine, for what an attempt writes before it is committed
    shared: Path  # seen by every node, for what a scheduler wants as files: its logs, its jobs
    room: float = math.inf  # bytes of this machine's disk that `local` may fill; infinite where the files are here anyhow

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    @abstractmethod
    def commit(self, path: str, data: bytes | Path, *, crash_window: str | None = None, durable: bool = True) -> bool:
        """Create `path` with `data` (bytes, or a file to copy) unless it exists; True if this call created it.

        A loser returns False and changes nothing, but where `data` is a file too large for one request of an object store (objects.LARGEST): its name
        must tell its bytes, so that whoever comes later changes nothing either. On True bytes and name are kept; `crash_window` is passed between the
        two, or before the request that makes both. `durable` False leaves them to the system's own time, for bookkeeping that a power cut may take back.
        """

    @abstractmethod
    def put(self, path: str, data: bytes, *, durable: bool = True) -> None:
        """Write `path` whole, over what is there. For bookkeeping only: of two writers the last one wins. `durable`: as `commit`'s."""

    @abstractmethod
    def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        """`length` bytes from `offset` (None: to the end); fewer where the file ends. FileNotFoundError if it is absent."""

    @abstractmethod
    def stream(self, path: str) -> BinaryIO:
        """`path` to be read from front to back, in little memory whatever its size; seeking back a little is cheap. FileNotFoundError if it is absent."""

    @abstractmethod
    def size(self, path: str) -> int:
        """Bytes in `path`. FileNotFoundError if it is absent."""

    @abstractmethod
    def exists(self, path: str) -> bool: ...

    @abstractmethod
    def list(self, prefix: str = "") -> list[str]:
        """Every name that starts with `prefix` (end it with "/" for one folder), at any depth, sorted."""

    @abstractmethod
    def delete(self, path: str) -> None:
        """Remove `path`; nothing to do if it is absent."""

    @abstractmethod
    def local(self, path: str) -> Path:
        """A file of this machine that holds the bytes of `path`, or a folder of all that is below it, to be opened for reading, never written."""

    def forget(self, path: str) -> None:  # noqa: B027  where the files are here there is no copy
        """Drop the copy that `local` keeps of `path`, which was found damaged."""

    def prove(self) -> None:  # noqa: B027  link(2) speaks for itself
        """OSError, with the reason, where no commit could be safe. Asked once for a new run."""

    @abstractmethod
    def sweep(self, older_than_s: float) -> int:
        """Remove what killed writers left aside, untouched for `older_than_s` (more than the longest write takes); return how many."""
