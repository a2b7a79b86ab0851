"""WebDataset shards that others wrote: plain tars of samples, each an image beside what is known of it, under one key.

    KEY.png | .jpg | .tif | .dcm …   the image; of several parts that are images the first in the alphabet
    KEY.json                         what a table has as columns: class, VHS or CTR, A_x … F_y, or six_points, patient, source, split
    KEY.cls, KEY.txt                 a class, by name or number; a .txt that is none of the names is a caption, and is let be

A tar is read once, from front to back, a block at a time; nothing is unpacked, and of an image no more is kept than where it lies. Which members make a
sample is webdataset's to say; its stage that opens tars is not used, for it takes a member of any size into memory, compressed ones too. No part
is decoded but those named here: a pickle stays bytes that nobody looks at.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import BinaryIO

from vhs.measure import View
from vhs.sources import source as sources
from vhs.sources.source import LABEL_BYTES, NO_LABEL, Place, Source, SourceError, class_of, inside, typed
from vhs.sources.table import class_in, class_numbers, key_points, number_of, split_of

LIST = "shards.txt"
SUFFIXES = (".tar", ".txt")  # of what is named: shards, or a list of them
WORDS = ("txt", "cls", "json")  # parts that are read, the last of them the one that counts
IMAGE_BYTES = 1 << 29
FARTHEST = 1 << 50  # no file is as long
BLOCK = 1 << 20  # bytes in memory at a time


@dataclass(frozen=True)
class Shards:
    place: Place
    tars: tuple[str, ...]

    @property
    def words(self) -> str:
        return f"{len(self.tars)} WebDataset shards"


@dataclass(frozen=True)
class Part:
    """A member of a tar: where its bytes are, their sha256, and, of WORDS, the bytes. `reject`: why they were passed over."""

    name: str
    offset: int = 0
    size: int = 0
    sha256: str = ""
    data: bytes = b""
    reject: str | None = None


def survey(place: Place, names: list[str]) -> Shards:
    """The shards among `names`: those that a shards.txt at the top lists, else every tar."""
    return listed(place, names, LIST) if LIST in names else Shards(place, tuple(sorted(name for name in names if name.endswith(".tar"))))


def listed(place: Place, names: list[str], named: str) -> Shards:
    """The shards that a list, or a pattern with braces, names. SourceError for one that is not there, or lies elsewhere."""
    from braceexpand import UnbalancedBracesError, braceexpand

    try:
        wanted = place.read(named, 0, LABEL_BYTES).decode().split() if named.endswith(".txt") else list(braceexpand(named))
    except (UnicodeDecodeError, UnbalancedBracesError) as error:
        raise SourceError(f"{typed(place, named)} names no shards: {error}") from None
    there = set(names)
    for tar in wanted:
        short, refused = inside(tar)
        if refused or tar not in there:
            raise SourceError(f"{typed(place, named)}: {short} {refused or 'is not there'}; shards are named as they lie below {typed(place)}")
    return Shards(place, tuple(dict.fromkeys(wanted)))


def read(found: Shards, view: View, class_order: tuple[str, ...] | None) -> list[Source]:
    """One source a sample. A tar that is damaged, or no plain one, is a SourceError: a part of it is never used in silence."""
    samples = [(tar, key, _bare(parts), _said(parts, view)) for tar in found.tars for key, parts in _samples(found.place, tar)]
    stated = {said["class"] for *_, said in samples if said.get("class")}
    order = class_numbers({word for word in stated if not class_of(word)}, class_order, f"{found.words} of {typed(found.place)}")
    return [_source(tar, key, parts, said, view, order) for tar, key, parts, said in samples]


def _samples(place: Place, tar: str) -> Iterator[tuple[str, dict[str, Part]]]:
    """(key, parts by extension) of each sample of a tar, in its order; last what has no extension, so is part of none."""
    from webdataset.tariterators import base_plus_ext, group_by_keys

    strays = []

    def files(stream: BinaryIO) -> Iterator[dict]:
        for part in members(stream):
            if base_plus_ext(part.name)[0] is None:
                strays.append(part)
            yield {"fname": part.name, "data": part, "__url__": tar}

    try:
        with place.stream(tar) as stream:
            for sample in group_by_keys(files(stream)):
                yield sample["__key__"], {name: part for name, part in sample.items() if isinstance(part, Part)}
        yield from ((part.name, {"": part}) for part in strays)
    except (tarfile.TarError, ValueError, OverflowError) as error:  # ValueError: also webdataset's, where a key has a part twice
        raise SourceError(f"{typed(place, tar)} is no plain tar of samples: {error.args[0]}") from None


def _bare(parts: dict[str, Part]) -> dict[str, Part]:
    """`parts` without their bytes, which a million samples would hold in memory."""
    return {name: replace(part, data=b"") for name, part in parts.items()}


def members(stream: BinaryIO) -> Iterator[Part]:
    """Every member of a tar but folders. tarfile.TarError, or ValueError or OverflowError for numbers out of range, where it is damaged or
    compressed."""
    with tarfile.open(fileobj=_Frugal(stream), mode="r:") as tar:
        for member in tar:
            tar.members = []  # else tarfile keeps every header
            if not member.isdir():
                yield _part(tar, member)


def _part(tar: tarfile.TarFile, member: tarfile.TarInfo) -> Part:
    words = PurePosixPath(member.name).suffix.lower().strip(".") in WORDS
    most = LABEL_BYTES if words else IMAGE_BYTES
    if not member.isreg() or member.issparse():
        return Part(member.name, reject="is a link, a device or a file with holes, and none is followed")
    if inside(member.name)[1]:
        return Part(member.name, reject="has a name that leads out of its folder")
    if not 0 <= member.size <= most:
        return Part(member.name, reject=f"declares {member.size} bytes, at most {most} are legal")
    digest, data, left = hashlib.sha256(), bytearray(), member.size
    tar.fileobj.seek(member.offset_data)
    while left:
        if not (block := tar.fileobj.read(min(left, BLOCK))):
            raise tarfile.ReadError(f"{member.name} ends {left} bytes early")
        left -= len(block)
        digest.update(block)
        data += block if words else b""
    return Part(member.name, member.offset_data, member.size, digest.hexdigest(), bytes(data))


class _Frugal:
    """A stream of which no more is read at a time than BLOCK: a header may declare gigabytes of long name."""

    def __init__(self, stream: BinaryIO):
        self._stream, self.tell = stream, stream.tell

    def seek(self, at: int) -> int:
        if at > FARTHEST:
            raise tarfile.ReadError(f"a header declares {at} bytes")
        return self._stream.seek(at)

    def read(self, size: int) -> bytes:
        if not 0 <= size <= BLOCK:
            raise tarfile.ReadError(f"a header declares a name of {size} bytes")
        return self._stream.read(size)


def _said(parts: dict[str, Part], view: View) -> dict[str, str]:
    """What a sample says of its image, as a table's line has it; `fault`: why that cannot be used."""
    line: dict[str, str] = {}
    for extension in (extension for extension in WORDS if extension in parts and not parts[extension].reject):
        part = parts[extension]
        try:
            text = part.data.decode()
            if extension == "json":
                line |= _columns(json.loads(text), view)
            elif class_of(text) or extension == "cls":
                line["class"] = text.strip()
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            line["fault"] = f"damaged label {part.name} ({type(error).__name__}: {error})"
    return line


