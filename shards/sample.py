"""One sample as webdataset understands it: a key and its parts, each a file `<key>.<extension>` of a tar."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

_KEY = re.compile(r"[0-9A-Za-z_-]+")  # no dot: webdataset cuts a name at its first one
_EXTENSION = re.compile(r"[0-9a-z_]+(\.[0-9a-z_]+)*")  # lower case: webdataset lowers it
_NAME_BYTES = 100  # a ustar header holds no longer name without a second field


@dataclass(frozen=True)
class Sample:
    """`parts` by extension, e.g. {"png": ..., "json": ...}; the first is the image a manifest indexes. ValueError for an illegal name."""

    key: str
    parts: dict[str, bytes]

    def __post_init__(self):
        if not _KEY.fullmatch(self.key):
            raise ValueError(f"sample key {self.key!r}: want letters, digits, '_' and '-' only (webdataset ends a key at its first dot)")
        if not self.parts:
            raise ValueError(f"sample {self.key} has no parts: give at least the image, e.g. {{'png': ...}}")
        for extension in self.parts:
            if not _EXTENSION.fullmatch(extension) or len(self.key) + 1 + len(extension) > _NAME_BYTES:
                legal = f"want lower case like 'png' or 'seg.png', and at most {_NAME_BYTES} bytes with the key"
                raise ValueError(f"sample {self.key}, extension {extension!r}: {legal}")


def sample_key(source: bytes) -> str:
    """First 16 hex digits of the source bytes' sha256: the same file has the same key under any name."""
    return hashlib.sha256(source).hexdigest()[:16]


def encode_json(value: Any) -> bytes:
    """Canonical JSON: sorted keys, no spaces, UTF-8, so that equal values have equal bytes. ValueError for NaN and infinities."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
