"""Is what a run says it made still there, and would it be made again? `vhs verify`, `vhs repair` and `vhs regenerate`."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass

from jobs import history, plan
from jobs.data import is_here
from jobs.unit import read_marker
from shards import manifest
from shards.storage import Storage, open_storage
from shards.verify import Finding, verify

_MARKER = re.compile(r"-[0-9a-f]{12}\.json$")  # of units that make files
_TABLE = re.compile(r"-[0-9a-f]{12}\.parquet$")  # of units that make shards and tables
ASIDE = ("state/", "checkpoints/")
LIST = "/shards.txt"
KEPT = ("plan.json", "real/sources.json", "priors/own.json")  # what was there when the run began


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
        findings += [*_torn(storage, names), *_marker_findings(storage, names, full), *_table_findings(storage, names)]
    elif not shards and not findings:
        raise ValueError(f"{url} is neither a run (no plan.json) nor a folder of shards (no tar with a sidecar)")
    return shards, samples, findings


def _torn(storage: Storage, names: list[str]) -> Iterator[Finding]:
    """What a power cut left empty or half: of everything that is JSON."""
    for path in (name for name in names if name.endswith(".json") and not name.startswith(ASIDE)):
        try:
            json.loads(storage.read(path))
        except ValueError as error:
            if path in KEPT or path.startswith("tune/"):
                yield Finding(path, f"not readable: {error}", "put it back from a copy: it is not made again")
            else:
                yield Finding(path, f"not readable: {error}", f"delete {path}, then run the same command again", again=True, drop=(path,))


def _marker_findings(storage: Storage, names: list[str], full: bool) -> list[Finding]:
    """What units' markers list: the files they made, there and with `full` as committed; and with `full` their input markers, unchanged since.

    Markers are found by their names, not by asking the run for its units: an input that changed gives its readers another identity, and they would
    look undone instead of contradicted.
    """
    findings, held, there = [], {}, set(names)
    for path in (name for name in names if _MARKER.search(name) and not name.startswith("state/")):
        try:
            marker = read_marker(storage, path)
        except (ValueError, KeyError):  # _torn has it
            continue
        again = f"delete {path}, then run the same command again"
        for name, sha256 in marker.files.items():
            file = f"{marker.folder}/{name}"
            if file not in there:
                findings.append(Finding(file, f"missing, though {path} lists it", again, again=True, drop=(path,)))
            elif full and _sha256(storage, file) != sha256:
                what = "its sha256 is not the one it was committed with"
                findings.append(Finding(file, what, f"delete it; {again}", again=True, drop=(file, path)))
        held |= {made: (sha256, path) for markers in marker.inputs.values() for made, sha256 in markers}
    for path, (sha256, reader) in held.items():
        if path not in there:
            findings.append(_gone(path, reader))
        elif full and _sha256(storage, path) != sha256:
            to_do = "delete it, then run the same command again"
            findings.append(Finding(path, f"not what {reader} was made from", to_do, again=True, drop=(path,)))
    return findings


def _gone(path: str, reader: str) -> Finding:
    return Finding(path, f"missing, though {reader} was made from it", "run the same command again", again=True)


def _table_findings(storage: Storage, names: list[str]) -> Iterator[Finding]:
    """Of shards and tables: what they were made from is there (who drew an image, who measured it), and labels are those of their shard's images."""
    there, said = set(names), set()
    for path in (name for name in names if _TABLE.search(name) and not name.startswith(("state/", "labels/corrections/"))):
        try:
            table = manifest.read(storage, path)
            made_from = json.loads(manifest.metadata(table)["unit"])["inputs"]
        except (ValueError, KeyError) as error:
            if not _in_shards(path):  # else it is a sidecar, and shards.verify has it
                yield Finding(path, f"not readable: {error}", f"delete {path}, then run the same command again", again=True, drop=(path,))
            continue
        for gone in sorted({marker for markers in made_from.values() for marker in markers} - there - said):
            said.add(gone)
            yield _gone(gone, path)
        for shard in made_from.get("shard", ()):
            if shard in there and (problem := _label_problem(storage, table, shard)):
                yield Finding(path, problem, f"delete {path}, then run the same command again", again=True, drop=(path,))


