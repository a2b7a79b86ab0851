"""Is what a run says it made still there, and would it be made again? `vhs verify`, `vhs repair` and `vhs regenerate`."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from urllib.parse import unquote, urlsplit

from jobs import attempt, generators, history, outside, plan
from jobs.claim import Attempt
from jobs.config import PHANTOMS
from jobs.data import EMPTY, open_data
from jobs.unit import Marker, read_marker
from shards import manifest
from shards.storage import Storage, open_storage
from shards.verify import Finding, unread, verify
from vhs.sources import SourceError

_MARKER = re.compile(r"-[0-9a-f]{12}\.json$")  # of units that make files
_TABLE = re.compile(r"-[0-9a-f]{12}\.parquet$")  # of units that make shards and tables
_IDENTITY = re.compile(r"-([0-9a-f]{12})\.(?:json|parquet)$")
DAMAGED = (ValueError, KeyError, TypeError, AttributeError)  # what reading something else than was written ends in
ASIDE = ("state/", "checkpoints/")
LIST = "/shards.txt"
KEPT = (  # there when the run began, or a person's word
    "plan.json", "real/sources.json", "outside/", "priors/own.json", "tune/", f"{plan.CORRECTIONS}/", f"{plan.CONFIRMED}/",
)  # fmt: skip
_PRODUCT = re.compile(r"(.+/[0-9a-f]{12})/.+")  # the folder of a unit's files


def verify_all(url: str, full: bool) -> tuple[int, int, list[Finding]]:
    """Every shard folder below `url`, and in a run every file of every marker -> (shards, samples, findings)."""
    storage = open_storage(url)
    names = storage.list()
    shards = samples = 0
    findings: list[Finding] = []
    made_here = [name for name in names if "plan.json" in names and _in_shards(name) and _TABLE.search(name)]  # whose tar may be gone
    for folder in sorted({name.rpartition("/")[0] for name in [*made_here, *names] if name in made_here or name.endswith(".tar")}):
        found = verify(storage, folder, full)
        shards, samples = shards + found.shards, samples + found.samples
        findings += found.found
    if "plan.json" in names:
        findings += [*_torn(storage, names), *_marker_findings(storage, names, full), *_table_findings(storage, names), *_left_over(storage, names)]
    elif not shards and not findings:
        raise ValueError(f"{url} is neither a run (no plan.json) nor a folder of shards (no tar with a sidecar)")
    return shards, samples, findings


def _wrong(path: str, what: str, *drop: str) -> Finding:
    """`path` is not what it was: the run makes it anew once `drop`, or else it, is gone. Unless it is what no run makes."""
    if path.startswith(KEPT):
        return Finding(path, what, "put it back from a copy: it is not made again")
    drop = drop or (path,)
    return Finding(path, what, f"delete {' and '.join(drop)}, then run the same command again", again=True, drop=drop)


def _gone(path: str, reader: str) -> Finding:
    what = f"missing, though {reader} was made from it"
    return _wrong(path, what) if path.startswith(KEPT) else Finding(path, what, "run the same command again", again=True)


def _torn(storage: Storage, names: list[str]) -> Iterator[Finding]:
    """What a power cut left empty or half: of everything that is JSON, and of markers also what is JSON and no marker. Products: _marker_findings."""
    for path in (name for name in names if name.endswith(".json") and not name.startswith(ASIDE) and not _PRODUCT.fullmatch(name)):
        try:
            read_marker(storage, path) if _MARKER.search(path) else json.loads(storage.read(path))
        except DAMAGED as error:
            yield _wrong(path, f"not readable: {error!r}")
        except OSError as error:
            yield unread(path, error)


def _marker_findings(storage: Storage, names: list[str], full: bool) -> list[Finding]:
    """What units' markers list: the files they made, there, not empty, and with `full` as committed; and with `full` their input markers, unchanged since.

    Markers are found by their names, not by asking the run for its units: an input that changed gives its readers another identity, and they would
    look undone instead of contradicted.
    """
    findings, held, there = [], {}, set(names)
    for path, marker in _markers(storage, names):
        for name, sha256 in marker.files.items():
            file = f"{marker.folder}/{name}"
            if file not in there:
                findings.append(_wrong(file, f"missing, though {path} lists it", path))
                continue
            try:
                if problem := _file_problem(storage, file, sha256, full):
                    findings.append(_wrong(file, problem, path, file))
            except OSError as error:
                findings.append(unread(file, error))
        held |= {made: (sha256, path) for markers in marker.inputs.values() for made, sha256 in markers}
    for path, (sha256, reader) in held.items():
        if path not in there:
            findings.append(_gone(path, reader))
            continue
        try:
            if full and _sha256(storage, path) != sha256:
                findings.append(_wrong(path, f"not what {reader} was made from"))
        except OSError as error:
            findings.append(unread(path, error))
    return findings


def _file_problem(storage: Storage, file: str, sha256: str, full: bool) -> str:
    """What is wrong with a file that was committed with `sha256`, or ""."""
    if full:
        return "" if _sha256(storage, file) == sha256 else "its sha256 is not the one it was committed with"
    if sha256 != EMPTY and not storage.size(file):
        return "it is empty"
    try:
        json.loads(storage.read(file) if file.endswith(".json") else b"{}")
    except ValueError as error:
        return f"not readable: {error!r}"
    return ""


def _markers(storage: Storage, names: list[str]) -> Iterator[tuple[str, Marker]]:
    for path in (name for name in names if _MARKER.search(name) and not name.startswith("state/")):
        with suppress(*DAMAGED, OSError):  # _torn has it
            yield path, read_marker(storage, path)


def _table_findings(storage: Storage, names: list[str]) -> Iterator[Finding]:
    """Of shards and tables: what they were made from is there (who drew an image, who measured it), and labels are those of their shard's images."""
    there, said = set(names), set()
    for path in (name for name in names if _TABLE.search(name) and not name.startswith("state/")):
        try:
            table = manifest.read(storage, path)
            made_from = {} if path.startswith(KEPT) else json.loads(manifest.metadata(table)["unit"])["inputs"]
        except DAMAGED as error:
            if not _in_shards(path):  # else it is a sidecar, and shards.verify has it
                yield _wrong(path, f"not readable: {error}")
            continue
        except OSError as error:
            if not _in_shards(path):
                yield unread(path, error)
            continue
        for gone in sorted({marker for markers in made_from.values() for marker in markers} - there - said):
            said.add(gone)
            yield _gone(gone, path)
        for shard in made_from.get("shard", ()):
            if shard in there and (problem := _label_problem(storage, table, shard)):
                yield _wrong(path, problem)


