"""Which sample goes into which batch on which rank, and its bytes.

An epoch is a list of row numbers (`permutation`, or `deck` for a wanted class mix) that depends on the seed and the epoch alone. It is cut
into global batches first and into ranks second, so that any number of ranks takes the same optimizer steps over the same samples, each
once, and a run resumes in the middle of an epoch by the number of global batches done. There is no state to save.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from shards.storage import Storage

AT_ONCE = 16  # images asked for from an object store, whose answers take milliseconds each
_ORDER, _DECK = 0, 1  # keep the streams of permutation and deck apart


def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """The numbers 0..n-1 in the order of this epoch, int64 [n]."""
    return _shuffled(n, seed, _ORDER, epoch)


def deck(classes: np.ndarray, prior: Sequence[float], n: int, seed: int, epoch: int) -> np.ndarray:
    """Row numbers of an epoch of `n` draws in which class c has n * prior[c] of them (rounded by largest remainder), int64 [n], shuffled.

    classes [rows] are class numbers. Each class is dealt from its own shuffled deck that goes on over the epochs, shuffled anew when it is
    used up: after any number of epochs (of equal n and prior) two rows of a class have been drawn equally often, or one of them once more.
    ValueError for a prior that does not fit.
    """
    classes, shares = np.asarray(classes), np.asarray(prior, dtype=np.float64)
    if n < 1 or shares.min(initial=0) < 0 or not np.isclose(shares.sum(), 1):
        raise ValueError(f"a deck of {n} draws with the class prior {list(prior)}: want one draw or more, and shares >= 0 that add up to 1")
    if len(classes) and not (0 <= classes.min() and classes.max() < len(shares)):
        raise ValueError(f"class numbers {classes.min()} to {classes.max()} for a prior of {len(shares)}: legal are 0 to {len(shares) - 1}")
    hands = []
    for number, count in enumerate(_largest_remainder(n, shares)):
        rows = np.flatnonzero(classes == number)
        if count and not len(rows):
            raise ValueError(f"class {number} has the prior {shares[number]:g} but no rows: give it rows or the prior 0")
        if count:
            first = epoch * count
            begun, ended = first // len(rows), -(-(first + count) // len(rows))
            dealt = np.concatenate([rows[_shuffled(len(rows), seed, _DECK, number, shuffle)] for shuffle in range(begun, ended)])
            hands.append(dealt[first - begun * len(rows) :][:count])
    return np.concatenate(hands)[permutation(n, seed, epoch)]


def batches(
    order: np.ndarray, batch: int, rank: int, world: int, start: int = 0, pair_last: bool = False
) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """This rank's share (indices, weights, total) of each global batch from number `start` on.

    order    [n], an epoch's row numbers; global batch b is order[b * batch : (b + 1) * batch], the last one may be smaller
    pair_last  where the last would have one row it has two, the batch before (of three or more) gives up its last: for what a batch norm learns from
    indices  this rank's even slice; a rank that a small batch leaves with nothing gets one of its rows as padding: all ranks step together
    weights  float32, 1 for a sample, 0 for padding
    total    samples in the global batch, over all ranks: divide sums by it
    """
    if batch < 1 or start < 0 or not 0 <= rank < world:
        raise ValueError(f"global batch {batch}, start {start}, rank {rank} of {world}: want batch >= 1, start >= 0, 0 <= rank < world")
    n = len(order)
    edge = n - 2 if pair_last and n > batch > 2 and n % batch == 1 else n
    for first in range(start * batch, n, batch):
        whole = order[min(first, edge) : min(first + batch, edge) if first + batch < n else n]
        own = np.array_split(whole, world)[rank]
        yield (own, np.ones(len(own), np.float32), len(whole)) if len(own) else (whole[:1], np.zeros(1, np.float32), len(whole))


class DamagedShard(RuntimeError):
    """A tar that does not hold what its sidecar says."""


class ShardReader:
    """Random access to the images of a manifest table (manifest.load, then any filter or join). Safe to pickle, to fork and to thread.

    From an object store whole shards are fetched, once a machine, where all that the table names have room in its cache. Where they have not, images are
    asked for one by one: of a cache that random access overflows, every shard would be fetched again and again. Memory holds images, never a shard.
    """

    def __init__(self, storage: Storage, table: pa.Table):
        paths = table["path"].combine_chunks().dictionary_encode()
        self.storage = storage
        self.keys: list[str] = table["key"].to_pylist()
        self._paths: list[str] = paths.dictionary.to_pylist()
        self._path = paths.indices.to_numpy()
        self._offset, self._size = (table[name].to_numpy() for name in ("offset", "size"))
        self._sha256: list[str] = table["sha256"].to_pylist()
        self._files: dict[str, Path] = {}  # here, by path: a shard never changes, so it is asked for once
        ends = np.zeros(len(self._paths), np.int64)
        np.maximum.at(ends, self._path, self._offset + self._size)
        self._needed = int(ends.sum())  # bytes

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def sizes(self) -> np.ndarray:
        """Bytes of each image, int64 [N]."""
        return self._size

    @property
    def afar(self) -> bool:
        """Whether a network is between the shards and this machine."""
        return math.isfinite(self.storage.room)

    def read(self, i: int, check: bool = False) -> bytes:
        """The image bytes of row `i`; with `check`, and always from afar, against their sha256. DamagedShard names shard, key and offset if they are not
        there; from afar they are asked for twice, for the network or this machine's copy may be at fault."""
        path, offset, size = self._paths[self._path[i]], int(self._offset[i]), int(self._size[i])
        for again in (True, False) if self.afar else (False,):
            try:
                data = self._bytes(path, offset, size)
                problem = self._problem(i, data, check or self.afar)
            except FileNotFoundError as error:  # from afar: another process may have made room
                problem = str(error)
            if problem and again:
                self._forget(path)
            elif problem:
                where = f"{path}, key {self.keys[i]} at offset {offset}"
                raise DamagedShard(f"{where}: {problem}; verify the folder, delete this shard's tar and sidecar, and make the unit again")
            else:
                return data

    def _bytes(self, path: str, offset: int, size: int) -> bytes:
        """As many of them as are there; a sidecar may say anything."""
        if offset < 0:
            return b""
        if self._needed > self.storage.room:
            return self.storage.read(path, offset, size)
        if path not in self._files:
            self._files[path] = self.storage.local(path)
        opened = _opened(self._files[path])  # held until its bytes are read: threads that open at once keep one of theirs
        return os.pread(opened.descriptor, max(0, min(size, opened.size - offset)), offset)

    def _problem(self, i: int, data: bytes, check: bool) -> str:
        """What is wrong with the bytes of row `i`, or ""."""
        if len(data) != self._size[i]:
            return f"{len(data)} of {self._size[i]} bytes are there"
        if check and (found := hashlib.sha256(data).hexdigest()) != self._sha256[i]:
            return f"sha256 is {found}, the sidecar says {self._sha256[i]}"
        return ""

    def _forget(self, path: str) -> None:
        self._files.pop(path, None)
        self.storage.forget(path)
        _opened.cache_clear()  # a new copy has the old one's name


