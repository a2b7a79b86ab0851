"""SLURM's own commands, asked: the one place where they are run. Slurmctld restarts and accounting lags: whoever asks decides what not knowing means."""

from __future__ import annotations

import getpass
import os
import shutil
import subprocess

COMMANDS = ("sbatch", "squeue", "scancel")


def ask(*command: str, **environment: str) -> str:
    """What one of SLURM's commands prints. RuntimeError where there is none, or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, **environment})
    except FileNotFoundError:
        raise RuntimeError(f"no {command[0]} here: is this a machine that submits to SLURM?") from None
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{command[0]} does not answer") from None
    if done.returncode:
        raise RuntimeError(f"{command[0]}: {(done.stderr.strip() or str(done.returncode)).splitlines()[-1]}")
    return done.stdout


def absent() -> str:
    """Why no job can be handed to SLURM, or taken from it, on this machine, and what to do; "" where it can."""
    if missing := [command for command in COMMANDS if not shutil.which(command)]:
        return f"no {', '.join(missing)} here: give the command on a machine that submits to SLURM (a login node; some want `module load slurm` first)"
    try:
        ask("squeue", "--noheader", "--user", getpass.getuser(), "--format", "%i")
    except RuntimeError as error:
        return f"SLURM's commands are here, and no SLURM answers them ({error}): see `scontrol ping` and SLURM_CONF, or give the command on a login node"
    return ""


def minutes(limit: str) -> int | None:
    """A time limit as SLURM prints it ("30", "2:00", "1-02:00:00"; minutes, or with seconds last) -> whole minutes; None where there is none."""
    if not limit[:1].isdigit():
        return None
    days, _, rest = limit.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if days:
        hours, mins = (parts + [0, 0])[:2]
    else:
        hours, mins = (parts[0], parts[1]) if len(parts) == 3 else (0, parts[0])
    return 24 * 60 * int(days or 0) + 60 * hours + mins
