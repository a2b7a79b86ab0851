"""This machine's folder for what was fetched from an object store: filled once by whoever comes first, bounded, private to the user."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

CACHE_GB = 20.0  # of this machine's disk, for shards; VHS_CACHE_GB changes it. Models, fetched as folders, stay
PART = ".part"


def folder() -> Path:
    """VHS_CACHE_DIR, or a place among the system's temporary files. PermissionError where others may write."""
    chosen = os.environ.get("VHS_CACHE_DIR") or Path(tempfile.gettempdir()) / f"vhs-cache-{os.getuid()}"
    found = Path(chosen)
    found.mkdir(parents=True, exist_ok=True, mode=0o700)
    about = found.stat()
    if about.st_uid != os.getuid() or about.st_mode & 0o022:  # weights are loaded from it
        raise PermissionError(f"{found}: others may write there; chmod 700 what is yours, or name another folder in VHS_CACHE_DIR")
    return found


def room() -> float:
    """Bytes that files may take here."""
    return float(os.environ.get("VHS_CACHE_GB", CACHE_GB)) * 1e9


def kept(name: str, size: int, fetch: Callable[[Path], None]) -> Path:
    """The file `name`, of `size` bytes, that `fetch` writes to the path it is given if it is not here. Others who want it meanwhile wait for it."""
    file = folder() / name
    aside = file.with_name(f"{name}{PART}")
    while True:
        with suppress(FileNotFoundError):  # not yet here, or another process has just made room
            os.utime(file)
            return file
        with open(aside, "ab") as lock:  # a killed process's lock is free again; what it left is written over
            fcntl.flock(lock, fcntl.LOCK_EX)
            if file.exists() or not _names(aside, lock.fileno()):
                continue  # whoever had the lock has made the file of it
            _make_room(size)
            fetch(aside)
            aside.replace(file)
            return file


def _names(file: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(file.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _make_room(size: int) -> None:
    """Of files alone the longest unused go, until `size` bytes more have room. One that is open stays readable until it is closed."""
    files = []
    for file in folder().iterdir():
        with suppress(FileNotFoundError):
            if file.is_file():
                files.append((file.stat().st_mtime, file.stat().st_size, file))
    held = sum(size for _, size, _ in files)
    for _, bytes_held, file in sorted(files):
        if held + size <= room():
            return
        if file.suffix != PART:  # somebody's lock
            file.unlink(missing_ok=True)
            held -= bytes_held