def stream(
    reader: ShardReader, order: np.ndarray, batch: int, rank: int, world: int, start: int = 0, workers: int = 0, read_ahead: int = 2,
    decode: Callable[[bytes], Any] = bytes, pair_last: bool = False,
) -> Iterator[tuple[np.ndarray, np.ndarray, int, list]]:  # fmt: skip
    """`batches` with their images: (indices, weights, total, what `decode` makes of each image's bytes).

    `workers` threads read and decode `read_ahead` batches ahead, while the caller computes; 0: none. From afar at least AT_ONCE of them, for most wait.
    """

    def fetch(i: int) -> Any:
        return decode(reader.read(i))

    own = batches(order, batch, rank, world, start, pair_last)
    if workers == 0:
        yield from ((*share, [fetch(i) for i in share[0]]) for share in own)
        return
    pool = ThreadPoolExecutor(max(workers, AT_ONCE if reader.afar else 0), thread_name_prefix="shards")
    try:
        pending: deque = deque()
        for share in own:
            pending.append((share, [pool.submit(fetch, i) for i in share[0]]))
            if len(pending) > read_ahead:
                share, images = pending.popleft()
                yield *share, [image.result() for image in images]
        for share, images in pending:
            yield *share, [image.result() for image in images]
    finally:
        pool.shutdown(cancel_futures=True)  # of an epoch left early nothing more is read


class _Opened:
    """A tar open for pread(2), which forks and threads may share. It closes when its last user drops it, never under a thread that reads.

    Not a memory map: a page fault holds the GIL while the disk works, and a file that shrinks or vanishes kills the process by SIGBUS.
    """

    def __init__(self, file: Path):
        self.descriptor = os.open(file, os.O_RDONLY)
        self.size = os.fstat(self.descriptor).st_size

    def __del__(self):
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


_opened = lru_cache(maxsize=256)(_Opened)  # a process usually has 1,024 descriptors


def _shuffled(n: int, seed: int, *stream: int) -> np.ndarray:
    """Sorted raw Philox words: NumPy freezes a bit generator's output for ever, but not what Generator.permutation makes of it (NEP 19)."""
    words = np.random.Philox(np.random.SeedSequence(seed, spawn_key=stream)).random_raw(n)
    return np.argsort(words, kind="stable")


def _largest_remainder(n: int, shares: np.ndarray) -> list[int]:
    exact = n * shares / shares.sum()
    counts = np.floor(exact + 1e-9).astype(int)
    ranked = np.argsort(counts - exact, kind="stable")
    counts[ranked[: n - counts.sum()]] += 1
    return counts.tolist()
