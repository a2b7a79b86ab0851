"""The test cluster is real: its nodes, accounting, requeue, preemption and power cuts are SLURM's own."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from cluster import PROGRAM, Cluster, folder, until

NODES = ["node1", "node2", "node3", "node4"]
WAITS = "while :; do sleep 0.2; done"


def processes(cluster: Cluster) -> set[str]:
    """Number and command of every process that has the cluster's folder in its command or environment; a zombie has neither."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command, environment = ((process / name).read_text(errors="replace").replace("\0", " ") for name in ("cmdline", "environ"))
        except OSError:  # it has just ended, or has rights that root's programs lack: none of ours
            continue
        if str(cluster.folder) in command + environment:
            found.add(f"{process.name} {command}")
    return found


def refusal(*command: str | Path) -> str:
    """The message of a command of the program that must fail."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode and "Traceback" not in done.stderr, done
    return done.stderr


def test_nodes_are_machines_of_their_own(cluster):
    spaces = "/proc/self/ns/pid /proc/self/ns/uts /proc/self/ns/ipc /proc/self/ns/mnt"
    script = f"touch /dev/shm/mark /tmp/ray/mark; sleep 1; echo $(hostname) $(readlink {spaces}) $(getent hosts node2) $(ls /dev/shm /tmp/ray | wc -w)"
    lines = [line.split() for line in cluster.run(["srun", "--nodes=4", "sh", "-c", script]).splitlines()]
    assert sorted(line[0] for line in lines) == NODES
    for column in range(1, 5):
        assert len({line[column] for line in lines}) == 4, f"a namespace is shared: {lines}"
    assert {line[6] for line in lines} == {"node2"} and {line[7] for line in lines} == {"4"}


def test_a_job_of_two_nodes_sees_both_and_their_gpus(cluster, tmp_path):
    script = 'scontrol show hostnames "$SLURM_JOB_NODELIST"; srun sh -c \'echo $(hostname) $CUDA_VISIBLE_DEVICES\''
    cluster.sbatch("--nodes=2", "--gpus-per-node=3", "--wait", f"--output={tmp_path}/out", script=script)
    hosts, seen = (tmp_path / "out").read_text().splitlines()[:2], (tmp_path / "out").read_text().splitlines()[2:]
    assert len(set(hosts)) == 2 and sorted(seen) == [f"{host} 0,1,2" for host in sorted(hosts)]


def test_accounting_lists_an_array(cluster):
    job = cluster.sbatch("--array=0-5", "--output=/dev/null", script="exit $(( SLURM_ARRAY_TASK_ID == 4 ))")
    rows = until(
        lambda: (rows := cluster.sacct(job)) and {row["State"] for row in rows} <= {"COMPLETED", "FAILED"} and len(rows) == 6 and rows,
        f"six finished rows of {job} in accounting",
    )
    states = {row["JobID"]: (row["State"], row["ExitCode"]) for row in rows}
    assert states == {f"{job}_{task}": ("FAILED", "1:0") if task == 4 else ("COMPLETED", "0:0") for task in range(6)}


def test_an_array_must_be_split_above_the_limit(cluster):
    command = ["sbatch", "--output=/dev/null", "--array=0-1001", "--wrap=true"]
    refused = subprocess.run(command, env=cluster.environment, capture_output=True, text=True)
    assert refused.returncode and "Invalid job array specification" in refused.stderr


@pytest.mark.parametrize("told", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["operator", "unnoticed"])
def test_a_power_cut_requeues_elsewhere(cluster, tmp_path, told):
    """SLURM finds out in half a minute, or at once when an operator says so."""
    out = tmp_path / "out"
    out.touch()
    job = cluster.sbatch(f"--output={out}", "--open-mode=append", script=f"hostname; setsid sh -c '{WAITS}' & {WAITS}")
    (first,) = until(lambda: out.read_text().split(), f"job {job} runs")
    number = int(first.removeprefix("node"))
    try:
        until(lambda: any(WAITS in process for process in processes(cluster)), "the job's detached process runs")
        cluster.node(number, "off")
        assert not any(WAITS in process for process in processes(cluster)), "a process outlived its node"
        if told:
            cluster.run(["scontrol", "update", f"nodename={first}", "state=down", "reason=no power"])
        _, second = until(lambda: len(hosts := out.read_text().split()) == 2 and hosts, f"job {job} runs again")
        assert second != first and cluster.job(job)["Restarts"] == "1"
        until(lambda: [row["State"] for row in cluster.sacct(job, "--duplicates")] == ["NODE_FAIL", "RUNNING"], "accounting has both runs")
    finally:
        cluster.run(["scancel", job])
        cluster.node(number, "on")
    until(lambda: cluster.run(["sinfo", "-hN", "-pmain", "-tidle", "-o%N"]).split() == NODES, "all nodes are idle")


def test_a_higher_partition_preempts(cluster, tmp_path):
    out = tmp_path / "out"
    out.touch()
    step = f"srun bash -c 'trap \"echo USR2\" USR2; echo begun; {WAITS}'"
    job = cluster.sbatch("--nodes=4", "--exclusive", "--signal=USR2@60", f"--output={out}", "--open-mode=append", script=step)
    try:
        until(lambda: out.read_text().count("begun") == 4, f"job {job} runs on four nodes")
        urgent = cluster.sbatch("--partition=high", "--nodes=4", "--exclusive", "--output=/dev/null", script="true")
        until(lambda: out.read_text().count("USR2\n") == 4, "every task gets the signal that --signal names")
        assert cluster.job(job)["JobState"] == "RUNNING", "the signal comes before the end: there is time to save"
        until(lambda: cluster.job(urgent)["JobState"] == "COMPLETED", f"job {urgent} of the higher partition ends")
        until(lambda: cluster.job(job)["Restarts"] == "1", f"job {job} goes back to the queue")
        until(lambda: cluster.sacct(job, "--duplicates")[0]["State"] == "PREEMPTED", "accounting says so")
    finally:
        cluster.run(["scancel", job])


def test_too_much_memory_is_fatal(cluster, tmp_path):
    script = "python3 -c 'import time; data = bytearray(b\"1\") * (300 << 20); time.sleep(600)'"
    job = cluster.sbatch("--mem=100", "--partition=small", f"--output={tmp_path}/out", script=script)
    until(lambda: cluster.job(job)["JobState"] == "FAILED", f"job {job} is killed")
    assert "exceeded memory limit" in (tmp_path / "out").read_text()


def test_a_second_cluster_stands_beside_the_first_and_leaves_nothing(cluster):
    with folder() as name:
        second = Cluster(name)
        try:
            assert "the cluster is up." in second.up("--nodes", "2")
            running = processes(second)
            assert "the cluster is up already." in second.up()
            assert processes(second) == running
            job = second.sbatch("--nodes=2", "--output=/dev/null", script=f"setsid sh -c '{WAITS}' & srun sh -c '{WAITS}'")
            until(lambda: sum(WAITS in process for process in processes(second)) >= 3, f"job {job} runs on both nodes")
            assert len(cluster.run(["srun", "--nodes=4", "hostname"]).split()) == 4, "the first is as it was"
        finally:
            second.down()
        assert not processes(second)
        assert "is down" in refusal(PROGRAM, "node", "1", "on", name)
        second.up("--nodes", "2")
        try:
            assert int(second.sbatch("--output=/dev/null", script="true")) > int(job), "job numbers do not come again"
        finally:
            second.down()
        assert not processes(second)


ASK_EVERY_NODE = """
import socket, threading, time
def serve(server):
    for _ in range(3):
        server.accept()[0].sendall(socket.gethostname().encode())
