"""An object store as a Storage: S3 by obstore; Google's and Azure's by the same door.

A commit is one PUT that the store refuses where the name exists (If-None-Match: *), not multipart: of racing completions of multipart uploads several
win on some stores. So a file that is too large for a PUT has a name that tells its bytes, and who wins is all one. A PUT whose answer was lost is
repeated and meets its own object, so every object carries who wrote it.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import BinaryIO
from uuid import uuid4

from shards import cache, crash
from shards.credentials import LEAST
from shards.ranges import Ranges
from shards.storage import Storage, checked

WRITER = "vhs-writer"  # an object's metadata: the one call that made it
BEYOND = "status code: 416"  # a range that begins where the object has ended
LOST = re.compile(r"status code: 4(?!08|29)\d\d\b")  # an answer that would be the same next time
PATIENCE_S, STRANGERS_S = 300, 20  # with a store that fails now; with one that has never answered, whose address may be wrong
PAUSE_S, LONGEST_PAUSE_S = 0.2, 20
REQUEST_S = 120  # a request that writes may last; VHS_REQUEST_S changes it
SILENT_S, WHOLE_S = 20, 3600  # an answer may say nothing; may take in all. After either it is asked for again
PIECE = 8 << 20  # of a large object, asked for at once: what a fetch holds in memory
LARGEST = 256 << 20  # bytes of a file that goes in one request, and in memory for it; 5 GB is what stores take
PARTS = {"chunk_size": 32 << 20, "max_concurrency": 4}  # of a larger one


class Passing(Exception):
    """What may be otherwise when asked again: a body ended early, a name went while the store was asked whose it is."""


class Objects(Storage):
    """A bucket, or a prefix in one: `s3://bucket/prefix`. Endpoint, region and credentials are those of the environment (AWS_ENDPOINT_URL, AWS_REGION,
    AWS_ACCESS_KEY_ID, … or what the machine's role gives). Safe to pickle and to fork: each process opens connections of its own."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self._opened: tuple[int, dict[str, object]] | None = None
        self._answered = False
        mine = hashlib.sha256(self.url.encode()).hexdigest()[:12]
        self.work = cache.folder() / "work" / mine
        self.shared = Path(os.environ.get("VHS_SHARED_DIR") or "~/.vhs").expanduser() / mine

    def __getstate__(self) -> dict:
        return {**vars(self), "_opened": None}

    @property
    def room(self) -> float:
        return cache.room()

    @property
    def _store(self):
        return self._clients()["writes"]

    @property
    def _reading(self):
        return self._clients()["reads"]

    def _clients(self) -> dict[str, object]:
        if not self._opened or self._opened[0] != os.getpid():
            from obstore.store import from_url

            endpoint, lasts_s = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "", os.environ.get("VHS_REQUEST_S", REQUEST_S)
            options = {"timeout": f"{lasts_s}s", "connect_timeout": "10s"} | ({"allow_http": True} if endpoint.startswith("http://") else {})
            watched = options | {"timeout": f"{WHOLE_S}s", "read_timeout": f"{min(SILENT_S, float(lasts_s))}s"}  # to writes silence is nothing strange
            made = {name: from_url(self.url, client_options=how, retry_config={"max_retries": 0}) for name, how in (("writes", options), ("reads", watched))}
            self._opened = os.getpid(), made
        return self._opened[1]

    def commit(self, path: str, data: bytes | Path, *, crash_window: str | None = None, durable: bool = True) -> bool:
        import obstore
        from obstore.exceptions import AlreadyExistsError

        if self.exists(path):
            return False
        mine, large = uuid4().hex, isinstance(data, Path) and data.stat().st_size > LARGEST
        data = data.read_bytes() if isinstance(data, Path) and not large else data
        for window in filter(None, ("write-begun", crash_window)):
            crash.window(window)

        def create() -> bool:
            if large:  # of racing completions several may win
                obstore.put(self._store, path, data, attributes={WRITER: mine}, use_multipart=True, **PARTS)
                return True
            try:
                obstore.put(self._store, path, data, mode="create", attributes={WRITER: mine}, use_multipart=False)
            except AlreadyExistsError:
                try:
                    return obstore.get(self._reading, path).attributes.get(WRITER) == mine
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
        from obstore.exceptions import GenericError

        if length == 0:  # no range says that
            return self.read(path, offset, 1)[:0]
        part = {"range": {"offset": offset} if length is None else (offset, offset + length)} if offset or length else {}

        def body() -> bytes:
            try:
                answer = obstore.get(self._reading, path, options=part)
            except GenericError as error:
                if BEYOND in str(error):
                    return b""
                raise
            data, (start, end) = bytes(answer.bytes()), answer.range
            if len(data) != end - start:
                raise Passing(f"{len(data)} of {end - start} bytes from {start} on came")
            return data

        return self._ask("s3:GetObject", path, body)

    def stream(self, path: str) -> BinaryIO:
        return Ranges(lambda start, end: self.read(path, start, end - start), self.size(path))

    def size(self, path: str) -> int:
        return self._about(path)["size"]

    def _about(self, path: str) -> dict:
        import obstore

        return self._ask("s3:GetObject, and s3:ListBucket to tell what is absent", path, lambda: obstore.head(self._reading, path))

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
            return [one for page in obstore.list(self._reading, folder, chunk_size=1000) for one in page]

        found = self._ask("s3:ListBucket", folder, pages)
        folders = {above for one in found for above in PurePosixPath(one["path"]).parents}  # consoles make an object for each
        return [one for one in found if one["size"] or PurePosixPath(one["path"]) not in folders]

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
        return cache.kept(self._name(path, about), about["size"], lambda file: self._fetch(path, about["size"], file))

    def _folder(self, path: str) -> Path:
        if not (below := sorted(self._below(path), key=lambda one: one["path"])):
            raise FileNotFoundError(f"{self.url}/{path}")
        tag = hashlib.sha256("".join(f"{one['path']} {one['e_tag']}" for one in below).encode()).hexdigest()[:12]

        def fetch(folder: Path):
            for one in below:
                file = folder / one["path"].removeprefix(f"{path}/")
                file.parent.mkdir(parents=True, exist_ok=True)
                self._fetch(one["path"], one["size"], file)

        return cache.kept_folder(hashlib.sha256(f"{self.url}/{path} {tag}".encode()).hexdigest()[:24], fetch)

    def forget(self, path: str) -> None:
        with suppress(FileNotFoundError):
            (cache.folder() / self._name(path, self._about(path))).unlink(missing_ok=True)

    def _name(self, path: str, about: dict) -> str:
        """In the cache: of these bytes, so that what was put over them is another file."""
        return hashlib.sha256(f"{self.url}/{path} {about['e_tag']} {about['size']}".encode()).hexdigest()[:24] + Path(path).suffix

    def _fetch(self, path: str, size: int, file: Path) -> None:
        """The object's bytes into `file`, a piece at a time: memory does not hang on its size, and what fails is not asked for from the beginning."""
        with open(file, "wb") as out:
            for start in range(0, size, PIECE):
                out.write(self.read(path, start, PIECE))
        if file.stat().st_size != size:
            raise OSError(f"{self.url}/{path}: {file.stat().st_size} of {size} bytes came; it was changed meanwhile, which shards never are")

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
