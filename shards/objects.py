"""An object store as a Storage: S3 by obstore; Google's and Azure's by the same door.

A commit is one PUT that the store refuses where the name exists (If-None-Match: *), never multipart: of racing completions of multipart uploads
several win on some stores. A PUT whose answer was lost is repeated and meets its own object, so every object carries who wrote it.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from shards import crash
from shards.credentials import LEAST
from shards.ranges import Ranges
from shards.storage import Storage, checked

WRITER = "vhs-writer"  # an object's metadata: the one call that made it
BACKOFF = {"init_backoff": timedelta(milliseconds=200), "max_backoff": timedelta(seconds=20), "base": 2}  # with jitter
RETRIES = {"max_retries": 8, "retry_timeout": timedelta(minutes=5), "backoff": BACKOFF}
CLIENT = {"timeout": "120s", "connect_timeout": "10s"}  # of one request: what is silent for longer is asked again
CACHE_GB = 20.0  # of this machine's disk, for shards; VHS_CACHE_GB changes it. Models, fetched as folders, stay


class Objects(Storage):
    """A bucket, or a prefix in one: `s3://bucket/prefix`. Endpoint, region and credentials are those of the environment (AWS_ENDPOINT_URL, AWS_REGION,
    AWS_ACCESS_KEY_ID, … or what the machine's role gives). Safe to pickle and to fork: each process opens connections of its own."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self._opened: tuple[int, object] | None = None
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
            plain = {"allow_http": True} if endpoint.startswith("http://") else {}
            self._opened = os.getpid(), from_url(self.url, client_options={**CLIENT, **plain}, retry_config=RETRIES)
        return self._opened[1]

    def commit(self, path: str, data: bytes | Path, *, crash_window: str | None = None, durable: bool = True) -> bool:
        import obstore
        from obstore.exceptions import AlreadyExistsError

        if self.exists(path):
            return False
        data = data.read_bytes() if isinstance(data, Path) else data
        if crash_window:
            crash.window(crash_window)
        mine = uuid4().hex
        with self._allowed("s3:PutObject", path):
            try:
                obstore.put(self._store, path, data, mode="create", attributes={WRITER: mine}, use_multipart=False)
            except AlreadyExistsError:
                return obstore.get(self._store, path).attributes.get(WRITER) == mine
        return True

    def put(self, path: str, data: bytes, *, durable: bool = True) -> None:
        import obstore

        with self._allowed("s3:PutObject", path):
            obstore.put(self._store, path, data, use_multipart=False)

    def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        import obstore

        if not offset and length is None:
            with self._allowed("s3:GetObject", path):
                return bytes(obstore.get(self._store, path).bytes())
        size = self.size(path)
        end = size if length is None else min(size, offset + length)
        with self._allowed("s3:GetObject", path):
            return bytes(obstore.get_range(self._store, path, start=offset, end=end)) if offset < end else b""

    def stream(self, path: str) -> BinaryIO:
        return Ranges(lambda start, end: self.read(path, start, end - start), self.size(path))

    def size(self, path: str) -> int:
        return self._about(path)["size"]

    def _about(self, path: str) -> dict:
        import obstore

        with self._allowed("s3:GetObject, and s3:ListBucket to tell what is absent", path):
            return obstore.head(self._store, path)

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

    def _below(self, folder: str | None) -> Iterator[dict]:
        import obstore

        with self._allowed("s3:ListBucket", folder):
            for page in obstore.list(self._store, folder, chunk_size=1000):  # the store matches whole parts of a name
                yield from page

    def delete(self, path: str) -> None:
        import obstore

        with suppress(FileNotFoundError), self._allowed("s3:DeleteObject", path):
            obstore.delete(self._store, path)

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
        """The object's bytes into `file`. A body that ends early is asked for again."""
        import obstore

        for attempt in range(3):
            with open(file, "wb") as out:
                for chunk in obstore.get(self._store, path).stream(min_chunk_size=1 << 20):
                    out.write(chunk)
            if file.stat().st_size == size:
                return
            time.sleep(2**attempt)
        raise OSError(f"{self.url}/{path}: {file.stat().st_size} of {size} bytes came, three times")

    @contextmanager
    def _allowed(self, action: str, path: str | None) -> Iterator[None]:
        """Within, a refusal becomes a PermissionError that names the action that may be missing. `path`: a name, None for all of the storage."""
        from obstore.exceptions import GenericError, PermissionDeniedError, UnauthenticatedError

        if path is not None:
            checked(path, self.url)
        try:
            yield
        except (PermissionDeniedError, UnauthenticatedError, GenericError) as error:
            where, told = f"{self.url}/{path or ''}", str(error)
            if "NoSuchBucket" in told:
                raise FileNotFoundError(f"{self.url}: the store has no such bucket; make it, or choose another") from None
            if isinstance(error, GenericError) and not re.search(r"status code: 40[13]\b", told):
                raise OSError(f"{where}: {_said(error)}") from error
            raise PermissionError(f"{where}: the store refuses {action} to {_who()}: {_said(error)}") from None

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
            obstore.put(self._store, name, b"second", mode="create", use_multipart=False)
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
