"""SLURM's own commands, asked: the one place where they are run. Slurmctld restarts and accounting lags: whoever asks decides what not knowing means."""

from __future__ import annotations

import subprocess


def ask(*command: str) -> str:
    """What one of SLURM's commands prints. RuntimeError where there is none, or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        raise RuntimeError(f"no {command[0]} here: is this a machine that submits to SLURM?") from None
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{command[0]} does not answer") from None
    if done.returncode:
        raise RuntimeError(f"{command[0]}: {(done.stderr.strip() or str(done.returncode)).splitlines()[-1]}")
    return done.stdout
