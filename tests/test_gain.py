"""What a person's corrections brought: figures that are known, arms whose images they were, and a verdict that no longer decides."""

from __future__ import annotations

import csv

from conftest import vhs

from jobs import labels, plan, rounds
from jobs.config import load
from jobs.drive import drive


def edited(run, file, change, **where) -> dict:
    """Exports to `file` the first row that has `where`, with what `change` makes of it."""
    vhs("labels", run, "export", file)
    with file.open(newline="") as lines:
        row = next(row for row in csv.DictReader(lines) if all(row[name] == value for name, value in where.items()))
    row |= change(row)
    with file.open("w", newline="") as lines:
        writer = csv.DictWriter(lines, row.keys())
        writer.writeheader(), writer.writerow(row)
    return row


def nudged(row: dict) -> dict:
    """A key point a fifth of a pixel off: another training image's label for no reader but its arm."""
    return {"A_x": str(float(row["A_x"]) + 0.2)}


def trained(run) -> dict[tuple[str, str], str]:
    """(arm, scope) -> the identity of its training."""
    units = plan.reopen(str(run), read_only=True).units("train")
    return {(unit.params["arm"], unit.params["scope"]): unit.identity for unit in units}


def test_only_what_a_word_touches_is_trained_again(reference, tmp_path):
    """Identities, before anything is trained: of the arm whose image it is, and, if mixed has other numbers of images by it, of all that draw as many."""
    run, file = tmp_path / "run", tmp_path / "l.csv"
    opened = plan.start(load("debug/demo", ["arms=[real,real-matched,mixed,null,base]"]), str(run))
    drive(opened, reuse=str(reference), only="label")
    before = trained(run)

    def touched() -> set[str]:
        return {arm for (arm, scope), identity in trained(run).items() if identity != before[arm, scope]}

    edited(run, file, nudged, generator="base")
    vhs("labels", run, "import", file)
    assert touched() == {"base"}
    edited(run, file, nudged, generator="dreambooth", accepted="yes")
    vhs("labels", run, "import", file)
    assert touched() == {"base", "mixed"} and not rounds.recounted(plan.reopen(str(run), read_only=True), "split")
    now = labels.table(plan.reopen(str(run), read_only=True)).query("made_by == 'dreambooth' and accepted")
    least = now[now.label == now.label.value_counts().idxmin()]
    assert len(least) <= opened.config.generation.quota
    edited(run, file, lambda row: {"accepted": "no"}, key=least.key.iloc[0])
    vhs("labels", run, "import", file)
    assert rounds.recounted(plan.reopen(str(run), read_only=True), "split") and touched() == {"base", "mixed", "null", "real-matched"}
    edited(run, file, lambda row: {"accepted": "yes"}, key=least.key.iloc[0])
    vhs("labels", run, "import", file)
    assert touched() == {"base", "mixed"}, "the numbers are what they were"