def ask(host):
    while True:
        try:
            return socket.create_connection((host, 29500)).recv(99).decode()
        except ConnectionRefusedError:
            time.sleep(0.1)
threading.Thread(target=serve, args=[socket.create_server(("", 29500))]).start()
print(socket.gethostname(), *map(ask, ("node1", "node2", "node3")))
"""


@pytest.mark.slow
def test_nodes_with_networks_of_their_own():
    """One port, open on three nodes at once, each reached by name from the others; a power cut takes a node off the network."""
    with folder() as name:
        cluster = Cluster(name)
        try:
            cluster.up("--net", "--nodes", "3")
            bridge = f"vhs{json.loads((name / 'cluster.json').read_text())['port']}"
            said = cluster.run(["srun", "--nodes=3", "python3", "-c", ASK_EVERY_NODE]).splitlines()
            assert sorted(said) == [f"node{number} node1 node2 node3" for number in (1, 2, 3)]
            cluster.node(2, "off")
            cluster.node(2, "on")
            assert cluster.run(["srun", "--nodes=1", "--nodelist=node2", "hostname"]) == "node2\n"
        finally:
            cluster.down()
        assert not processes(cluster)
        assert not [link for link in os.listdir("/sys/class/net") if link.startswith(bridge)]


def test_what_is_refused_and_what_to_do_is_said(cluster):
    with folder() as name:
        assert "root only" in refusal("unshare", "--user", PROGRAM, "up", name)  # a user namespace's first process is nobody there
        hidden = refusal("unshare", "--mount", "sh", "-c", f"mount -t tmpfs none /usr/sbin && {PROGRAM} up {name}")
        assert "munged" in hidden and "apt-get install" in hidden
        port = cluster.run(["scontrol", "show", "config"]).partition("SlurmctldPort")[2].split()[1]
        assert f"port in use: {port}" in refusal(PROGRAM, "up", name, "--port", port)
        assert "from 1024 to 65530" in refusal(PROGRAM, "up", name, "--port", "65531")
        assert "shorter DIR" in refusal(PROGRAM, "up", name / ("long" * 25))
        assert "no cluster in" in refusal(PROGRAM, "down", name) and not list(name.iterdir())
        (name / "file").touch()
        assert "choose an empty or new DIR" in refusal(PROGRAM, "up", name)
        assert "no cluster in" in refusal(PROGRAM, "node", "1", "off", name)
    assert "nodes 1 to 4" in refusal(PROGRAM, "node", "7", "off", cluster.folder)
