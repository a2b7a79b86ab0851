"""What the runs of a study say together: tables, sentences and figures on planted records whose answer is known."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from test_metrics import answers

from jobs.unit import digest
from vhs import metrics
from vhs.metrics import study as asked
from vhs.metrics.record import Record, decode, encode
from vhs.metrics.worth import Level, worth_of
from vhs.report.study import markdown, render

PAIR = "mixed - real-matched"


def planted(run: str, right: dict[str, np.ndarray], scope: str = "split", vary: dict | None = None, trained: dict | None = None, **options) -> Record:
    """A record whose arms are right on the given images; keys are the run's own unless `data` names whose they are."""
    data = options.pop("data", run)
    rows = pd.concat([answers(correct, arm, scope=scope, **options) for arm, correct in right.items()], ignore_index=True)
    about = {
        "study": "planted", "run": run, "scope": scope, "vary": vary or {}, "science": {}, "models": {}, "data": data, "patients_known": True,
        "trained": trained or {arm: {"real": 70, "generated": 0 if arm.startswith("real") else 50, "steps": 9} for arm in right},
    }  # fmt: skip
    return Record(about, rows.assign(key=[digest([data, scope, key])[:16] for key in rows.key]).drop(columns="index"))


def test_a_record_is_read_as_it_was_written():
    record = planted("seed-1", {"real": [1, 0, 1, 1], "mixed": [1, 1, 0, 1]}, patient=["a", "a", "b", "c"], vary={"phantoms.seed": 1})
    measured = planted("seed-1", {"measure": [1, 1, 1, 0]}, patient=["a", "a", "b", "c"], seed=metrics.NO_SEED).predictions
    record = Record(record.about, pd.concat([record.predictions, measured], ignore_index=True))
    text = encode(record)
    assert b"real/0,mixed/0,measure\n" in text and b" 20 60 20" in text and b"small,s" in text
    found, order = decode(text), ["arm", "seed", "key"]
    assert found.about == json.loads(json.dumps(record.about)) and encode(found).splitlines()[-4:] != [] and found.name == "seed-1-split"
    both = [rows.predictions.sort_values(order, ignore_index=True) for rows in (record, found)]
    for column in ("key", "arm", "seed", "label", "predicted", "source", "scope", "role"):
        assert both[0][column].tolist() == both[1][column].tolist()
    named = both[1].patient
    assert named.notna().sum() == 6 and named.dropna().nunique() == 1 and "a" not in set(named), "only a patient of several images is named, and not by name"
    assert metrics.paired_difference(found.predictions, "mixed", "real") == metrics.paired_difference(record.predictions, "mixed", "real")
    for damaged in (text.replace(b" 60 ", b" x "), text.replace(b"# scope", b"# scop"), text.replace(b"key,patient", b"key,owner")):
        with pytest.raises(ValueError, match="no record of a study"):
            decode(damaged)


def test_calibration_counts_the_intervals_that_cover_zero():
    real, records = np.arange(100) < 70, []
    for number in range(20):
        null = np.roll(real, 30) if number < 17 else np.arange(100) < (90 if number < 19 else 50)  # 17 equal, two better, one worse
        records.append(planted(f"seed-{number}", {"real-matched": real, "null": null, "oracle": np.arange(100) < 90}))
    found = asked.calibration(records, ["null - real-matched", "oracle - real-matched"])
    null, oracle = found.tables["How many of the 95% intervals cover 0"]
    assert [null[what] for what in ("runs", "cover 0", "above 0", "below 0")] == [20, 17, 2, 1]
    assert [oracle[what] for what in ("runs", "cover 0", "above 0", "below 0")] == [20, 0, 20, 0]
    assert oracle["share above 0"]["ci95"] == pytest.approx([0.832, 1], abs=1e-3)  # Clopper and Pearson's for 20 of 20
    assert null["mean over runs"]["value"] == pytest.approx((2 * 0.2 - 0.2) / 20) and oracle["mean over runs"]["ci95"] == pytest.approx([0.2, 0.2])
    alone = metrics.paired_difference(records[3].predictions, "oracle", "real-matched")
    assert found.tables["Every run by itself"][3 * 2 + 1]["difference"]["ci95"] == alone["ci95"]
    assert found.sentences[0].startswith("null - real-matched: of 20 intervals 17 cover 0, 2 lie above, 1 below; asked for is that of 20 or more at least 85%")
    assert found.sentences[0].split(". By")[0].endswith("cover 0: met") and found.sentences[1].split(". By")[0].endswith("lie above 0: met")


