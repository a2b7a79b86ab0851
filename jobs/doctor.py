"""`vhs doctor`: before a run goes elsewhere, what would stop it there. One check for each thing that users complain of, each with its mend.

The controller is asked; and one small job, where the site's jobs go, looks around on a node (jobs/probe.py) for all checks that need that.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from uuid import uuid4

from jobs import scheduler
from jobs.config import Config
from jobs.site import STAGES, Resources, Site, forget_allocation

PROBE_S = 60  # for the node's job to start and end
MODULES = ("torch", "timm", "diffusers", "accelerate", "deepspeed", "submitit", "pyarrow", "cv2", "vhs", "jobs", "shards")
SKEW_S, SHM_MB, FILES = 30, 256, 1024


class Problem(Exception):
    """What is wrong, as seen; `mend`: what to do."""

    def __init__(self, seen: str, mend: str):
        super().__init__(seen)
        self.mend = mend


@dataclass(frozen=True)
class Finding:
    """`verdict`: ok | problem | could not tell, with the evidence and, unless ok, what to do."""

    check: str
    verdict: str
    seen: str
    mend: str = ""


@dataclass
class Place:
    """Where a run is to go. `folder`: of the run, or the one that runs are made in; `needs`: paths that every node must see."""

    folder: Path
    needs: list[str]
    site: Site | None = None

    @cached_property
    def settings(self) -> dict[str, str]:
        """What slurmctld is configured to."""
        lines = scheduler.ask("scontrol", "show", "config").splitlines()
        return {name.strip(): value.strip() for name, _, value in (line.partition("=") for line in lines if "=" in line)}

    @cached_property
    def stages(self) -> dict[str, Resources]:
        """What the site asks for, each kind of job once, under the first stage that it is of."""
        every = {stage: self.site.resources(stage) for stage in STAGES}
        return {stage: asked for n, (stage, asked) in enumerate(every.items()) if asked not in list(every.values())[:n]}

    def partitions(self, asked: Resources) -> list[dict]:
        """The nodes of the partition that `asked` names, or of the default one: kinds of {partition, state, limit, cpus, mem_mb, gres}."""
        rows = [line.split("|") for line in scheduler.ask("sinfo", "-h", "-o", "%P|%a|%l|%c|%m|%G").splitlines()]
        names = ("partition", "state", "limit", "cpus", "mem_mb", "gres")
        mine = [dict(zip(names, row, strict=True)) for row in rows if (row[0].rstrip("*") == asked.partition if asked.partition else row[0].endswith("*"))]
        if not mine:
            there = ", ".join(sorted({row[0].rstrip("*") for row in rows}))
            raise Problem(f"no partition {asked.partition or '(default)'}", f"`partition:` of the site is one of {there}")
        return mine

    @property
    def node(self) -> dict:
        """What the probe said on a node. Problem, with what its job said, where it could not speak; it is asked once."""
        if isinstance(self._looked, Exception):
            raise self._looked
        return self._looked

    @cached_property
    def _looked(self) -> dict | Exception:
        try:
            return self._look()
        except Exception as error:
            return error

    def _look(self) -> dict:
        asked = self.site.resources("ingest")
        small = {"ntasks_per_node": 1, "cpus_per_task": 1, "mem": "1000M", "time": min(5, asked.time_min), "gpus_per_node": asked.gpus_per_node or None}
        options = {**asked.sbatch(1), **small}
        options |= options.pop("additional_parameters", None) or {}
        token, question, made = f"doctor-{uuid4().hex}", self._question(), not self.folder.exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=self.folder, prefix="doctor-"))
        try:
            (self.folder / token).write_text(token)
            log, script = scratch / "log", scratch / "job.sh"
            line = f"{self.site.command} {shlex.quote(str(Path(__file__).with_name('probe.py')))} {shlex.quote(json.dumps(question | {'token': token}))}"
            script.write_text("\n".join(["#!/bin/bash", *self.site.lines, line, ""]))
            flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items() if value is not None]
            job = scheduler.ask("sbatch", "--parsable", f"--output={log}", *flags, str(script)).strip()
            said = self._wait(job, log)
            said["back"] = (self.folder / f"{token}.node").exists()
            return said
        finally:
            for left in (self.folder / token, self.folder / f"{token}.node"):
                left.unlink(missing_ok=True)
            shutil.rmtree(scratch, ignore_errors=True)
            if made:
                with suppress(OSError):  # somebody has put something there meanwhile
                    self.folder.rmdir()

    def _question(self) -> dict:
        site = self.site
        network = bool(site and site.network and not os.environ.get("HF_HUB_OFFLINE"))
        return {"folder": str(self.folder), "see": self.needs, "modules": MODULES, "work_dir": (site and site.work_dir) or "", "network": network}

    def _wait(self, job: str, log: Path) -> dict:
        deadline = time.monotonic() + PROBE_S
        while time.monotonic() < deadline:
            time.sleep(0.3)
            said = log.read_text(errors="replace") if log.exists() else ""
            if line := next((line for line in said.splitlines() if line.startswith("probe ")), None):
                return json.loads(line.removeprefix("probe "))
            state = scheduler.ask("squeue", "--noheader", "--states=all", "--jobs", job, "--format", "%T %r").split()
            if state and state[0] not in ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING"):
                last = (said.strip().splitlines() or ["its log is not seen here: is the run's folder on the node?"])[-1]
                raise Problem(f"job {job} ended ({state[0].lower()}) without a word: {last}", "`python:` and `setup:` of the site, the folder of the run")
        scheduler.ask("scancel", job)
        raise RuntimeError(f"job {job} did not run within {PROBE_S} s ({' '.join(state)})")


# --- asked of the controller -----------------------------------------------------------------------------------------------------------
def partition(place: Place) -> str:
    for asked in place.stages.values():
        rows = place.partitions(asked)
        if all(row["state"] != "up" for row in rows):
            raise Problem(f"partition {rows[0]['partition']} is {rows[0]['state']}", "another `partition:`, or wait for it")
    return f"{len(place.stages)} kinds of job, their partitions are up"


def accepted(place: Place) -> str:
    for stage, asked in place.stages.items():
        options = asked.sbatch(1)
        options |= options.pop("additional_parameters", None) or {}
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        done = subprocess.run(["sbatch", "--test-only", *flags, "--wrap=true"], capture_output=True, text=True, timeout=30)
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise Problem(f"sbatch refuses a job of {stage}: {said}", "`account:`, `qos:`, `constraint:`, `options:` and sizes of the site")
    return "sbatch --test-only takes a job of every kind"


def time_limit(place: Place) -> str:
    for stage, asked in place.stages.items():
        limits = [minutes for row in place.partitions(asked) if (minutes := scheduler.minutes(row["limit"])) is not None]
        if limits and asked.time_min > max(limits):
            raise Problem(f"{stage}: time_min is {asked.time_min}, the partition allows {max(limits)}", f"time_min: {max(limits)}, or another partition")
        if asked.time_min <= 10:
            raise Problem(f"{stage}: time_min is {asked.time_min}; up to 10 submitit takes every preemption for the time limit", "time_min: 11 or more")
    return "within the partitions' limits"


def size(place: Place) -> str:
    for stage, asked in place.stages.items():
        rows, each = place.partitions(asked), asked.ranks_per_node
        cpus, mem = max(int(row["cpus"].rstrip("+")) for row in rows), max(int(row["mem_mb"].rstrip("+")) for row in rows)
        if each * asked.cpus_per_rank > cpus:
            raise Problem(f"{stage}: {each} ranks of {asked.cpus_per_rank} CPUs, a node has {cpus}", "cpus_per_rank, or ranks a node")
        if each * asked.mem_gb_per_rank * 1024 > mem:
            raise Problem(f"{stage}: {each} ranks of {asked.mem_gb_per_rank:g} GB, a node has {mem / 1024:.0f}", "mem_gb_per_rank, or ranks a node")
    return "every kind of job fits a node"


def gpus(place: Place) -> str:
    for stage, asked in place.stages.items():
        if asked.gpus_per_node:
            there = sorted({row["gres"] for row in place.partitions(asked)})
            kind = f"gpu:{asked.gpu_type}:" if asked.gpu_type else "gpu:"
            if not any(kind in gres and _count(gres) >= asked.gpus_per_node for gres in there):
                raise Problem(f"{stage}: {asked.gpus_per_node} of {kind.rstrip(':')} a node, the partition has {', '.join(there)}", "gpus_per_node, gpu_type")
    return "as many as asked for, of that type"


def _count(gres: str) -> int:
    return max(int("".join(filter(str.isdigit, part.partition("(")[0].rpartition(":")[2])) or 0) for part in gres.split(",") if part.startswith("gpu"))


def arrays(place: Place) -> str:
    limit = int(place.settings["MaxArraySize"])
    if place.site.max_array > limit:
        raise Problem(f"max_array is {place.site.max_array}, MaxArraySize {limit}", f"max_array: {limit}, else arrays are refused")
    return f"up to {limit}"


def accounting(place: Place) -> str:
    kind = place.settings["AccountingStorageType"]
    if "none" in kind:
        raise Problem(f"AccountingStorageType is {kind}", "without sacct a job that vanished has no reason, and `execution.tries` of them give their unit up")
    scheduler.ask("sacct", "-X", "-n", "--jobs=1")
    return f"{kind} answers"


def preemption(place: Place) -> str:
    for stage, asked in place.stages.items():
        name = place.partitions(asked)[0]["partition"].rstrip("*")
        said = scheduler.ask("scontrol", "--oneliner", "show", "partition", name)
        if "PreemptMode=CANCEL" in said:
            raise Problem(f"{stage}: partition {name} cancels what it preempts", "another partition, or `vhs run` again after each preemption")
    return "what is preempted is queued again"


# --- asked of a node -------------------------------------------------------------------------------------------------------------------
def python(place: Place) -> str:
    import platform

    there = place.node["python"]
    if there.split(".")[:2] != platform.python_version().split(".")[:2]:
        raise Problem(f"Python {there} on {place.node['host']}, {platform.python_version()} here", "`python:` or `setup:` of the site: jobs are pickled here")
    return f"Python {there} on {place.node['host']}"


def modules(place: Place) -> str:
    if missing := place.node["missing"]:
        raise Problem(f"not on {place.node['host']}: {', '.join(missing)}", "the environment that `setup:` and `python:` make there: pip install vhs")
    if (there := place.node["versions"]["vhs"]) != version("vhs"):
        raise Problem(f"vhs {there or 'unknown'} on {place.node['host']}, {version('vhs')} here", "the same version in both places")
    return f"{len(MODULES)} found, vhs {there}"


def folder(place: Place) -> str:
    if (said := place.node["folder"]) != "ok" or not place.node["back"]:
        raise Problem(f"{place.folder} on {place.node['host']}: {said}", "--out in a folder that every node sees, on a file system with hard links")
    return f"{place.folder} is seen there and back, with hard links"


def data(place: Place) -> str:
    if unseen := place.node["unseen"]:
        raise Problem(f"not on {place.node['host']}: {', '.join(unseen)}", "data and models in a folder that every node sees (vhs fetch CONFIG --to DIR)")
    return f"{len(place.needs)} paths are seen there"


def clock(place: Place) -> str:
    skew = place.node["now_s"] - time.time()
    if abs(skew) > SKEW_S + PROBE_S:
        raise Problem(f"{place.node['host']} is {skew:+.0f} s off", "its time service; until then ages in vhs status are wrong")
    return "agrees"


def scratch(place: Place) -> str:
    if (said := place.node["scratch"]) != "ok":
        raise Problem(f"work_dir {place.site.work_dir or '(default)'} on {place.node['host']}: {said}", "`work_dir:` a folder there with room, or null")
    return "takes 8 MB"


def network(place: Place) -> str:
    if (said := place.node["network"]) not in ("ok", "not asked"):
        raise Problem(f"{place.node['host']} does not reach the hub: {said}", "`network: false`, and vhs fetch CONFIG --to DIR beforehand")
    return "reaches the hub" if said == "ok" else "not needed"


def limits(place: Place) -> str:
    if place.node["shm_mb"] < SHM_MB:
        raise Problem(f"/dev/shm there has {place.node['shm_mb']} MB", "more of it: a container needs the machine's (--bind /dev/shm, --shm-size)")
    if place.node["files"] < FILES:
        raise Problem(f"{place.node['files']} open files on {place.node['host']}", f"ulimit -n {FILES} in `setup:`")
    return f"{place.node['shm_mb']} MB of shared memory, {place.node['files']} open files"


# --- asked of Ray ----------------------------------------------------------------------------------------------------------------------
def token(place: Place) -> str:
    if os.environ.get("RAY_AUTH_MODE") != "token":
        raise Problem("RAY_AUTH_MODE is not token: whoever reaches the port runs code as you", "ray.sbatch sets it; else see configs/ray/local.yaml")
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()
    if not file.is_file():
        raise Problem(f"no token at {file}", "RAY_AUTH_TOKEN_PATH: the file that the cluster was started with")
    if stat.S_IMODE(file.stat().st_mode) & 0o077:
        raise Problem(f"{file} can be read by others ({stat.S_IMODE(file.stat().st_mode):o})", f"chmod 600 {file}")
    return f"{file} is yours alone"


def address(place: Place) -> str:
    host, _, port = os.environ.get("RAY_ADDRESS", "").rpartition(":")
    if not host or not port.isdecimal():
        raise Problem(f"RAY_ADDRESS is {os.environ.get('RAY_ADDRESS') or 'not set'}", "HOST:PORT of the head; ray-JOBID.env of ray.sbatch has it")
    import socket

    try:
        socket.create_connection((host, int(port)), timeout=4).close()
    except OSError as error:
        raise Problem(f"nobody listens at {host}:{port} ({error})", "start it: slurm/ray.sbatch, ray up configs/ray/local.yaml") from None
    return f"{host}:{port} listens"


def nodes(place: Place) -> str:
    """Every node of Ray looks around: versions, the run's folder, what it must see."""
    address(place)
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

    from jobs.probe import look

    place.folder.mkdir(parents=True, exist_ok=True)
    token = f"doctor-{uuid4().hex}"
    ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False, logging_level="ERROR", ignore_reinit_error=True)
    try:
        alive = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
        for number, node in enumerate(alive):
            (place.folder / f"{token}{number}").write_text(token)
            asked = place._question() | {"token": f"{token}{number}", "network": False}
            there = ray.get(ray.remote(look).options(num_cpus=0, scheduling_strategy=On(node, soft=False)).remote(asked), timeout=30)
            for wrong, what in ((there["missing"], "modules missing"), (there["unseen"], "paths not seen")):
                if wrong:
                    raise Problem(f"{there['host']}: {what}: {', '.join(wrong)}", "the same environment and file system on every node")
            if there["folder"] != "ok" or there["versions"]["ray"] != version("ray"):
                said = there["folder"] if there["folder"] != "ok" else f"Ray {there['versions']['ray']}, {version('ray')} here"
                raise Problem(f"{there['host']}: {said}", "a run's folder that every node sees, and one version of Ray")
        return f"{len(alive)} nodes see {place.folder}, with the same versions"
    finally:
        ray.shutdown()
        for left in place.folder.glob(f"{token}*"):
            left.unlink()