def _columns(said: dict, view: View) -> dict[str, str]:
    """A JSON object as a line: keys in lower case, key points in the columns of their own."""
    line = {key.lower(): str(value) for key, value in said.items() if isinstance(value, (str, int, float))}
    points = said.get("six_points", said.get("points"))
    if isinstance(points, dict):
        points = [points.get(f"P{name}", points.get(name)) for name in view.points]
    for name, pair in zip(view.points, points, strict=True) if points is not None else ():
        line |= {f"{name}_{axis}".lower(): str(float(value)) for axis, value in zip("xy", pair, strict=True)}
    return line | ({"class": line["label"]} if "label" in line and "class" not in line else {})


def _source(tar: str, key: str, parts: dict[str, Part], said: dict[str, str], view: View, order: tuple[str, ...] | None) -> Source:
    passed_over = next((f"{part.name} {part.reject}" for part in parts.values() if part.reject), None)
    image = next((parts[name] for name in sorted(parts) if f".{name}".endswith(sources.SUFFIXES)), None)
    if image is None:
        return Source(f"{tar}/{key}", reject=passed_over or f"no part of it is an image ({' '.join(sources.SUFFIXES)})")
    known, reject = {}, passed_over or said.get("fault")
    try:
        columns = {column: said.get(column, "") for name in view.points for column in (f"{name}_x".lower(), f"{name}_y".lower())}
        points, fault = key_points(columns, view)
        index = next((name for name in (view.index.lower(), "index") if said.get(name)), None)
        known = {
            "points": points, "label": class_in(said, "class" if said.get("class") else None, order, image.name),
            "index": number_of(said, index, image.name), "split": split_of(said, image.name),
        }  # fmt: skip
        labelled = points is not None or known["label"] is not None or known["index"] is not None
        reject = reject or fault or (None if labelled or known["split"] == "test" else NO_LABEL)
    except SourceError as error:  # of one sample, not of all
        reject = reject or str(error)
    return Source(
        f"{tar}/{image.name}", patient=said.get("patient") or None, source=said.get("source") or None, **known, reject=reject,
        inside=(tar, image.offset, image.size), sha256=image.sha256,
    )  # fmt: skip
