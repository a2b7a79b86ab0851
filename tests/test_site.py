"""A site's file: what a job asks for, errors that say what is legal, and the same file as a shell sees it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT, command, vhs

from jobs import config
from jobs.config import ConfigError
from jobs.site import BY_VARIABLE, STAGES, Site, cluster_env, forget_allocation

GPU_SITE = {
    "partition": "gpu",
    "account": "lab",
    "constraint": "a100&nvlink",
    "gpus_per_node": 4,
    "gpu_type": "a100",
    "cpus_per_rank": 8,
    "mem_gb_per_rank": 30.5,
    "time_min": 480,
    "exclude": "node[7,12]",
    "options": {"reservation": "course"},
    "stages": {
        "label": {"gpus_per_node": 0, "cpu_ranks_per_node": 16, "cpus_per_rank": 2, "partition": "cpu", "constraint": None, "options": {}},
        "train": {"time_min": 30, "gpu_type": None},
        "driver": {"time_min": 2880},
    },
}


@pytest.fixture
def site(tmp_path):
    """Writes a site's file from keys -> its path, as a user names it."""

    def write(**keys) -> str:
        file = tmp_path / "site.yaml"
        file.write_text(yaml.safe_dump(keys))
        return str(file)

    return write


@pytest.mark.parametrize("name", config.names("clusters"))
def test_every_site_that_comes_with_vhs_is_whole(name):
    site = Site.load(name)
    for stage in STAGES:
        resources = site.resources(stage)
        assert resources.sbatch(resources.ranks_per_node)["nodes"] == 1
    assert site.resources("driver").gpus_per_node == 0, "who only waits holds no GPU"


def test_sites_are_no_runs():
    assert {"testcluster", "example"} <= set(config.names("clusters"))
    assert not [name for name in config.names() if "cluster" in name or name.startswith("ray")]


def test_a_stage_overrides_what_it_names_and_keeps_the_rest(site):
    loaded = Site.load(site(**GPU_SITE))
    train, label, generate = (loaded.resources(stage) for stage in ("train", "label", "generate"))
    assert (train.time_min, train.gpu_type, train.partition, train.gpus_per_node) == (30, None, "gpu", 4)
    assert (label.partition, label.constraint, label.ranks_per_node, label.account, label.options) == ("cpu", None, 16, "lab", {})
    assert (generate.time_min, generate.gpu_type, generate.ranks_per_node) == (480, "a100", 4)


def test_the_driver_is_small_unless_the_file_says_otherwise(site):
    driver = Site.load(site(**GPU_SITE)).resources("driver").sbatch(1)
    assert (driver["cpus_per_task"], driver["mem"], driver["time"]) == (1, "4096M", 2880) and "gpus_per_node" not in driver
    assert Site.load(site(**{**GPU_SITE, "stages": {"driver": {"mem_gb_per_rank": 2}}})).resources("driver").sbatch(1)["mem"] == "2048M"


@pytest.mark.parametrize(
    ("ranks", "nodes", "each"),
    [(1, 1, 1), (3, 1, 3), (4, 1, 4), (6, 2, 3), (8, 2, 4), (5, 5, 1), (16, 4, 4)],  # as few nodes as hold the same number each
)
def test_ranks_are_spread_evenly_over_nodes(site, ranks, nodes, each):
    asked = Site.load(site(**GPU_SITE)).resources("generate").sbatch(ranks)
    assert asked == {
        "partition": "gpu",
        "account": "lab",
        "constraint": "a100&nvlink",
        "exclude": "node[7,12]",
        "nodes": nodes,
        "ntasks_per_node": 1,
        "gpus_per_node": f"a100:{each}",
        "cpus_per_task": 8 * each,
        "mem": f"{int(30.5 * 1024 * each)}M",
        "time": 480,
        "additional_parameters": {"reservation": "course"},
    }


def test_without_gpus_none_are_asked_for(site):
    asked = Site.load(site(cpu_ranks_per_node=2)).resources("train").sbatch(4)
    assert (asked["nodes"], asked["cpus_per_task"]) == (2, 2)
    assert not {"gpus_per_node", "partition", "additional_parameters"} & set(asked)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"partitions": "gpu"}, ["partitions", "no such key", "partition", "stages"]),
        ({"gpus_per_node": -1}, ["gpus_per_node", "-1", "at least 0"]),
        ({"mem_gb_per_rank": 0}, ["mem_gb_per_rank", "0", "more than 0"]),
        ({"partition": "gpu long"}, ["partition", "'gpu long'", "one word"]),
        ({"exclude": ""}, ["exclude", "one word"]),
        ({"signal_s": 60, "time_min": 1}, ["signal_s is 60", "time_min only 1"]),
        ({"setup": "module load cuda"}, ["setup", "module load cuda", "a list"]),
        ({"max_array": 0}, ["max_array", "at least 1"]),
        ({"stages": {"training": {}}}, ["'training'", "driver", "train", "evaluate"]),
        ({"stages": {"train": {"time_mins": 5}}}, ["stages.train.time_mins", "no such key", "time_min"]),
        ({"stages": {"train": {"time_min": "long"}}}, ["stages.train.time_min", "'long'", "a whole number"]),
        ({"stages": {"train": {"python": "python3"}}}, ["stages.train.python", "no such key"]),  # of the whole site
    ],
)
def test_a_bad_key_is_named_with_what_is_legal(site, keys, says):
    file = site(**keys)
    with pytest.raises(ConfigError) as error:
        Site.load(file)
    assert not [word for word in [file, *says] if word not in str(error.value)], str(error.value)