def _left_over(storage: Storage, names: list[str]) -> Iterator[Finding]:
    """What a kill left behind and nobody looks at: checkpoints of units that are done, and files that no marker names."""
    done = {match[1] for name in names if (match := _IDENTITY.search(name)) and not name.startswith(ASIDE)}
    for name in (name for name in names if name.startswith("checkpoints/") and name.split("/")[1] in done):
        yield Finding(name, "a checkpoint of a unit that is done", "nothing; once nobody is at work it may be deleted", error=False, drop=(name,))
    named = {marker.folder for _, marker in _markers(storage, names)}
    strays: dict[str, list[str]] = {}
    for name in (name for name in names if not name.startswith((*ASIDE, *KEPT))):
        if (match := _PRODUCT.fullmatch(name)) and match[1] not in named:
            strays.setdefault(match[1], []).append(name)
    for folder, files in strays.items():
        what = f"{len(files)} files that no marker names"
        yield Finding(folder, what, "nothing; once nobody is at work it may be deleted", error=False, drop=tuple(files))


def _in_shards(path: str) -> bool:
    return path.startswith(("real/", "priors/", "generated/"))


def _label_problem(storage: Storage, labels, shard: str) -> str:
    try:
        images = set(manifest.read(storage, shard)["key"].to_pylist())
    except (*DAMAGED, OSError):
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

    What a person said, the plan and the list of sources are never deleted, nor are real images whose sources are away or changed, nor anything but
    orphans in a folder of shards that no run stands behind. Where the plan cannot be read nothing is deleted: nobody can tell what is made again.
    """
    _refuse_part_of_run(url)
    findings = verify_all(url, full)[2]
    storage, run = open_storage(url), _idle(url, findings)
    gone, again, left, lists = [], [], [], {finding.path for finding in findings if finding.path.endswith(LIST)}
    planless = run is None and storage.exists("plan.json")
    for finding in (finding for finding in findings if finding.path not in lists):
        if finding.drop and not finding.error and not finding.again and not planless:
            gone += finding.drop
        elif finding.again and run and (away := _sources_away(run, finding.path)):
            left.append(replace(finding, to_do=f"{away}; until then it stays"))
        elif finding.again and run:
            gone += finding.drop
            again.append(finding)
        elif finding.error or finding.again:
            left.append(finding)
    there = set(storage.list())
    gone = sorted(set(gone) & there, key=lambda name: (not _IDENTITY.search(name), name))
    lists |= {name.rpartition("/")[0] + LIST for name in gone if name.endswith(".parquet")} & there
    if not dry_run:
        for name in gone:  # markers first: killed on the way, what is left is undone, not contradicted
            storage.delete(name)
        lists = {name for name in lists if _rewritten(storage, name)}
        storage.sweep(older_than_s=3600)
        attempt.sweep_scratch(storage.work)
    return Repaired(gone, sorted(lists), again, left)


def _refuse_part_of_run(url: str):
    """PlanError for a folder inside of a run: whether somebody is at work there, the run knows, and its units write several folders."""
    whole = urlsplit(open_storage(url).url)
    for above in PurePosixPath(whole.path).parents:
        run = f"{whole.scheme}://{whole.netloc}{above}"
        with suppress(PermissionError):  # nothing of ours
            if open_storage(run).exists("plan.json"):
                raise plan.PlanError(f"{url} is part of a run: vhs repair {unquote(run.removeprefix('file://'))}")


def _sources_away(run: plan.Run, path: str) -> str:
    """For a shard of images that were brought, at `path`: how to have back what it was made of, so that it can be made again; "" if all is there."""
    where, source, parts = run.config.data, None, path.split("/")
    try:
        if path.startswith("real/") and where != PHANTOMS:
            sources = [source for unit in run.units("ingest") if path.startswith(f"{unit.path}-") for source in unit.params["sources"]]
        elif parts[0] == "generated" and len(parts) == 5 and parts[1] in (theirs := generators.outsiders(run.config)):
            where = theirs[parts[1]].in_scope(parts[2])[0]
            sources = outside.sources(run, *parts[1:3], int(parts[-1].partition("-")[0]))
        else:
            return ""
        data = open_data(where)
        for source in (source for source in sources if not source["reject"]):
            data.read(source)
    except (OSError, ValueError, SourceError) as error:
        return f"put {source['file'] if source else where} back ({error})"
    return ""


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
    before, since, execution = _beats(run), time.monotonic(), run.config.execution
    while before and time.monotonic() - since < execution.stale_s:  # until its heart stood still so long: another machine's clock may be wrong by hours
        time.sleep(execution.heartbeat_s)
        run.refresh()
        after = _beats(run)
        for one in (one for one in {**before, **after} if before.get(one) != after.get(one)):
            raise plan.PlanError(f"{one.node} is at work on {url} (process {one.pid}): wait for it, or end it (vhs cancel {url}), then repair")
    return run


def _beats(run: plan.Run) -> dict[Attempt, dict]:
    """The last word of every attempt that nothing speaks against."""
    return {one: history.beat(run, one) for one in history.living(run).values()}


def regenerate(url: str, key: str) -> dict:
    """Draw the generated image `key` again, its whole batch with it (or read it again where it came from outside) -> {"image", "shard", "equal",
    "difference", "numerics": {what: (then, now)}}.

    `difference` is the mean absolute difference in grey levels. KeyError if no generated shard of the run has the key.
    """
    import numpy as np

    from jobs import world
    from jobs.attempt import Inputs
    from jobs.stages import generate
    from shards import reader
    from vhs.radiograph import decode_png, encode_png

    run = plan.reopen(url)
    for unit in (unit for unit in dict(run.named()).get("generate", []) if run.done(unit)):
        table, path = manifest.load(run.storage, paths=[unit.marker]), unit.marker
        keys = table["key"].to_pylist()
        if key not in keys:
            continue
        row, batch = keys.index(key), run.config.generation.batch
        world.set_numerics(run.config.threads)
        if "sources" in unit.params:
            number, image = outside.again(run.config, Inputs(run.storage, unit), key)
        else:
            wanted = generate.wanted(run.config, unit.params)[row // batch * batch :][:batch]
            number, image = wanted[row % batch].number, list(generate.images(run.config, Inputs(run.storage, unit), wanted))[row % batch]
        stored = reader.ShardReader(run.storage, table).read(row, check=True)
        then, now = run.marker(path).facts["numerics"], world.numerics(run.config.threads, world.device(run.config.execution.device))
        return {
            "shard": path,
            "number": number,
            "equal": encode_png(image) == stored,
            "difference": float(np.abs(image.astype(int) - decode_png(stored).astype(int)).mean()),
            "numerics": {name: (then.get(name), now.get(name)) for name in now if then.get(name) != now.get(name)},
        }
    raise KeyError(f"no generated image of {url} has the key {key!r}")
