"""The one door to files that outlive a process: read ranges, list names, and `commit` = create if absent.

Every promise about shards and markers rests on `commit`: a name appears with all its bytes or not at all, and of any number of writers that
race for it exactly one wins. On a POSIX file system link(2) gives that (rename(2) would overwrite the winner). Names are relative POSIX
paths, as in an object store: no "..", no empty part, and nothing under `.tmp/`, where bytes are written aside.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit
from uuid import uuid4

from shards import crash

TEMPORARY = ".tmp"
_NO_PART = frozenset(("", ".", ".."))


def open_storage(url: str | Path) -> Storage:
    """The storage at a local path or file:// URL; the folder need not exist yet. ValueError for any other kind of URL."""
    if isinstance(url, Path) or "://" not in url:
        return Storage(Path(url).expanduser().absolute())
    parts = urlsplit(url)
    if parts.scheme in ("s3", "gs", "az"):
        raise ValueError(f"{url}: object storage ({parts.scheme}://) is not in this version; use a local path or file:///absolute/path")
    if parts.scheme != "file" or parts.netloc not in ("", "localhost"):
        raise ValueError(f"{url}: no storage of this kind; use a local path or file:///absolute/path")
    return Storage(Path(unquote(parts.path)))


class Storage:
    """A folder of a POSIX file system with hard links (a local disk, NFS, Lustre, GPFS). Holds no open file: safe to pickle and to fork."""

    def __init__(self, root: Path):
        self.root = root
        self.url = root.as_uri()

    def __repr__(self) -> str:
        return f"Storage({self.url!r})"

    def commit(self, path: str, data: bytes | Path, *, crash_window: str | None = None, durable: bool = True) -> bool:
        """Create `path` with `data` (bytes, or a file to copy) unless it exists; True if this call created it.

        A loser returns False and changes nothing. On True bytes and name are on the disk; `crash_window` is passed between the two. `durable` False
        leaves them to the system's own time, for bookkeeping that a power cut may take back.
        """
        target = self._file(path)
        if target.exists():
            return False
        with self._aside(data, durable) as temporary:
            if crash_window:
                crash.window(crash_window)
            created = _in_folder(target.parent, lambda: _link(temporary, target))
        if created and durable:
            _sync_folder(target.parent)
        return created

    def put(self, path: str, data: bytes, *, durable: bool = True) -> None:
        """Write `path` whole, over what is there. For bookkeeping only: of two writers the last one wins. `durable`: as `commit`'s."""
        target = self._file(path)
        with self._aside(data, durable) as temporary:
            _in_folder(target.parent, lambda: os.replace(temporary, target))

    def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        """`length` bytes from `offset` (None: to the end); fewer where the file ends. FileNotFoundError if it is absent."""
        with open(self._name(path), "rb") as file:
            if offset:
                file.seek(offset)
            return file.read(-1 if length is None else length)

    def size(self, path: str) -> int:
        """Bytes in `path`. FileNotFoundError if it is absent."""
        return os.stat(self._name(path)).st_size

    def exists(self, path: str) -> bool:
        return os.path.isfile(self._name(path))

    def list(self, prefix: str = "") -> list[str]:
        """Every name that starts with `prefix` (end it with "/" for one folder), at any depth, sorted."""
        folder, root = prefix.rpartition("/")[0], str(self.root)
        names = []
        for directory, folders, files in os.walk(self._name(folder) if folder else root):
            if directory == root and TEMPORARY in folders:
                folders.remove(TEMPORARY)
            inside = directory[len(root) + 1 :]
            names += [f"{inside}/{file}" for file in files] if inside else files
        return sorted(name for name in names if name.startswith(prefix))

    def delete(self, path: str) -> None:
        """Remove `path`; nothing to do if it is absent."""
        self._file(path).unlink(missing_ok=True)

    def local(self, path: str) -> Path:
        """A file of this machine that holds the bytes of `path`, to be mapped or opened for reading, never written."""
        return self._file(path)

    def sweep(self, older_than_s: float) -> int:
        """Remove what killed writers left aside, untouched for `older_than_s` (more than the longest write takes); return how many."""
        limit, swept = time.time() - older_than_s, 0
        for temporary in (self.root / TEMPORARY).glob("*"):
            try:
                if temporary.is_file() and temporary.stat().st_mtime <= limit:
                    temporary.unlink()
                    swept += 1
            except FileNotFoundError:  # its writer finished in between
                pass
        return swept

    def _file(self, path: str) -> Path:
        return Path(self._name(path))

    def _name(self, path: str) -> str:
        parts = path.split("/")
        if not _NO_PART.isdisjoint(parts) or "\0" in path or parts[0] == TEMPORARY:
            raise ValueError(f"{path!r} is no name in {self.url}: want 'folder/file' without '.', '..', empty parts or {TEMPORARY}/ first")
        return f"{self.root}/{path}"

    @contextmanager
    def _aside(self, data: bytes | Path, durable: bool) -> Iterator[Path]:
        """`data` under a name nobody else uses, flushed to the disk if `durable`; gone again on leaving (a kill leaves it, invisible, for `sweep`)."""
        temporary = self.root / TEMPORARY / uuid4().hex
        try:
            with _in_folder(temporary.parent, lambda: open(temporary, "xb")) as file:
                if isinstance(data, Path):
                    with open(data, "rb") as source:
                        shutil.copyfileobj(source, file, 1 << 20)
                else:
                    file.write(data)
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)


def _link(temporary: Path, target: Path) -> bool:
    try:
        os.link(temporary, target)
    except FileExistsError:
        # NFS repeats a link whose reply was lost, and the repetition meets the name the first try made: then the winner is this very file.
        return os.path.samefile(temporary, target)
    except OSError as error:
        if error.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            reason = "this file system has no hard links, so no commit on it can be safe; choose a folder elsewhere"
            raise OSError(error.errno, reason, str(target)) from error
        raise
    return True


def _in_folder(folder: Path, make: Callable):
    """`make()`, and once more with `folder` there if it was missing: to look every time would cost every file."""
    try:
        return make()
    except FileNotFoundError:
        _make_folder(folder)
        return make()


def _make_folder(folder: Path) -> None:
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    """A new name survives a power cut only after its folder is flushed too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
