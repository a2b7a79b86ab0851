"""What a person's corrections brought: figures that are known, arms whose images they were, and a verdict that no longer decides."""

from __future__ import annotations

import csv
import html
import json
import re

import pandas as pd
import pytest
from conftest import vhs

from jobs import labels, plan, rounds
from jobs.config import load
from jobs.drive import drive
from vhs import metrics
from vhs.arms import ARMS
from vhs.report import render


def answers(right: str, after: int, corrected: int, arm: str = "mixed", scope: str = "split", seed: int = 0) -> pd.DataFrame:
    """One training's word on as many images as `right` has letters, 1 where it was right."""
    keys = [f"{scope}{n}" for n in range(len(right))]
    return pd.DataFrame({"key": keys, "arm": arm, "scope": scope, "seed": seed, "role": "held-out", "patient": None, "label": 1,
                         "predicted": [int(letter) for letter in right], "after": after, "corrected": corrected})  # fmt: skip


def gains(*parts: pd.DataFrame) -> pd.DataFrame:
    return metrics.gain_by_corrections(pd.concat(parts, ignore_index=True))


def figures(table: pd.DataFrame, *names: str) -> list[list[float | None]]:
    return [[None if pd.isna(value) else round(value, 6) for value in row] for row in table[list(names)].to_numpy(object).tolist()]


def test_what_each_import_gained_and_all_of_them():
    """4 of 10 right, then 7, then 6: +30, then −10, +20 in all. An import may have corrected the same images again."""
    before, first, second = "1111000000", "1111111000", "0111111000"
    found = gains(answers(before, 0, 0), answers(second, 3, 2), answers(first, 1, 2))
    assert figures(found, "after", "corrected", "accuracy", "gain", "all_gain") == [[0, 0, 40, None, None], [1, 2, 70, 30, 30], [3, 2, 60, -10, 20]]
    assert set(found.arm) == {"mixed"} and set(found.part) == {"test"} and set(found.seeds) == {1}
    pairs = pd.concat([answers(second, 0, 0, arm="b"), answers(before, 0, 0, arm="a"), answers(first, 0, 0, arm="m")])
    assert figures(found.tail(1), "from", "to", "all_from", "all_to") == [
        [round(100 * bound, 6) for arm in ("m", "a") for bound in metrics.paired_difference(pairs, "b", arm)["ci95"]]
    ]


def test_out_of_fold_an_import_moves_its_own_fold_alone():
    """Fold 0 goes from 1 of 4 to 3 of 4 by the second import, fold 1 from 2 of 4 to 3 of 4 by the fifth: 3, 5, then 6 of 8."""
    fold_0 = [answers("1000", 0, 0, scope="fold-0"), answers("1110", 2, 3, scope="fold-0")]
    fold_1 = [answers("1100", 0, 0, scope="fold-1"), answers("1110", 5, 1, scope="fold-1")]
    test = answers("1000", 0, 0)
    found = gains(*fold_0, *fold_1, test)
    assert set(found.part) == {"out of fold"}, "the test part's arm was not corrected"
    assert figures(found, "after", "corrected", "accuracy", "gain", "all_gain") == [[0, 0, 37.5, None, None], [2, 3, 62.5, 25, 25], [5, 4, 75, 12.5, 37.5]]


def test_a_gain_is_of_the_arm_whose_images_were_corrected():
    """A control that was trained again because mixed has other numbers of images gained nothing by a correction."""
    found = gains(answers("10", 0, 0), answers("11", 1, 1), answers("10", 0, 0, arm="base"), answers("00", 1, 0, arm="base"))
    assert set(found.arm) == {"mixed"}
    found = gains(answers("10", 0, 0), answers("10", 0, 0, arm="base"), answers("11", 1, 1, arm="base"))
    assert set(found.arm) == {"base"} and figures(found, "gain") == [[None], [50]]


