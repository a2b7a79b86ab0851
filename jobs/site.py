"""A site's file, configs/clusters/NAME.yaml: where its jobs go, how large they are, what makes the environment on a node. All that is site-specific.

`Site.load("example").resources("train").sbatch(ranks=8)` -> the options of a job for eight ranks. The same file for a shell: `cluster_env` prints it,
slurm/env.sh sources that. Every key is execution, none is science: a run may go on at another site.
"""

from __future__ import annotations

import math
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, Field, model_validator

from jobs.config import ConfigError, find, validated
from jobs.stages import BY_NAME
from vhs.settings import Section

DRIVER = "driver"  # the job that drives a run: it waits for others, on one core
STAGES = (DRIVER, *BY_NAME)
SMALL = {"gpus_per_node": 0, "cpu_ranks_per_node": 1, "cpus_per_rank": 1, "mem_gb_per_rank": 4}  # a driver, unless `stages` says otherwise

BY_VARIABLE = {  # what sbatch reads from its environment, and the option that says the same
    "SBATCH_PARTITION": "partition",
    "SBATCH_ACCOUNT": "account",
    "SBATCH_QOS": "qos",
    "SBATCH_CONSTRAINT": "constraint",
    "SBATCH_GPUS_PER_NODE": "gpus_per_node",
    "SBATCH_MEM_PER_NODE": "mem",
    "SBATCH_TIMELIMIT": "time",
}
LEFT = ("SBATCH_", "SRUN_", "SLURM_", "SLURMD_")  # prefixes of what an allocation, or slurm/env.sh, leaves in a process's environment
KEPT = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_TIME_FORMAT")  # of these, what the site or the user set before


def _one_word(text: str) -> str:
    if not text or text.split() != [text]:
        raise ValueError("one word without spaces, as sbatch takes it")
    return text


Word = Annotated[str, AfterValidator(_one_word)]


