"""Where a command writes, looked at before its work: nothing is computed for a place that would not take it. Nothing is left there by looking."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import typer

from jobs.config import ConfigError


def folder(option: str, path: Path) -> None:
    """ConfigError, in the name of `option`, unless `path` is a folder that takes files, or one can be made there."""
    path = path.absolute()
    there = next(place for place in (path, *path.parents) if os.path.lexists(place))
    if not there.is_dir():
        raise ConfigError(f"{option} {path}: {there} is no folder: name a folder, there or yet to be made")
    try:  # the mode of a folder does not tell: root may write everywhere but on a file system that is read only
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ConfigError(f"{option} {path}: nothing can be written in {there} ({error.strerror}): name a folder where you may write") from None


def file(option: str, path: Path) -> None:
    """ConfigError, in the name of `option`, unless `path` is a file that may be written anew, or one can be made there."""
    if path.is_dir():
        raise ConfigError(f"{option} {path} is a folder: name a file in it, such as {path / 'NAME'}")
    if not path.exists():
        folder(option, path.parent)
    elif not os.access(path, os.W_OK):
        raise ConfigError(f"{option} {path} is there already and may not be written: name another file")


def file_option(param: typer.CallbackParam, value: Path | None) -> Path | None:
    """typer's callback of an option that names a file to write."""
    if value is not None:
        file(param.opts[0], value)
    return value


def folder_option(param: typer.CallbackParam, value: Path | None) -> Path | None:
    """typer's callback of an option that names a folder to write to."""
    if value is not None:
        folder(param.opts[0], value)
    return value


def write(path: Path, text: str) -> None:
    """`text` in the file `path`, whose folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
