"""A reader who never stops looking while others write: what it may open must be whole, at every instant."""

from __future__ import annotations

import hashlib
import json
import time

from jobs.unit import read_marker
from shards import manifest
from shards.storage import Storage, open_storage

PAUSE_S = 0.02
ASIDE = ("state/", "checkpoints/")  # bookkeeping, which readers do not open


def watch(out: str, over, told):
    """Look at the run at `out` until the event `over`, and once more after it; then send (looks, things looked at, what was seen wrong) to the pipe `told`."""
    storage, known, wrong, looks, last = open_storage(out), set(), [], 0, False
    while not last:
        last = over.is_set()
        wrong += look(storage, known)
        looks += 1
        time.sleep(PAUSE_S)
    told.send((looks, len(known), sorted(set(wrong))))


def look(storage: Storage, known: set[str]) -> list[str]:
    """What is wrong with what is visible now and not yet `known`, to which what was found right is added.

    A tar's bytes are those that its name says; a sidecar's tar is there, and its images where it says; of a marker of files all are there with their
    sha256; shards.txt names tars that are committed.
    """
    wrong = []
    for name in (name for name in storage.list() if name not in known and not name.startswith(ASIDE)):
        try:
            said = _problem(storage, name)
        except FileNotFoundError as error:  # committed names stay
            said = f"gone or never there: {error}"
        except (ValueError, KeyError) as error:  # a table, JSON or text that is not whole
            said = f"torn: {type(error).__name__}: {error}"
        if said:
            wrong.append(f"{name}: {said}")
        elif not name.endswith("shards.txt"):
            known.add(name)
    return wrong


def _problem(storage: Storage, name: str) -> str:
    folder, _, last = name.rpartition("/")
    if name.endswith(".tar"):
        found = hashlib.sha256(storage.read(name)).hexdigest()
        return "" if last.removesuffix(".tar").endswith(found[:12]) else f"a torn tar is visible, its sha256 is {found}"
    if name.endswith(".parquet"):
        table = manifest.read(storage, name)
        return _shard_problem(storage, folder, table) if "shard" in manifest.metadata(table) else ""
    if last == "shards.txt":
        listed = set(storage.read(name).decode().split())  # first: what is committed after this is no matter of it
        committed = {manifest.metadata(manifest.read(storage, path))["shard"] for path in manifest.sidecars(storage, folder)}
        return f"names what is not committed: {absent}" if (absent := ", ".join(sorted(listed - committed))) else ""
    if name.endswith(".json"):
        content = json.loads(storage.read(name))
        marker = read_marker(storage, name) if "facts" in content and "files" in content else None
        for file, sha256 in marker.files.items() if marker else ():
            if hashlib.sha256(storage.read(f"{marker.folder}/{file}")).hexdigest() != sha256:
                return f"{file} is not what it was committed with"
    return ""


def _shard_problem(storage: Storage, folder: str, table) -> str:
    about = manifest.metadata(table)
    data = storage.read(f"{folder}/{about['shard']}")
    if hashlib.sha256(data).hexdigest() != about["shard_sha256"]:
        return f"{about['shard']} is not the tar that was committed"
    for row in table.select(["key", "offset", "size", "sha256"]).to_pylist():
        if hashlib.sha256(data[row["offset"] : row["offset"] + row["size"]]).hexdigest() != row["sha256"]:
            return f"key {row['key']} is not where it should be"
    return ""