def test_an_unknown_site_lists_the_known_ones_and_broken_yaml_is_said(tmp_path):
    with pytest.raises(ConfigError, match="apptainer.*example.*testcluster"):
        Site.load("nowhere")
    broken = tmp_path / "broken.yaml"
    broken.write_text("setup: [")
    with pytest.raises(ConfigError, match="broken.yaml"):
        Site.load(str(broken))


def shell(script: str, **environment: str) -> list[str]:
    """What a bash prints, by NUL characters; `cluster_env` prints a site as the command does."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SBATCH_", "SLURM_", "VHS_"))}
    done = subprocess.run(
        ["bash", "-euc", f'cluster_env() {{ "{sys.executable}" -m jobs.cli cluster-env "$@"; }}\n{script}'],
        cwd=ROOT,
        env={**clean, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\0")[:-1]


def test_a_shell_gets_the_very_values(site):
    nasty = [
        "export QUOTES=\"it's\" TICKS=`echo t` DOLLAR='$HOME' HOME_TOO=${HOME}",
        'export LONG="a  b\tc" STAR="*" EMPTY= # not a comment in "quotes #"',
        "f() { printf '%s\\n' \"$@\"; }; export F=$(f 'x y' \\\\)",
        "export DEFAULT=${UNSET_ANYWHERE:-\"d e\"}",
    ]
    file = site(**{**GPU_SITE, "setup": nasty, "python": "env 'A B=c' \"$HOME/py\"", "work_dir": "$TMPDIR/it's", "network": False, "account": "a'b"})
    names = ["VHS_SETUP", "VHS_PYTHON", "VHS_SBATCH", "SBATCH_ACCOUNT", "SBATCH_CONSTRAINT", "SBATCH_SIGNAL", "VHS_CLUSTER", *BY_VARIABLE]
    values = shell(f'eval "$(cluster_env {file} --stage train)"\nprintf "%s\\0" ' + " ".join(f'"${{{name}-none}}"' for name in names))
    got = dict(zip(names, values))
    assert got["VHS_SETUP"] == "\n".join([*nasty, "export HF_HUB_OFFLINE=1", "export VHS_WORK_DIR='$TMPDIR/it'\"'\"'s'"])
    assert got["VHS_PYTHON"] == "env 'A B=c' \"$HOME/py\""
    assert got["VHS_SBATCH"] == "--ntasks-per-node=4 --cpus-per-task=8 --exclude=node[7,12] --reservation=course"
    assert (got["SBATCH_ACCOUNT"], got["SBATCH_CONSTRAINT"], got["SBATCH_SIGNAL"]) == ("a'b", "a100&nvlink", "USR2@120")
    assert (got["SBATCH_MEM_PER_NODE"], got["SBATCH_TIMELIMIT"], got["SBATCH_GPUS_PER_NODE"]) == ("124928M", "30", "4")
    assert (got["SBATCH_QOS"], got["VHS_CLUSTER"]) == ("none", file)


def test_what_the_shell_got_runs_as_it_was_written(site):
    """slurm/env.sh in a job evaluates the setup lines and splits `python` as a shell would."""
    file = site(setup=["export SAID=\"it's $WHO\"", "WHO=changed"], python="env 'A=b c' python", work_dir="$WHO", network=False)
    said = shell(
        f'. <(cluster_env {file})\nexport WHO=me SLURM_JOB_ID=1 VHS_CLUSTER={file}\n. slurm/env.sh\n'
        'printf "%s\\0" "$SAID" "$WHO" "$VHS_WORK_DIR" "$HF_HUB_OFFLINE" "${VHS[@]}"'
    )
    assert said == ["it's me", "changed", "$WHO", "1", "env", "A=b c", "python", "-P", "-m", "jobs.cli"]


def test_an_environment_may_be_made_as_a_login_shell_makes_it(site):
    """conda and modules name variables that are not set, and lines may fail; around them the scripts stay strict."""
    file = site(setup=['export PROJ_WAS="$PROJ_LIB"', "false", "export CONDA=active"])
    said = shell(
        f'set -uo pipefail\n. <(cluster_env {file})\nexport SLURM_JOB_ID=1 VHS_CLUSTER={file}\n. slurm/env.sh\n'
        'printf "%s\\0" "$CONDA" "$PROJ_WAS" "$-" "$(set -o | grep pipefail | tr -d " \\t")"'
    )
    assert said[:2] == ["active", ""] and {"e", "u"} <= set(said[2]) and said[3] == "pipefailon"


def test_env_sh_serves_one_stage_after_another(site, tmp_path):
    """On a login node; nothing of the stage before is left, and a site that is wrong stops it with the reason."""
    file = site(**GPU_SITE)
    (tmp_path / "vhs").write_text(f'#!/bin/sh\nPYTHONPATH="{ROOT}" exec "{sys.executable}" -m jobs.cli "$@"\n')
    (tmp_path / "vhs").chmod(0o755)
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "VHS_CLUSTER": file}
    script = (
        '. slurm/env.sh --stage train --ranks 2\nprintf "%s\\0" "$VHS_SBATCH" "$SBATCH_GPUS_PER_NODE"\n'
        '. slurm/env.sh --stage label\nprintf "%s\\0" "$VHS_SBATCH" "${SBATCH_GPUS_PER_NODE-none}" "${SBATCH_CONSTRAINT-none}"\n'
        '. slurm/env.sh\nprintf "%s\\0" "$VHS_SBATCH" "$SBATCH_TIMELIMIT" "$VHS_SLURM"'
    )
    train, label, driver = (f"--ntasks-per-node={tasks} --cpus-per-task={cpus}" for tasks, cpus in ((2, 16), (16, 2), (1, 1)))
    more, reserved = " --exclude=node[7,12]", " --exclude=node[7,12] --reservation=course"
    assert shell(script, **path) == [train + reserved, "4", label + more, "none", "none", driver + reserved, "2880", str(ROOT / "slurm")]
    wrong = '. slurm/env.sh --stage train --ranks 9 2>said || { printf "%s\\0" refused "$(cat said)"; }'
    refused, reason = shell(f"export COLUMNS=200\n{wrong.replace('said', str(tmp_path / 'said'))}", **path)
    assert refused == "refused" and "1 to 4" in reason


def test_cluster_env_is_light():
    heavy = "('torch', 'pandas', 'submitit', 'ray')"
    code = f"import sys\nfrom jobs import cli, site\nsite.cluster_env('example', 'train', 4)\nprint([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_only_shell_lines_go_to_stdout_and_an_error_is_a_sentence():
    process = command("cluster-env", "nowhere")
    said, _ = process.communicate()
    assert process.returncode == 1 and "cluster nowhere" in said and "Traceback" not in said
    assert all(line.startswith(("unset ", "export ")) for line in cluster_env("testcluster", "driver", 1))


def test_an_allocation_is_forgotten_but_not_the_site(monkeypatch):
    for name in ("SBATCH_MEM_PER_NODE", "SLURM_MEM_PER_CPU", "SLURM_JOB_ID", "SRUN_CPUS_PER_TASK", "SLURMD_NODENAME", "SLURM_CONF", "MY_SLURM"):
        monkeypatch.setenv(name, "1")
    forget_allocation()
    assert [name for name in os.environ if "SLURM" in name or "SBATCH" in name or "SRUN" in name] == ["SLURM_CONF", "MY_SLURM"]


@pytest.mark.parametrize("script", sorted((ROOT / "slurm").glob("*.s*")), ids=lambda file: file.name)
def test_scripts_are_bash(script):
    assert subprocess.run(["bash", "-n", script], capture_output=True, text=True).stderr == ""


@pytest.mark.parametrize("script", sorted((ROOT / "slurm").glob("*.sbatch")), ids=lambda file: file.name)
def test_a_script_without_a_site_says_what_to_do(script, tmp_path):
    done = subprocess.run(["bash", script, "label", "run"], cwd=tmp_path, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True)
    assert done.returncode != 0 and "source slurm/env.sh" in done.stderr


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "ray").glob("*.yaml")), ids=lambda file: file.name)
def test_ray_takes_its_launcher_files(file):
    """As far as Ray itself checks them before it starts a machine."""
    launcher = pytest.importorskip("ray.autoscaler._private.util")
    pytest.importorskip("jsonschema")
    values = yaml.safe_load(file.read_text())
    launcher.validate_config(launcher.prepare_config(values))
    with pytest.raises(Exception, match="no_such_key"):
        launcher.validate_config(launcher.prepare_config({**values, "no_such_key": 1}))


def test_scratch_is_where_the_node_says(tmp_path):
    """The site's work_dir reaches a node as VHS_WORK_DIR, with the node's own variables."""
    vhs("phantom", tmp_path / "dogs", "--count", 12, "--size", 64)
    ingest = ("ingest", tmp_path / "dogs", "--view", "canine_lateral", "--resolution", 64, "--out")
    vhs(*ingest, tmp_path / "run", environment={"VHS_WORK_DIR": "$NODE_SCRATCH/mine", "NODE_SCRATCH": str(tmp_path / "fast")})
    assert list((tmp_path / "fast" / "mine").iterdir()) and not (tmp_path / "run" / ".tmp" / "work").exists()
    said = vhs(*ingest, tmp_path / "other", environment={"VHS_WORK_DIR": "$NO_SUCH_VARIABLE"}, code=1)
    assert "work_dir $NO_SUCH_VARIABLE" in said
