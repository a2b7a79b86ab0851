"""A folder of a POSIX file system with hard links (a local disk, NFS, Lustre, GPFS) as a Storage."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from shards import crash
from shards.storage import TEMPORARY, Storage, checked

ABSENT = (FileNotFoundError, NotADirectoryError)


class Posix(Storage):
    """link(2) creates a name only if it is absent (rename(2) would overwrite the winner). Holds no open file: safe to pickle and to fork."""

    def __init__(self, root: Path):
        self.root = root
        self.url, self.work, self.shared = root.as_uri(), root / TEMPORARY / "work", root

    def commit(self, path: str, data: bytes | Path, *, crash_window: str | None = None, durable: bool = True) -> bool:
        target = self._file(path)
        if target.exists():
            return False
        with self._aside(data, durable) as temporary:
            if crash_window:
                crash.window(crash_window)
            created = _in_folder(target.parent, lambda: _link(temporary, target))
            if created:
                crash.window("name-made")
        if created and durable:
            _sync_folder(target.parent)
        return created

    def put(self, path: str, data: bytes, *, durable: bool = True) -> None:
        target = self._file(path)
        with self._aside(data, durable) as temporary:
            _in_folder(target.parent, lambda: os.replace(temporary, target))

    def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        with open(self._name(path), "rb") as file:
            if offset:
                file.seek(offset)
            return file.read(-1 if length is None else length)

    def stream(self, path: str) -> BinaryIO:
        return open(self._name(path), "rb")

    def size(self, path: str) -> int:
        return os.stat(self._name(path)).st_size

    def exists(self, path: str) -> bool:
        try:  # refused rights and a failing server are no absence
            return stat.S_ISREG(os.stat(self._name(path)).st_mode)
        except ABSENT:
            return False

    def list(self, prefix: str = "") -> list[str]:
        folder, root = prefix.rpartition("/")[0], str(self.root)
        names = []
        for directory, folders, files in os.walk(self._name(folder) if folder else root, onerror=_unless_absent, followlinks=True):
            folders[:] = [one for one in folders if not _turns_back(directory, one) and (one != TEMPORARY or directory != root)]
            inside = directory[len(root) + 1 :]
            names += [f"{inside}/{file}" for file in files] if inside else files
        return sorted(name for name in names if name.startswith(prefix))

    def delete(self, path: str) -> None:
        self._file(path).unlink(missing_ok=True)

    def local(self, path: str) -> Path:
        return self._file(path)

    def sweep(self, older_than_s: float) -> int:
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
        return f"{self.root}/{checked(path, self.url)}"

    @contextmanager
    def _aside(self, data: bytes | Path, durable: bool) -> Iterator[Path]:
        """`data` under a name nobody else uses, flushed to the disk if `durable`; gone again on leaving (a kill leaves it, invisible, for `sweep`)."""
        temporary = self.root / TEMPORARY / uuid4().hex
        try:
            with _in_folder(temporary.parent, lambda: open(temporary, "xb", opener=_for_us)) as file:
                crash.window("write-begun")
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


def _unless_absent(error: OSError) -> None:
    if not isinstance(error, ABSENT):
        raise error


def _turns_back(directory: str, folder: str) -> bool:
    """Whether a folder is a link to one above it."""
    path = f"{directory}/{folder}"
    return os.path.islink(path) and f"{os.path.realpath(directory)}/".startswith(f"{os.path.realpath(path)}/")


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
    folder.mkdir(mode=0o775, exist_ok=True)  # whatever the umask: what a run reads, nobody else may write
    _sync_folder(folder.parent)


def _for_us(name: str, flags: int) -> int:
    return os.open(name, flags, 0o664)


def _sync_folder(folder: Path) -> None:
    """A new name survives a power cut only after its folder is flushed too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
