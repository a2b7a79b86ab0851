"""Is what a run says it made still there, and would it be made again? `vhs verify` and `vhs regenerate`."""

from __future__ import annotations

import hashlib
import json

from jobs import plan
from shards.storage import open_storage
from shards.verify import Finding, verify


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
        findings += _marker_findings(plan.reopen(url, read_only=True), full)
    elif not shards:
        raise ValueError(f"{url} is neither a run (no plan.json) nor a folder of shards (no tar with a sidecar)")
    return shards, samples, findings


def _marker_findings(run: plan.Run, full: bool) -> list[Finding]:
    """What units' markers list: the files they made, there and with `full` as committed; and with `full` their input markers, unchanged since."""
    findings, held = [], {}
    done = [unit for _, units in run.named() for unit in units if run.done(unit)]
    for unit in done:
        marker, again = run.marker(unit.marker), f"delete {unit.marker}, then run the same command again"
        for name, sha256 in marker.files.items():
            file = f"{marker.folder}/{name}"
            if file not in run.names:
                findings.append(Finding(file, f"missing, though {unit.marker} lists it", again))
            elif full and hashlib.sha256(run.storage.read(file)).hexdigest() != sha256:
                findings.append(Finding(file, "its sha256 is not the one it was committed with", f"delete it; {again}"))
        held |= {path: (sha256, unit.marker) for markers in marker.inputs.values() for path, sha256 in markers}
    for path, (sha256, reader) in held.items():
        if path not in run.names:
            findings.append(
                Finding(path, f"missing, though {reader} was made from it", f"delete {reader}, then run the same command again")
            )
        elif full and hashlib.sha256(run.storage.read(path)).hexdigest() != sha256:
            findings.append(Finding(path, f"not what {reader} was made from", "delete it, then run the same command again"))
    return findings


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
    for path in sorted(name for name in run.names if name.startswith("generated/") and name.endswith(".parquet")):
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