def _in_shards(path: str) -> bool:
    return path.startswith(("real/", "priors/", "generated/"))


def _label_problem(storage: Storage, labels, shard: str) -> str:
    try:
        images = set(manifest.read(storage, shard)["key"].to_pylist())
    except (ValueError, KeyError):
        return ""
    labelled = labels["key"].to_pylist() if "key" in labels.column_names else []
    if len(labelled) != len(images) or set(labelled) != images:
        return f"labels {len(labelled)} images, of which {len(images & set(labelled))} are among the {len(images)} of {shard}"
    return ""


def _sha256(storage: Storage, path: str) -> str:
    with storage.stream(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Repaired:
    """`gone`: names that were deleted, or would be; `rewritten`; `again`: what the same command will make anew; `left`: what could not be mended."""

    gone: list[str]
    rewritten: list[str]
    again: list[Finding]
    left: list[Finding]


def repair(url: str, full: bool, dry_run: bool = False) -> Repaired:
    """Delete what is of no use or wrong and can be made again, write shards.txt again. PlanError while somebody is at work.

    What a person said, the plan and the list of sources are never deleted, nor are real images while their data is away, nor anything in a folder of
    shards that no run stands behind.
    """
    findings = verify_all(url, full)[2]
    storage, run = open_storage(url), _idle(url, findings)
    gone, again, left, lists = [], [], [], {finding.path for finding in findings if finding.path.endswith(LIST)}
    for finding in (finding for finding in findings if finding.path not in lists):
        if finding.drop and not finding.again and (run or not finding.error):
            gone += finding.drop
        elif finding.again and run and (not finding.path.startswith("real/") or is_here(run.config.data)):
            gone += finding.drop
            again.append(finding)
        elif finding.error:
            left.append(finding)
    there = set(storage.list())
    gone = sorted(set(gone) & there, key=lambda name: (not _MARKER.search(name) and not _TABLE.search(name), name))
    lists |= {name.rpartition("/")[0] + LIST for name in gone if name.endswith(".parquet")} & there
    if not dry_run:
        for name in gone:  # markers first: killed on the way, what is left is undone, not contradicted
            storage.delete(name)
        lists = {name for name in lists if _rewritten(storage, name)}
        storage.sweep(older_than_s=3600)
    return Repaired(gone, sorted(lists), again, left)


def _rewritten(storage: Storage, path: str) -> bool:
    try:
        manifest.write_shards_txt(storage, path.removesuffix(LIST))
    except ValueError:  # a number twice: the run knows which of the two, and writes the list
        return False
    return True


def _idle(url: str, findings: list[Finding]) -> plan.Run | None:
    """The run at `url`, at which nobody is at work; None for a folder of shards, or where the plan cannot be read."""
    if not open_storage(url).exists("plan.json") or any(finding.path == "plan.json" for finding in findings):
        return None
    run = plan.reopen(url, read_only=True)
    for one in history.living(run).values():
        if time.time() - history.beat(run, one).get("when_s", one.began_s) < 3 * run.config.execution.stale_s:
            raise plan.PlanError(f"{one.node} is at work on {url} (process {one.pid}): wait for it, or end it (vhs cancel {url}), then repair")
    return run


def regenerate(url: str, key: str) -> dict:
    """Draw the generated image `key` again, its whole batch with it -> {"image", "shard", "equal", "difference", "numerics": {what: (then, now)}}.

    `difference` is the mean absolute difference in grey levels. KeyError if no generated shard of the run has the key.
    """
    import numpy as np

    from jobs import drawing, world
    from jobs.stages import generate
    from shards import reader
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