def test_an_import_that_not_every_seed_was_trained_on_is_passed_over():
    whole = [answers("10", number, number, seed=seed) for number in (0, 2) for seed in (0, 1)]
    found = gains(*whole, answers("11", 1, 1, seed=0))
    assert found.after.tolist() == [0, 2] and set(found.seeds) == {2}
    late = answers("10", 2, 1, scope="fold-1")  # was first trained when the second import was there
    assert gains(answers("10", 0, 0, scope="fold-0"), answers("11", 1, 1, scope="fold-0"), late).empty, "there was no whole state before"


@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
def test_the_page_has_the_gains_and_what_one_training_cannot_say(seeds):
    parts = [answers(right, after, after, seed=seed) for right, after in (("1111000000", 0), ("1111111000", 1)) for seed in seeds]
    table = gains(*parts)
    arm = {"accuracy": 0.7, "ci95": [0.4, 0.9], "balanced_accuracy": 0.7, "balanced_ci95": [0.4, 0.9], "auroc": None, "ece": None, "images": 10, "patients": 10}
    summary = {"purpose": "confirmatory", "corrected": True, "patients_known": True, "unlabelled": 0, "paired": None, "differences": [], "labeller": None,
               "likeness": None, "arms": {"mixed": {"test": arm, "cv": None, "validation": None, "seeds": list(seeds)}}, "generators": {},
               "generated": {"asked": 9, "produced": 9, "accepted": 9, "agreement": 1.0}}  # fmt: skip
    page = html.unescape(re.sub(r"<[^>]+>", " ", render(summary, {"corrections": table}, {}, {})))
    assert "since the row above" in page and "since the first row" in page and "before any" in page and "import 1" in page
    assert page.count(f"+30.0 [{table['from'][1]:.1f}, {table.to[1]:.1f}]") == 2
    assert ("Each was trained once" in page) == (len(seeds) == 1)


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


def test_a_corrected_fold_and_a_corrected_control(tmp_path):
    """Once held-out images of any scope were judged, whoever corrects has seen figures, and the page says what each word on which arm's images brought."""
    run, file = tmp_path / "run", tmp_path / "l.csv"
    small = ("generation.max_rounds=1", "generation.steps=2", "dreambooth.steps=2", "classifier.epochs=1")
    start = ("run", "debug/demo", "--out", run, "split.folds=2", "arms=[real-matched,mixed,base,measure]", *small)
    vhs(*start)
    assert json.loads((run / "report" / "summary.json").read_text())["corrected"] is False
    before = trained(run)
    edited(run, file, nudged, scope="fold-0", generator="dreambooth")
    vhs("labels", run, "import", file)
    vhs(*start)
    edited(run, file, nudged, scope="split", generator="base")
    vhs("labels", run, "import", file)
    vhs(*start)
    assert {place for place, identity in trained(run).items() if identity != before[place]} == {("mixed", "fold-0"), ("base", "split")}
    summary, page = json.loads((run / "report" / "summary.json").read_text()), html.unescape((run / "report" / "index.html").read_text())
    assert (summary["corrected"], summary["purpose"]) == (True, "confirmatory")
    assert "<h1>Descriptive: " in page and "after the held-out images of fold-0, split had been judged" in page
    rows = [re.findall(r">([^<]+)</t[hd]>", line) for line in page[page.index("What a person's corrections brought") :].splitlines()]
    table = [row for row in rows if row and row[0] in ARMS][:4]
    assert [row[:4] for row in table] == [
        ["mixed", "out of fold", "before any", "0"], ["mixed", "out of fold", "import 1", "1"],
        ["base", "test", "before any", "0"], ["base", "test", "import 2", "1"],
    ]  # fmt: skip
    for row, part in ((table[1], "cv"), (table[3], "test")):
        assert row[4].startswith(f"{100 * summary['arms'][row[0]][part]['accuracy']:.1f} [") and row[5] == row[6] != "–"
