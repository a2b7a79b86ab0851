"""An object store as a Storage: S3 by obstore; Google's and Azure's by the same door.

A commit is one PUT that the store refuses where the name exists (If-None-Match: *), never multipart: of racing completions of multipart uploads
several win on some stores. A PUT whose answer was lost is repeated and meets its own object, so every object carries who wrote it.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from shards import crash
from shards.credentials import LEAST
from shards.ranges import Ranges
from shards.storage import Storage, checked

WRITER = "vhs-writer"  # an object's metadata: the one call that made it
LOST = re.compile(r"status code: 4(?!08|29)\d\d\b")  # an answer that would be the same next time
PATIENCE_S, STRANGERS_S = 300, 20  # with a store that fails now; with one that has never answered, whose address may be wrong
PAUSE_S, LONGEST_PAUSE_S = 0.2, 20
REQUEST_S = 120  # one request may last; VHS_REQUEST_S changes it
PIECE = 64 << 20
CACHE_GB = 20.0  # of this machine's disk, for shards; VHS_CACHE_GB changes it. Models, fetched as folders, stay


class Passing(Exception):
    """What may be otherwise when asked again: a body ended early, a name went while the store was asked whose it is."""


class Objects(Storage):
    """A bucket, or a prefix in one: `s3://bucket/prefix`. Endpoint, region and credentials are those of the environment (AWS_ENDPOINT_URL, AWS_REGION,
    AWS_ACCESS_KEY_ID, … or what the machine's role gives). Safe to pickle and to fork: each process opens connections of its own."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self._opened: tuple[int, object] | None = None
        self._answered = False
        mine = hashlib.sha256(self.url.encode()).hexdigest()[:12]
        self.work = _cache() / "work" / mine
        self.shared = Path(os.environ.get("VHS_SHARED_DIR") or "~/.vhs").expanduser() / mine

    def __getstate__(self) -> dict:
        return {**vars(self), "_opened": None}

    @property
    def _store(self):
        if not self._opened or self._opened[0] != os.getpid():
            from obstore.store import from_url

            endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
            options = {"timeout": f"{os.environ.get('VHS_REQUEST_S', REQUEST_S)}s", "connect_timeout": "10s"}
            options |= {"allow_http": True} if endpoint.startswith("http://") else {}
            self._opened = os.getpid(), from_url(self.url, client_options=options, retry_config={"max_retries": 0})
        return self._opened[1]

    def commit(self, path: str, data: bytes | Path, *, crash_window: str | None = None, durable: bool = True) -> bool:
        import obstore
        from obstore.exceptions import AlreadyExistsError

        if self.exists(path):
            return False
        data, mine = data.read_bytes() if isinstance(data, Path) else data, uuid4().hex
        for window in filter(None, ("write-begun", crash_window)):
            crash.window(window)

        def create() -> bool:
            try:
                obstore.put(self._store, path, data, mode="create", attributes={WRITER: mine}, use_multipart=False)
            except AlreadyExistsError:
                try:
                    return obstore.get(self._store, path).attributes.get(WRITER) == mine
                except FileNotFoundError:  # a claim, dropped since by whoever was done
                    raise Passing("the name was refused, and then was not there") from None
            return True

        created = self._ask("s3:PutObject", path, create)
        if created:
            crash.window("name-made")
        return created

    def put(self, path: str, data: bytes, *, durable: bool = True) -> None:
        import obstore

        crash.window("write-begun")
        self._ask("s3:PutObject", path, lambda: obstore.put(self._store, path, data, use_multipart=False))

    def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        import obstore

        if not offset and length is None:
            return self._ask("s3:GetObject", path, lambda: bytes(obstore.get(self._store, path).bytes()))
        size = self.size(path)
        return self._range(path, offset, size if length is None else min(size, offset + length))

    def _range(self, path: str, start: int, end: int) -> bytes:
        import obstore

        def part() -> bytes:
            data = bytes(obstore.get_range(self._store, path, start=start, end=end))
            if len(data) != end - start:
                raise Passing(f"{len(data)} of {end - start} bytes from {start} on came")
            return data

        return self._ask("s3:GetObject", path, part) if start < end else b""

    def stream(self, path: str) -> BinaryIO:
        return Ranges(lambda start, end: self._range(path, start, end), self.size(path))

    def size(self, path: str) -> int:
        return self._about(path)["size"]

    def _about(self, path: str) -> dict:
        import obstore

        return self._ask("s3:GetObject, and s3:ListBucket to tell what is absent", path, lambda: obstore.head(self._store, path))

    def exists(self, path: str) -> bool:
        try:
            self.size(path)
        except FileNotFoundError:
            return False
        return True

    def list(self, prefix: str = "") -> list[str]:
        """One request for each 1,000 names."""
        folder = prefix.rpartition("/")[0]
        return sorted(one["path"] for one in self._below(folder or None) if one["path"].startswith(prefix))

    def _below(self, folder: str | None) -> list[dict]:
        import obstore

        def pages() -> list[dict]:  # the store matches whole parts of a name
            return [one for page in obstore.list(self._store, folder, chunk_size=1000) for one in page]

        return self._ask("s3:ListBucket", folder, pages)

    def delete(self, path: str) -> None:
        import obstore

        with suppress(FileNotFoundError):
            self._ask("s3:DeleteObject", path, lambda: obstore.delete(self._store, path))

    def local(self, path: str) -> Path:
        """Fetched once into this machine's cache, where the bytes of the object, or of all objects below the folder `path`, are kept while there is room."""
        try:
            about = self._about(path)
        except FileNotFoundError:
            return self._folder(path)
        return self._fetched(path, about)

    def _folder(self, path: str) -> Path:
        if not (below := sorted(self._below(path), key=lambda one: one["path"])):
            raise FileNotFoundError(f"{self.url}/{path}")
        tag = hashlib.sha256("".join(f"{one['path']} {one['e_tag']}" for one in below).encode()).hexdigest()[:12]
        folder = _cache() / hashlib.sha256(f"{self.url}/{path} {tag}".encode()).hexdigest()[:24]
        if not folder.is_dir():
            aside = folder.with_name(f"{folder.name}.{uuid4().hex}.part")
            for one in below:
                file = aside / one["path"].removeprefix(f"{path}/")
                file.parent.mkdir(parents=True, exist_ok=True)
                self._fetch(one["path"], one["size"], file)
            with suppress(OSError):  # another process was first
                aside.rename(folder)
            shutil.rmtree(aside, ignore_errors=True)
        return folder

    def _fetched(self, path: str, about: dict) -> Path:
        name = hashlib.sha256(f"{self.url}/{path} {about['e_tag']} {about['size']}".encode()).hexdigest()[:24]
        file = _cache() / f"{name}{Path(path).suffix}"
        with suppress(FileNotFoundError):  # not yet here, or another process has just made room
            os.utime(file)
            return file
        _make_room(about["size"])
        aside = file.with_name(f"{file.name}.{uuid4().hex}.part")
        self._fetch(path, about["size"], aside)
        aside.replace(file)
        return file

    def _fetch(self, path: str, size: int, file: Path) -> None:
        """The object's bytes into `file`, whole: one request a piece, for each has its time."""
        with open(file, "wb") as out:
            for start in range(0, size, PIECE):
                out.write(self._range(path, start, min(size, start + PIECE)))

    def _ask(self, action: str, path: str | None, request: Callable):
        """`request()`, which may not do what is wrong twice. It is repeated, after growing pauses, while what failed may pass.

        PermissionError names the `action` that is refused, at once; OSError says what kept failing. `path`: a name, None for all of the storage.
        """
        from obstore.exceptions import GenericError, PermissionDeniedError, UnauthenticatedError

        if path is not None:
            checked(path, self.url)
        where, began_s, pause_s = f"{self.url}/{path or ''}", time.monotonic(), PAUSE_S
        while True:
            try:
                answer = request()
                self._answered = True
                return answer
            except FileNotFoundError:
                self._answered = True
                raise
            except (PermissionDeniedError, UnauthenticatedError, GenericError, Passing) as error:
                told = str(error)
                if "NoSuchBucket" in told:
                    raise FileNotFoundError(f"{self.url}: the store has no such bucket; make it, or choose another") from None
                if isinstance(error, PermissionDeniedError | UnauthenticatedError) or re.search(r"status code: 40[13]\b", told):
                    raise PermissionError(f"{where}: the store refuses {action} to {_who()}: {_said(error)}") from None
                waited_s = time.monotonic() - began_s
                if LOST.search(told) or waited_s + pause_s > (PATIENCE_S if self._answered else STRANGERS_S):
                    raise OSError(f"{where}: {_said(error)}, asked again for {waited_s:.0f} s") from error
            time.sleep(random.uniform(pause_s / 2, pause_s))  # not all workers at the same instant
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def prove(self) -> None:
        name = f"state/probe-{uuid4().hex}"
        try:
            if not self.commit(name, b"first") or self._overwrites(name):
                raise OSError(f"{self.url}: this store overwrites where it is asked to create (no If-None-Match), so no commit there can be safe; use another")
        finally:
            self.delete(name)

    def _overwrites(self, name: str) -> bool:
        import obstore
        from obstore.exceptions import AlreadyExistsError

        try:
            self._ask("s3:PutObject", name, lambda: obstore.put(self._store, name, b"second", mode="create", use_multipart=False))
        except AlreadyExistsError:
            return False
        return True

    def sweep(self, older_than_s: float) -> int:
        """Nothing is ever written aside."""
        return 0


def _who() -> str:
    """Whose rights are lacking, without giving a key away."""
    key = os.environ.get("AWS_ACCESS_KEY_ID")
    return f"AWS_ACCESS_KEY_ID {key if len(key) < LEAST else f'…{key[-4:]}'}" if key else "what this machine's role gives"


def _said(error: Exception) -> str:
    """What the store said, in a line."""
    told = re.search(r"<Code>(\w+)</Code>.*?<Message>(.*?)</Message>", str(error), re.DOTALL)
    return f"{told[1]}, {told[2]}" if told else str(error).partition("\n")[0]


def _cache() -> Path:
    """This machine's folder for what was fetched, private to the user."""
    chosen = os.environ.get("VHS_CACHE_DIR") or Path(tempfile.gettempdir()) / f"vhs-cache-{os.getuid()}"
    folder = Path(chosen)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    about = folder.stat()
    if about.st_uid != os.getuid() or about.st_mode & 0o022:  # weights are loaded from it
        raise PermissionError(f"{folder}: others may write there; chmod 700 what is yours, or name another folder in VHS_CACHE_DIR")
    return folder


def _make_room(size: int) -> None:
    """Of files alone the longest unused go, until `size` bytes more have room. One that is open stays readable until it is closed."""
    limit = float(os.environ.get("VHS_CACHE_GB", CACHE_GB)) * 1e9
    files = []
    for file in _cache().iterdir():
        with suppress(FileNotFoundError):
            if file.is_file():
                files.append((file.stat().st_mtime, file.stat().st_size, file))
    held = sum(size for _, size, _ in files)
    for _, bytes_held, file in sorted(files):
        if held + size <= limit:
            return
        file.unlink(missing_ok=True)
        held -= bytes_held