Check = Callable[[Place], str]  # what was seen; Problem where something is wrong, any other error where it could not be told
CHECKS: dict[str, dict[str, tuple[str, Check]]] = {
    "slurm": {
        "partition": ("is there such a partition, and is it up?", partition),
        "accepted": ("does sbatch take such jobs? account, qos, constraint", accepted),
        "time": ("do they fit the partition's time limit, and submitit's?", time_limit),
        "size": ("does a node have the CPUs and the memory?", size),
        "gpus": ("does a node have the GPUs, of that type?", gpus),
        "arrays": ("are arrays split below MaxArraySize?", arrays),
        "accounting": ("does sacct answer?", accounting),
        "preemption": ("is what is preempted queued again?", preemption),
        "python": ("does the site's Python start on a node, the same as here?", python),
        "modules": ("are all packages there, in this version?", modules),
        "folder": ("does a node see the run's folder, with hard links?", folder),
        "data": ("does a node see the data and the models?", data),
        "clock": ("do the clocks agree?", clock),
        "scratch": ("can a node write where the site says?", scratch),
        "network": ("do nodes reach the internet, if the site says so?", network),
        "limits": ("is there shared memory, are files enough?", limits),
    },
    "ray": {
        "token": ("is the cluster closed to others?", token),
        "address": ("does somebody listen at RAY_ADDRESS?", address),
        "nodes": ("do all nodes have the same packages, and see the run's folder?", nodes),
    },
}