def test_calibration_says_that_it_failed():
    real, better = np.arange(100) < 70, np.arange(100) < 90
    arms = {"real-matched": real, "null": better, "oracle": np.arange(100) < 50}
    found = asked.calibration([planted(f"seed-{number}", arms) for number in range(20)], ["null - real-matched", "oracle - real-matched"])
    assert "0 cover 0, 20 lie above, 0 below; asked for" in found.sentences[0] and "cover 0: NOT MET" in found.sentences[0]
    assert "20 below" in found.sentences[1] and "lie above 0: NOT MET" in found.sentences[1], "an oracle that does harm is no oracle"
    few = asked.calibration([planted(f"seed-{number}", arms | {"null": real}) for number in range(19)], ["null - real-matched"])
    assert "19 cover 0" in few.sentences[0] and "NOT MET" in few.sentences[0], "nineteen are not twenty"


def test_intervals_of_equal_arms_cover_zero_as_often_as_they_promise():
    rng = np.random.default_rng(1)
    records = [planted(f"seed-{number}", {arm: rng.random(150) < 0.7 for arm in ("real-matched", "null")}) for number in range(200)]
    (null,) = asked.calibration(records, ["null - real-matched"]).tables["How many of the 95% intervals cover 0"]
    assert 0.91 <= null["share cover 0"]["value"] <= 0.99


def test_a_run_without_a_generated_image_says_nothing_and_is_named():
    none = {"mixed": {"real": 70, "generated": 0, "steps": 9}, "real-matched": {"real": 70, "generated": 0, "steps": 9}}
    same = {"mixed": np.ones(30), "real-matched": np.ones(30)}
    records = [planted("seed-1", same, trained=none), planted("seed-2", same)]
    (alone, left_out) = asked.pooled(records[:1], [PAIR]).sentences
    assert "nothing to say" in alone and left_out.startswith("seed-1 is left out of mixed")
    four = [planted(f"seed-{number}", same) for number in (2, 3)] + [planted("seed-4", {"mixed": np.arange(30) < 15, "real-matched": np.ones(30)})]
    assert "over 3 of 4 runs" in asked.pooled([*records[:1], *four], [PAIR]).sentences[0]
    found = asked.calibration(records, [PAIR])
    assert found.tables["How many of the 95% intervals cover 0"][0]["runs"] == 1 and found.sentences[1].startswith("seed-1 is left out of mixed")
    assert asked.pooled(records, [PAIR]).tables["Differences"][0]["images"] == 30


def test_dose_is_each_doses_own_accuracy():
    def run(dose: int, right: float, seed: int) -> Record:
        correct = {arm: np.arange(100) < 100 * share for arm, share in (("real-matched", 0.5), ("mixed", right))}
        trained = {"real-matched": {"real": 70, "generated": 0, "steps": 9}, "mixed": {"real": 70, "generated": 3 * dose, "steps": 9}}
        vary = {"phantoms.seed": seed, "generation.quota": dose}
        return planted(f"seed-{seed}_quota-{dose}", correct, vary=vary, data=f"seed-{seed}", trained=trained)

    records = [run(dose, right, seed) for dose, right in ((25, 0.6), (50, 0.7)) for seed in (1, 2)]
    found = asked.dose(records, [PAIR], "generation.quota")
    said = {(row["generation.quota"], row["arm"]): (row["accuracy"]["value"], row["images"]) for row in found.tables["Accuracy of every arm"]}
    assert said == {(25, "real-matched"): (0.5, 200), (25, "mixed"): (0.6, 200), (50, "real-matched"): (0.5, 200), (50, "mixed"): (0.7, 200)}
    assert [row["difference"]["value"] for row in found.tables["Differences"]] == pytest.approx([0.1, 0.2])
    curve = [(row[asked.DOSE], round(row["difference"]["value"], 9)) for row in found.plots["dose"]]
    assert curve == [(0, 0), (107, 0.1), (214, 0.2)], "by what was trained on, from none on"
    page, figures = render(told(found), found)
    assert set(figures) == {"dose", "along"} and page.count("<svg") == 2
    with pytest.raises(ValueError, match="seed-1_quota-25-split and seed-1_quota-50-split judge on the same image.*along"):
        asked.pooled(records, [PAIR])