class Resources(Section):
    """What a job of one stage asks for. A rank is one process of a unit; it has a GPU of its own where nodes have GPUs."""

    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    constraint: Word | None = None  # features of nodes: a100, a100&nvlink
    exclude: Word | None = None  # nodes to avoid: node[7,12]
    gpus_per_node: int = Field(0, ge=0, le=64)  # of a node, so ranks on it; 0: no GPU is asked for
    gpu_type: Word | None = None  # as `sinfo -o %G` names it: gpu:TYPE:4
    cpu_ranks_per_node: int = Field(1, ge=1, le=1024)  # ranks on a node where gpus_per_node is 0
    cpus_per_rank: int = Field(1, ge=1, le=1024)  # at least the configuration's `threads`, and its loader's workers beside them
    mem_gb_per_rank: float = Field(8, gt=0, le=65536)
    time_min: int = Field(60, ge=1)  # above 10: submitit takes every interruption of a shorter job for its time limit
    signal_s: int = Field(120, ge=1, le=3600)  # so long before the limit USR2 comes, and the work is saved; SLURM may send it 60 s earlier
    units_per_job: int = Field(1, ge=1)  # short units share a job, one after the other
    max_jobs: int = Field(64, ge=1)  # jobs of an array at a time
    options: dict[Word, Word] = {}  # more of sbatch's, by their long names: {reservation: x, licenses: "y:1"}

    @model_validator(mode="after")
    def _has_time_to_stop(self) -> Resources:
        if self.signal_s >= 60 * self.time_min:
            raise ValueError(f"signal_s is {self.signal_s} and time_min only {self.time_min} ({60 * self.time_min} s): give signal_s less than that")
        return self

    @property
    def ranks_per_node(self) -> int:
        return self.gpus_per_node or self.cpu_ranks_per_node

    def sbatch(self, ranks: int) -> dict[str, Any]:
        """sbatch's options, named as submitit's SlurmExecutor takes them, of a job for `ranks` ranks on as few nodes as hold the same number each.

        One task a node: it starts its node's ranks.
        """
        nodes = next(n for n in range(1, ranks + 1) if ranks % n == 0 and ranks // n <= self.ranks_per_node)
        each = ranks // nodes
        gpus = (f"{self.gpu_type}:{each}" if self.gpu_type else each) if self.gpus_per_node else None
        asked = {
            **{name: getattr(self, name) for name in ("partition", "account", "qos", "constraint", "exclude")},
            "nodes": nodes,
            "ntasks_per_node": 1,
            "gpus_per_node": gpus,
            "cpus_per_task": each * self.cpus_per_rank,
            "mem": f"{math.ceil(each * self.mem_gb_per_rank * 1024)}M",
            "time": self.time_min,
            "additional_parameters": self.options or None,
        }
        return {name: value for name, value in asked.items() if value is not None}


class Site(Resources):
    """The whole file: the resources of every stage, what differs for some (`stages`), and what a node needs before vhs runs on it."""

    setup: tuple[str, ...] = ()  # shell lines on a node before anything else: modules, conda, a venv
    python: str | None = Field(None, min_length=1)  # as a shell reads it: python, apptainer exec --nv vhs.sif python; null: the one that submits
    work_dir: str | None = Field(None, min_length=1)  # scratch on a node for `execution.work_dir: null`, with variables of the node: $TMPDIR
    network: bool = True  # false: nodes do not reach the internet, and nothing tries to
    max_array: int = Field(1001, ge=1)  # jobs in an array: scontrol show config | grep MaxArraySize
    max_requeues: int = Field(20, ge=0)  # of one job, by time limit or preemption
    stages: dict[str, dict[str, Any]] = {}  # stage, or `driver` -> those of the keys above, of Resources, that differ

    @model_validator(mode="after")
    def _every_stage_is_whole(self) -> Site:
        for stage in self.stages:
            self.resources(stage)
        return self

    @classmethod
    def load(cls, name: str) -> Site:
        """The site `name`: one of configs/clusters, or a YAML file. ConfigError names the key, the value and the legal ones."""
        try:  # not by OmegaConf: ${HOME} in a setup line is the shell's
            return validated(yaml.safe_load(find(name, "clusters").read_text()) or {}, cls)
        except (ConfigError, yaml.YAMLError) as error:
            raise ConfigError(f"cluster {name}: {error}") from None

    def resources(self, stage: str) -> Resources:
        """What a job of `stage` (or `driver`) asks for."""
        if stage not in STAGES:
            raise ConfigError(f"no stage {stage!r}: they are {', '.join(STAGES)}")
        own = {**self.model_dump(include=set(Resources.model_fields)), **(SMALL if stage == DRIVER else {})}
        try:
            return validated({**own, **self.stages.get(stage, {})}, Resources)
        except ConfigError as error:
            raise ConfigError("\n".join(f"stages.{stage}.{line}" for line in str(error).splitlines())) from None

    @property
    def command(self) -> str:
        """Python on a node, as a shell reads it."""
        return self.python or shlex.quote(sys.executable)

    @property
    def lines(self) -> list[str]:
        """The shell lines that make a node ready: of a batch script, before its command."""
        offline = [] if self.network else ["export HF_HUB_OFFLINE=1"]
        scratch = [f"export VHS_WORK_DIR={shlex.quote(self.work_dir)}"] if self.work_dir else []
        return [*self.setup, *offline, *scratch]


def cluster_env(name: str, stage: str, ranks: int) -> list[str]:
    """The site `name` as lines for a POSIX shell: sbatch's own variables for whole nodes of `stage`, VHS_SBATCH for the options that have none, and
    VHS_SETUP, VHS_PYTHON for the node. Each task is to do units of `ranks` ranks; a node has as many tasks as that leaves room for."""
    site = Site.load(name)
    resources = site.resources(stage)
    if not 1 <= ranks <= resources.ranks_per_node:
        raise ConfigError(f"--ranks {ranks}: a node of {name} has room for 1 to {resources.ranks_per_node} of {stage}; across nodes: vhs run --on slurm")
    node = resources.sbatch(resources.ranks_per_node)
    tasks = {"ntasks-per-node": resources.ranks_per_node // ranks, "cpus-per-task": ranks * resources.cpus_per_rank}
    more = {**tasks, **({"exclude": resources.exclude} if resources.exclude else {}), **resources.options}
    values = {
        "VHS_CLUSTER": str(Path(name).resolve()) if Path(name).suffix else name,  # for use in other folders too
        "VHS_SLURM": str(_scripts()),
        "VHS_SETUP": "\n".join(site.lines),
        "VHS_PYTHON": site.command,
        "VHS_SBATCH": " ".join(f"--{option}={value}" for option, value in more.items()),
        "SBATCH_SIGNAL": f"USR2@{resources.signal_s}",
        **{variable: str(node[option]) for variable, option in BY_VARIABLE.items() if option in node},
    }
    unset = [variable for variable in BY_VARIABLE if variable not in values]  # of the stage that this shell was set up for before
    return [f"unset {' '.join(unset)}", *(f"export {variable}={shlex.quote(value)}" for variable, value in values.items())]


def _scripts() -> Path:
    """slurm/ of the checkout, or the same files as a wheel carries them."""
    root = Path(__file__).resolve().parents[1]
    return next(folder for folder in (root / "vhs" / "slurm", root / "slurm") if folder.is_dir())


def forget_allocation():
    """Take out of this process's environment what an allocation or slurm/env.sh put there. Before jobs are submitted: SBATCH_* would override the
    script that is submitted, and SLURM_* travel into the new job, where its own srun fails on those that contradict (SLURM_MEM_PER_*)."""
    for variable in [variable for variable in os.environ if variable.startswith(LEFT) and variable not in KEPT]:
        del os.environ[variable]
