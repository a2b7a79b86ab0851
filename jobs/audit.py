"""Is what a run says it made still there, and would it be made again? `vhs verify` and `vhs regenerate`."""

from __future__ import annotations

import hashlib
import json
import re

from jobs import plan
from jobs.unit import read_marker
from shards.storage import Storage, open_storage
from shards.verify import Finding, verify

_MARKER = re.compile(r"-[0-9a-f]{12}\.json$")  # of units that make files; those of shards and tables are their inputs


def verify_all(url: str, full: bool) -> tuple[int, int, list[Finding]]:
    """Every shard folder below `url`, and in a run every file of every marker -> (shards, samples, findings)."""
    storage = open_storage(url)
    names = storage.list()
    shards = samples = 0
    findings: list[Finding] = []
    for folder in sorted({name.rpartition("/")[0] for name in names if name.endswith(".tar")}):
        found = verify(storage, folder, full)
        shards, samples = shards + found.shards, samples + found.samples
        findings += found.found
    if "plan.json" in names:
        findings += _marker_findings(storage, names, full)
    elif not shards:
        raise ValueError(f"{url} is neither a run (no plan.json) nor a folder of shards (no tar with a sidecar)")
    return shards, samples, findings


def _marker_findings(storage: Storage, names: list[str], full: bool) -> list[Finding]:
    """What units' markers list: the files they made, there and with `full` as committed; and with `full` their input markers, unchanged since.

    Markers are found by their names, not by asking the run for its units: an input that changed gives its readers another identity, and they would
    look undone instead of contradicted.
    """
    findings, held, there = [], {}, set(names)
    for path in (name for name in names if _MARKER.search(name) and not name.startswith("state/")):
        marker, again = read_marker(storage, path), f"delete {path}, then run the same command again"
        for name, sha256 in marker.files.items():
            file = f"{marker.folder}/{name}"
            if file not in there:
                findings.append(Finding(file, f"missing, though {path} lists it", again))
            elif full and _sha256(storage, file) != sha256:
                findings.append(Finding(file, "its sha256 is not the one it was committed with", f"delete it; {again}"))
        held |= {made: (sha256, path) for markers in marker.inputs.values() for made, sha256 in markers}
    for path, (sha256, reader) in held.items():
        if path not in there:
            findings.append(Finding(path, f"missing, though {reader} was made from it", "run the same command again"))
        elif full and _sha256(storage, path) != sha256:
            findings.append(Finding(path, f"not what {reader} was made from", "delete it, then run the same command again"))
    return findings


def _sha256(storage: Storage, path: str) -> str:
    return hashlib.sha256(storage.read(path)).hexdigest()


def regenerate(url: str, key: str) -> dict:
    """Draw the generated image `key` again, its whole batch with it -> {"image", "shard", "equal", "difference", "numerics": {what: (then, now)}}.

    `difference` is the mean absolute difference in grey levels. KeyError if no generated shard of the run has the key.
    """
    import numpy as np

    from jobs import drawing, world
    from jobs.stages import generate
    from shards import manifest, reader
    from vhs.radiograph import decode_png, encode_png

    run = plan.reopen(url)
    for path in (name for name in run.under("generated/") if name.endswith(".parquet")):
        table = manifest.load(run.storage, paths=[path])
        keys = table["key"].to_pylist()
        if key not in keys:
            continue
        row, about = keys.index(key), json.loads(manifest.metadata(manifest.read(run.storage, path))["unit"])
        world.set_numerics(run.config.threads)
        batch = run.config.generation.batch
        wanted = generate.wanted(run.config, about["params"])[row // batch * batch :][:batch]
        folder = run.storage.local(run.marker(about["inputs"]["generator"][0]).folder)
        image = list(drawing.draw(run.config, str(folder), run.config.generation, wanted))[row % batch]
        stored = reader.ShardReader(run.storage, table).read(row, check=True)
        then, now = run.marker(path).facts["numerics"], world.numerics(run.config.threads, world.device(run.config.execution.device))
        return {
            "shard": path,
            "number": wanted[row % batch].number,
            "equal": encode_png(image) == stored,
            "difference": float(np.abs(image.astype(int) - decode_png(stored).astype(int)).mean()),
            "numerics": {name: (then.get(name), now.get(name)) for name in now if then.get(name) != now.get(name)},
        }
    raise KeyError(f"no generated image of {url} has the key {key!r}")