def curve(*points: tuple[float, float, float], images: int = 1000) -> list[Level]:
    """(real images, accuracy with generated images, without)."""
    levels = []
    for number, first, second in points:
        right = {"mixed": np.arange(images) < first * images, "real-matched": np.arange(images) < second * images}
        levels.append(Level(number, number, planted("seed-1", right).predictions.assign(set="1")))
    return levels


def test_a_known_worth():
    few, half, whole = worth_of(curve((20, 0.6, 0.5), (40, 0.65, 0.6), (80, 0.9, 0.7)), "mixed", "real-matched")
    assert few.images == pytest.approx(20) and few.ci95[0] <= 20 <= few.ci95[1], "60% is reached with 40 real images"
    assert half.images == pytest.approx(20), "and 65% half way from 40 to 80"
    assert whole.images is None and whole.ci95 == [None, None] and "cannot be said" in whole.said and "more than 0" in whole.said
    harm, *_ = worth_of(curve((20, 0.4, 0.5), (40, 0.6, 0.6)), "mixed", "real-matched")
    assert harm.images is None and "below the curve" in harm.said
    nothing = worth_of(curve((20, 0.5, 0.5), (40, 0.6, 0.6)), "mixed", "real-matched", draws=200)
    assert [one.images for one in nothing] == [0, 0]
    falls = worth_of(curve((20, 0.55, 0.6), (40, 0.55, 0.5), (80, 0.65, 0.7)), "mixed", "real-matched", draws=200)
    assert falls[0].images == 10 and falls[1].images == -10, "a curve that falls is level there, at its mean, and nobody knows where on it"


def test_the_interval_of_a_worth_covers_it():
    """Arms of known accuracy, drawn anew: in 95 of 100 draws the interval should hold the true 20 images."""
    rng, hits, draws = np.random.default_rng(0), 0, 40
    for _ in range(draws):
        levels = []
        for number, first, second in ((20, 0.6, 0.5), (40, 0.65, 0.6), (80, 0.68, 0.7)):
            right = {"mixed": rng.random(400) < first, "real-matched": rng.random(400) < second}
            levels.append(Level(number, number, planted("seed-1", right).predictions.assign(set="1")))
        low, high = worth_of(levels, "mixed", "real-matched", draws=120)[0].ci95
        hits += (low is None or low <= 20) and (high is None or high >= 20)
    assert hits / draws >= 0.88


def test_a_worth_over_sets_knows_that_sets_and_trainings_differ():
    """Five sets, in each of which every training is a few points better or worse: the jackknife over sets covers, a bootstrap of patients would not."""
    rng, hits, draws = np.random.default_rng(3), np.zeros(2), 30
    for _ in range(draws):
        levels, one = [], []
        for number, first, second in ((20, 0.6, 0.5), (40, 0.65, 0.6), (80, 0.75, 0.7)):
            parts = []
            for name in range(5):
                right = {arm: rng.random(200) < share + rng.normal(0, 0.04) for arm, share in (("mixed", first), ("real-matched", second))}
                parts.append(planted(f"seed-{name}", right).predictions.assign(set=str(name)))
            levels.append(Level(number, number, pd.concat(parts, ignore_index=True)))
            one.append(Level(number, number, levels[-1].predictions.assign(set="all")))
        for way, found in enumerate((worth_of(levels, "mixed", "real-matched"), worth_of(one, "mixed", "real-matched", draws=40))):
            low, high = found[0].ci95
            hits[way] += (low is None or low <= 20) and (high is None or high >= 20)
    assert "as they were trained" in found[0].said and hits[0] / draws >= 0.9 > hits[1] / draws, hits / draws


def test_a_worth_that_is_none_is_not_found_at_the_curves_ends():
    """Equal arms on five sets: at the first and the last level too, an arm that is a little better by chance is worth nothing."""
    rng, draws, wrong = np.random.default_rng(5), 60, np.zeros(3)
    for _ in range(draws):
        levels = []
        for number, accuracy in ((20, 0.60), (40, 0.68), (80, 0.76)):
            parts = []
            for name in range(5):
                right = {arm: rng.random(200) < accuracy + rng.normal(0, 0.03) for arm in ("mixed", "real-matched")}
                parts.append(planted(f"seed-{name}", right).predictions.assign(set=str(name)))
            levels.append(Level(number, number, pd.concat(parts, ignore_index=True)))
        for place, found in enumerate(worth_of(levels, "mixed", "real-matched")):
            (low, high), above, below = found.ci95, "beyond the curve, beyond" in found.said, "below the curve, below" in found.said
            wrong[place] += above or below or (low is not None and low > 0) or (high is not None and high < 0)
    assert (wrong <= 6).all(), wrong