def needs(config: Config) -> list[str]:
    """The paths of this machine that a run of `config` reads."""
    from vhs.split import scopes  # pandas

    named = [config.data, config.base, config.labeller.init, config.classifier.weights]
    named += [place for one in config.generators for scope in scopes(config.split) for place in one.in_scope(scope)]
    return [str(Path(name).expanduser().resolve()) for name in named if "/" in name and Path(name).expanduser().exists()]


def examine(on: str, place: Place, only: str | None = None):
    """Make the checks of `on`, or the one called `only` -> a Finding each, as they come. What kept one from seeing anything is said once."""
    if on == "slurm":
        forget_allocation()  # as before a run is submitted: what is accepted by a SBATCH_ACCOUNT of this shell would be refused then
    told: dict[str, str] = {}  # what an error says -> the check that said it first
    for name, (_, check) in CHECKS[on].items():
        if only in (None, name):
            try:
                yield Finding(name, "ok", check(place))
            except Exception as error:
                said = str(error) if isinstance(error, Problem) else f"{type(error).__name__}: {error}"
                if (first := told.setdefault(said, name)) != name:
                    yield Finding(name, "could not tell", f"the same as {first}", f"what {first} needs")
                elif isinstance(error, Problem):
                    yield Finding(name, "problem", said, error.mend)
                else:  # a check that fails says nothing of what it looks at
                    yield Finding(name, "could not tell", said, "the check again, when that is mended")
