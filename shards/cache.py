"""This machine's folder for what was fetched from an object store: filled once by whoever comes first, bounded, private to the user."""

from __future__ import annotations

import fcntl
import math
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

CACHE_GB = 20.0  # of this machine's disk, for shards; VHS_CACHE_GB changes it. Models, fetched as folders, stay
ROOM = 0.1  # of it is made at a time, so that the files are counted now and then and not for each
PART, HALF, LEDGER = ".part", ".half", "held"  # a fetch's lock, which becomes the file; a folder on its way; the bytes that are taken


def folder() -> Path:
    """A folder of ours in VHS_CACHE_DIR, or among the system's temporary files: nothing else is touched. PermissionError where others may write."""
    within = Path(os.environ.get("VHS_CACHE_DIR") or tempfile.gettempdir()).expanduser()
    found = within / f"vhs-cache-{os.getuid()}"
    for made in (within, found):
        made.mkdir(parents=True, exist_ok=True, mode=0o700)
    about, around = found.stat(), within.stat()
    others = about.st_uid != os.getuid() or about.st_mode & 0o022
    if others or around.st_mode & 0o022 and not around.st_mode & 0o1000:  # weights are loaded from it; in a sticky folder nobody exchanges it
        at = found if others else within
        raise PermissionError(f"{at}: others may write there; chmod 700 what is yours, or name another folder in VHS_CACHE_DIR")
    return found


def room() -> float:
    """Bytes that files may take here."""
    return float(os.environ.get("VHS_CACHE_GB", CACHE_GB)) * 1e9


def kept(name: str, size: int, fetch: Callable[[Path], None]) -> Path:
    """The file `name`, of `size` bytes, that `fetch` writes to the path it is given if it is not here. Others who want it meanwhile wait for it."""

    def make(lock: Path, file: Path):
        _make_room(size)
        fetch(lock)
        lock.replace(file)

    return _once(name, size, make)


def kept_folder(name: str, fetch: Callable[[Path], None]) -> Path:
    """The folder `name` that `fetch` fills if it is not here. It stays."""

    def make(lock: Path, whole: Path):
        half = whole.with_name(f"{name}{HALF}")
        shutil.rmtree(half, ignore_errors=True)  # a killed process's
        try:
            half.mkdir()
            fetch(half)
            half.rename(whole)
        finally:
            shutil.rmtree(half, ignore_errors=True)
            lock.unlink()

    return _once(name, 0, make)


def _once(name: str, size: int, make: Callable[[Path, Path], None]) -> Path:
    found = folder() / name
    lock = found.with_name(f"{name}.{size}{PART}")
    while True:
        with suppress(FileNotFoundError):  # not yet here, or another process has just made room
            os.utime(found)
            return found
        with open(lock, "ab") as held:  # a killed process's lock is free again; what it left is written over
            fcntl.flock(held, fcntl.LOCK_EX)
            if not _names(lock, held.fileno()):
                continue  # whoever had the lock has made the file of it
            if found.exists():
                lock.unlink()
                continue
            make(lock, found)
            return found


def _names(file: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(file.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _make_room(size: int) -> None:
    """For `size` bytes more, whose lock is there. All processes tell a ledger what they fetch; the files are counted when that says the room is full."""
    with open(folder() / LEDGER, "a+") as ledger:
        fcntl.flock(ledger, fcntl.LOCK_EX)
        ledger.seek(0)
        said = ledger.read()
        held = int(said) + size if said.isdigit() else math.inf
        if held > room():
            held = _let_go()
        ledger.truncate(0)
        ledger.write(str(held))


def _let_go() -> int:
    """The longest unused files go until there is ROOM beside what is on its way -> bytes held then. One that is open stays readable until it is closed."""
    files, held = [], 0
    for entry in os.scandir(folder()):
        with suppress(FileNotFoundError):
            path, about = Path(entry.path), entry.stat()
            if path.suffix == HALF:
                if _left(path.with_name(f"{path.stem}.0{PART}")):
                    shutil.rmtree(path, ignore_errors=True)
            elif path.suffix == PART:
                if not _left(path):
                    held += int(path.suffixes[-2][1:])  # all that will come
            elif entry.is_file() and path.name != LEDGER:
                files.append((about.st_mtime, about.st_size, path))
                held += about.st_size
    for _, taken, file in sorted(files):
        if held <= (1 - ROOM) * room():
            break
        file.unlink(missing_ok=True)
        held -= taken
    return held


def _left(lock: Path) -> bool:
    """Whether nobody holds `lock`; then it goes."""
    with suppress(FileNotFoundError), open(lock, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        if _names(lock, file.fileno()):
            lock.unlink()
    return True