def test_runs_of_one_recipe_tell_together_how_much_trainings_differ():
    """Two seeds of one run say next to nothing of it: equal arms would be told apart, and a difference of ten points overlooked, every few times."""
    rng, records = np.random.default_rng(4), []
    for number in range(40):
        difficulty, right = rng.normal(0, 0.8, 400), {}
        for arm, better in (("real-matched", 0), ("null", 0), ("oracle", 0.4)):
            right[arm] = [difficulty + rng.normal(0.7 + better, 0.1) + rng.normal(0, 0.6, 400) > 0 for _ in (0, 1)]
        seeds = [planted(f"seed-{number}", {arm: both[seed] for arm, both in right.items()}, seed=seed) for seed in (0, 1)]
        records.append(Record(seeds[0].about, pd.concat([one.predictions for one in seeds], ignore_index=True)))
    null, oracle = asked.calibration(records, ["null - real-matched", "oracle - real-matched"]).tables["How many of the 95% intervals cover 0"]
    assert null["cover 0"] >= 36 and oracle["above 0"] >= 37
    (said,) = asked.calibration(records, ["oracle - real-matched"]).sentences
    alone = [metrics.paired_difference(record.predictions, "oracle", "real-matched")["ci95"] for record in records]
    overlooked = sum(low <= 0 <= high for low, high in alone)
    assert overlooked >= 5 and f"By its own seeds alone, as one run would say it: {overlooked} cover 0" in said, "by itself such a run often cannot say so"


def test_worth_goes_by_what_was_trained_on():
    def run(share: float, right: tuple[float, float], seed: int) -> Record:
        correct = {arm: np.arange(200) < 200 * accuracy for arm, accuracy in zip(("mixed", "real-matched"), right)}
        trained = {arm: {"real": round(80 * share) + seed, "generated": 50, "steps": 9} for arm in correct}
        return planted(f"f-{share}-{seed}", correct, vary={"seed": seed, "share": share}, trained=trained, data=f"d{seed}")

    records = [run(share, right, seed) for share, right in ((0.5, (0.6, 0.5)), (1.0, (0.6, 0.6))) for seed in (0, 2)]
    found = asked.worth(records, [PAIR], "share")
    assert found.sentences[0].startswith("with 41 real images mixed is worth +40 labelled images [")
    assert found.sentences[1].startswith("with 81 real images mixed is worth +0 labelled images [")


def test_pooled_joins_folds_sources_and_seeds():
    def fold(number: int, mixed: list, matched: list) -> Record:
        arms = {"mixed": mixed, "real-matched": matched}
        return planted("run", arms, scope=f"fold-{number}", source="north" if number else "south", data="films")

    records = [fold(0, [1, 1, 1, 0], [1, 0, 0, 0]), fold(1, [1, 0], [1, 0])]
    found = asked.pooled(records, [PAIR])
    overall, north, south = found.tables["Differences"]
    low, high = overall["difference"]["ci95"]
    assert overall["images"] == 6 and overall["difference"]["value"] == pytest.approx(2 / 6) and north["images"] == 2 and south["difference"]["value"] == 0.5
    assert f"half-width {50 * (high - low):.1f}" in found.sentences[0] and "Every run by itself" not in found.tables
    page, figures = render(told(found), found)
    assert page.count("<svg") == len(figures) == 2 and "http" not in page.replace("http-equiv", "") and "Opened 1 time of 1 planned" in page
    assert "| source | pair | difference |" in markdown(told(found)) and "| all | mixed - real-matched | +33.3 [" in markdown(told(found))


def told(findings: asked.Findings) -> dict:
    study = {"name": "planted", "question": "pooled", "config": "demo", "pairs": [PAIR], "looks": 1, "set": {}, "vary": {}}
    return {
        "study": study, "sealed": None, "records": 2, "of": 2, "looks": [{"records": 2}], "core_seconds": 3600, "patients_known": True,
        "made_by": ["vhs 1"], "machines": [], "sentences": findings.sentences, "tables": findings.tables,
    }  # fmt: skip
