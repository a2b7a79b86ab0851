"""Imports run one way, and the command line answers without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {"vhs": {"vhs"}, "shards": {"shards"}, "jobs": {"jobs", "vhs", "shards"}}
ALL = {"vhs", "shards", "jobs", "slurm", "tests"}


def imported(source: str) -> set[str]:
    """Top-level packages of this project that `source` imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.add(node.module.split(".")[0])
    return found & ALL


def test_the_rule_fires():
    assert imported("def f():\n    from jobs.plan import Run\n") - ROOMS["vhs"] == {"jobs"}


@pytest.mark.parametrize("room", ROOMS)
def test_imports_run_one_way(room):
    files = list((ROOT / room).rglob("*.py"))
    assert files
    wrong = {str(file.relative_to(ROOT)): imported(file.read_text()) - ROOMS[room] for file in files}
    assert not {name: bad for name, bad in wrong.items() if bad}


def test_help_and_validation_need_no_torch():
    code = (
        "import sys\nfrom jobs import cli, config, drive, plan, status\nfrom jobs.stages import STAGES\nconfig.load('debug/demo')\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\nprint(len(STAGES))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip() == "11"
