"""A file far away, read from front to back by ranges: a few of them in memory, the next ones on their way."""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

RANGE = 8 << 20  # bytes of a request
AHEAD = 2  # requests on their way while one is read
KEPT = 2  # ranges that were read: who reads headers seeks back a little


class Ranges(io.RawIOBase):
    """`fetch(start, end)` gives bytes of a file of `size`. Holds at most AHEAD + KEPT + 1 ranges, whatever the size."""

    def __init__(self, fetch: Callable[[int, int], bytes], size: int):
        self._fetch, self._size, self._at = fetch, size, 0
        self._pool, self._ranges = ThreadPoolExecutor(AHEAD + 1, thread_name_prefix="ranges"), OrderedDict[int, Future]()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence])
        return self._at

    def read(self, size: int = -1) -> bytes:
        """All that is asked for, unlike a raw file's: fewer bytes only at the end."""
        end = self._size if size < 0 else min(self._size, self._at + size)
        parts = []
        while self._at < end:
            number, start = divmod(self._at, RANGE)
            part = self._range(number)[start : start + end - self._at]
            parts.append(part)
            self._at += len(part)
        return b"".join(parts)

    def readinto(self, buffer) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _range(self, number: int) -> bytes:
        last = (self._size - 1) // RANGE
        for wanted in range(number, min(number + AHEAD, last) + 1):
            if wanted not in self._ranges:
                start = wanted * RANGE
                self._ranges[wanted] = self._pool.submit(self._whole, start, min(start + RANGE, self._size))
        for old in [held for held in self._ranges if not number - KEPT <= held <= number + AHEAD]:
            self._ranges.pop(old).cancel()
        return self._ranges[number].result()

    def _whole(self, start: int, end: int) -> bytes:
        data = self._fetch(start, end)
        if len(data) != end - start:
            raise OSError(f"{len(data)} bytes came of {start} to {end}: the file changed while it was read")
        return data

    def close(self) -> None:
        if not self.closed:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._ranges.clear()
        super().close()
