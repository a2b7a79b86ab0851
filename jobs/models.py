"""Where the models come from that a run starts with: what travels with the program, a folder, or a hub."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

WEIGHTS = Path(__file__).resolve().parents[1] / "vhs" / "weights"


def base(config) -> str:
    """The diffusers folder or hub id that `config.base` means."""
    return str(WEIGHTS / "base") if config.base == "packaged" else config.base


def labeller(config) -> str:
    """The labeller folder that `config.labeller.init` means, or the word scratch."""
    return str(WEIGHTS / "labeller" / config.view) if config.labeller.init == "packaged" else config.labeller.init


@lru_cache
def fingerprint(model: str) -> str:
    """Digest of a model folder's files, so that other weights under the same name are another science; a hub id or a word stands for itself."""
    folder = Path(model)
    if not folder.is_dir():
        return model
    whole = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.suffix != ".md":
            whole.update(f"{file.relative_to(folder).as_posix()}\0{hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return whole.hexdigest()[:16]
