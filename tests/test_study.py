"""`vhs study`: tables on planted records whose answer is known, what is refused, and a family of runs that is interrupted and goes on."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from cluster import until
from conftest import command, vhs
from test_chain import SITE, on
from test_metrics import answers
from test_slurm_scripts import submit

from jobs import config as configuration
from jobs import study as studying
from jobs.config import ConfigError
from jobs.evidence import KEPT, PROTOCOL, Evidence
from jobs.plan import PlanError
from jobs.unit import digest
from shards.storage import open_storage
from vhs import metrics
from vhs.metrics import study as asked
from vhs.metrics.record import Record, decode, encode
from vhs.metrics.worth import Level, worth_of
from vhs.report.study import markdown, render
from vhs.study import Study

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


def test_the_studies_that_come_with_vhs_can_be_made():
    names = configuration.names("studies")
    assert {"calibration", "dose", "worth", "ctr"} <= set(names)
    for name in names:
        study, packaged = studying.read(name)
        made = studying.members(study)
        assert packaged and study.name == name and studying.sealed(made) in (True, None), "what is reported rests on sealed phantoms"
        assert len({one.name for one in made}) == len(made) and len({digest(one.config.science) for one in made}) == len(made)
    calibration = studying.members(studying.read("calibration")[0])
    assert [one.config.phantoms.seed for one in calibration] == list(range(1000, 1020))


def test_what_the_readme_says_of_a_study_is_what_its_records_say():
    readme, told_of = Path("README.md").read_text(), []
    for folder in sorted(KEPT.iterdir()):
        study, _ = studying.read(folder.name)
        names, kept = [name for one in studying.members(study) for name in one.records.values()], Evidence(folder)
        if set(names) <= set(kept.names()):
            found = asked.QUESTIONS[study.question]([kept.read(name) for name in names], study.pairs, study.along)
            rows = [[cell for cell in row.values() if isinstance(cell, dict)] for row in next(iter(found.tables.values()))]
            figures = [asked.words(cells[-1]) for cells in rows if cells]
            assert figures and not [figure for figure in figures if figure not in readme], f"{study.name}: {figures}"
            told_of.append(study.name)
    assert "calibration" in told_of


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"pairs": ["mixed-real"]}, "mixed - real-matched"),
        ({"vary": {"phantoms.seed": 3}}, "a list of distinct values"),
        ({"vary": {"data": ["a/b"]}}, "part of a run's name"),
        ({"vary": {}}, "takes several runs"),
        ({"set": {"phantoms": {"seed": 4}}}, "set and varied"),
        ({"question": "dose"}, "dose wants a key of vary"),
        ({"along": "phantoms.seed"}, "calibration wants none"),
    ],
)
def test_a_study_that_cannot_be_says_why(change, says):
    values = {"name": "mine", "question": "calibration", "config": "debug/demo", "vary": {"phantoms.seed": [1, 2]}}
    with pytest.raises(ConfigError, match=says):
        configuration.validated(values | change, Study)


def small(**change) -> Study:
    values = {"name": "small", "question": "calibration", "config": "debug/demo", "set": {"seeds": [0]}, "vary": {"phantoms.seed": [1, 2]}}
    return Study(**(values | change))


def test_science_is_in_the_studys_file_and_sealed_phantoms_stay_apart():
    one, _ = studying.members(small(), ["execution.workers=2"])
    assert one.name == "seed-1" and one.config.execution.workers == 2 and one.config.phantoms.seed == 1
    with pytest.raises(ConfigError, match="classifier.epochs: a study's science is in its file"):
        studying.members(small(), ["classifier.epochs=9"])
    with pytest.raises(ConfigError, match="pretrain is no arm of the runs.*set arms"):
        studying.members(small(pairs=["pretrain - real-matched"]))
    with pytest.raises(ConfigError, match="phantoms.seed 1 and 1000 in one study.*sealed"):
        studying.members(small(vary={"phantoms.seed": [1, 1000]}))
    assert studying.sealed(studying.members(small())) is False and studying.sealed(studying.members(small(vary={"phantoms.seed": [1000, 1001]})))


def test_sets_of_phantoms_share_no_draw_where_their_seeds_are_their_own():
    made = [one.config for one in studying.members(small(own_seeds=True, set={"seeds": [0, 1]}, vary={"phantoms.seed": [1, 2], "generation.quota": [3, 6]}))]
    drawn = [{*one.seeds, one.split.seed} for one in made]
    assert drawn[0] == drawn[1] and not drawn[0] & drawn[2], "runs of one set begin alike, of two sets not"
    for one in made:
        sections = [section.seed for name, section in one if name != "phantoms" and hasattr(section, "seed")]
        assert len(sections) >= 5 and set(sections) == {100 * one.phantoms.seed} and one.seeds == (sections[0], sections[0] + 1)
    with pytest.raises(ConfigError, match="own_seeds follow from phantoms.seed: vary it"):
        values = {"name": "mine", "question": "pooled", "config": "debug/demo", "own_seeds": True, "vary": {"generation.quota": [3, 6]}}
        configuration.validated(values, Study)


def test_another_analysis_of_the_same_records_is_another_look(tmp_path):
    kept = Evidence(tmp_path)
    kept.write(planted("seed-1", {"mixed": [1, 1, 0, 1], "real-matched": [1, 0, 0, 1]}))
    looks = [len(kept.look(["seed-1-split"], shown)) for shown in ([["+1.0"]], [["+1.0"]], [["+2.0"]], [["+1.0"]])]
    assert looks == [1, 1, 2, 2]


def test_sealed_phantoms_are_for_studies_alone(tmp_path):
    for more in ([], ["--dry-run"]):
        assert "phantoms.seed = 1030: from 1000 on they are sealed" in vhs("run", "debug/demo", "phantoms.seed=1030", "--out", tmp_path / "run", *more, code=1)
    assert not (tmp_path / "run").exists()


def test_a_foreign_record_and_another_protocol_are_refused_by_name(tmp_path):
    (one, _), kept = studying.members(small()), Evidence(tmp_path)
    begun = {key: value for key, value in studying.protocol(small(), [one]).items() if key != "own_seeds"}  # by a version that had no such key
    (tmp_path / PROTOCOL).write_text(json.dumps(begun))
    kept.freeze(studying.protocol(small(), [one]))
    record = planted("seed-1", {"mixed": [1, 1, 0, 1], "real-matched": [1, 0, 0, 1]})
    from jobs import models

    science = {key: value for key, value in one.config.science.items() if key != "report"}  # of a version that had no such setting
    kept.write(Record(record.about | {"science": science, "models": models.fingerprints(one.config)}, record.predictions))
    assert kept.has("seed-1-split", one.config) and not kept.has("seed-2-split", one.config)
    making = studying.Making(small(), [one], str(tmp_path / "out"), kept, None, print)
    with pytest.raises(PlanError, match="seed-1-split.csv is a record of study planted.*give small records of its own"):
        studying.table(making, early=False)
    other = configuration.load("debug/demo", ["phantoms.seed=1", "classifier.epochs=9", "seeds=[0]"])
    with pytest.raises(PlanError, match="seed-1-split.csv is the record of another run: classifier.epochs differs.*--records ANOTHER"):
        kept.has("seed-1-split", other)
    with pytest.raises(PlanError, match="seed-1-split.csv was made of other data than seed-1-fold-0"):
        kept.write(Record(record.about | {"scope": "fold-0", "data": "others"}, record.predictions))
    with pytest.raises(PlanError, match=f"{PROTOCOL} says otherwise than this study: pairs differs.*a name of its own"):
        kept.freeze(studying.protocol(small(pairs=["real - real-matched"]), [one]))
    (tmp_path / "seed-1-split.csv").write_text("damaged")
    with pytest.raises(PlanError, match="seed-1-split.csv: no record of a study.*made again"):
        kept.has("seed-1-split", one.config)


STUDY = """
name: small
question: calibration
config: debug/demo
set:
  arms: [real-matched, "null"]  # which need no generator
  purpose: descriptive
  phantoms.count: 40
  labeller.steps: 2
  classifier.epochs: 1
vary: {phantoms.seed: [9000, 9001], generation.quota: [3, 6]}
pairs: ["null - real-matched"]
"""


def stages(run) -> set[str]:
    """Of the units that were done in `run` itself, not taken over."""
    return {json.loads(file.read_text())["stage"] for file in run.glob("state/done/*.json")}


def test_a_study_that_is_interrupted_goes_on_and_leaves_what_is_not_its_own(tmp_path):
    file, out = tmp_path / "small.yaml", tmp_path / "out"
    file.write_text(STUDY)
    again, first, second = ("study", file, "--out", out), out / "runs" / "seed-9000_quota-3", out / "runs" / "seed-9000_quota-6"
    process = command(*again)
    until(lambda: process.poll() is not None or list(second.glob("real/*.parquet")), "the second run at work", patience_s=300)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    record = out / "records" / "seed-9000_quota-3-split.csv"
    assert process.returncode and record.is_file() and not (out / "study.json").exists(), printed
    before = record.read_bytes()
    (first / "mine.txt").write_text("of somebody else")
    printed = vhs(*again, "--keep-runs")
    assert "quota-3, split: run 1" not in printed and "seed-9000_quota-6, split: run 1 of 3" in printed, "only what was missing is made"
    assert record.read_bytes() == before and "of 4 intervals " in printed
    assert stages(second) == {"train", "evaluate"} and "labeller" in stages(out / "runs" / "seed-9001_quota-3"), "what runs share is made once"
    found, rows = json.loads((out / "study.json").read_text()), decode(before)
    assert found["records"] == 4 and len(found["looks"]) == 1 and found["sealed"] and found["core_seconds"] > 0 and "<svg" in (out / "index.html").read_text()
    assert set(rows.predictions.arm) == {"real-matched", "null"} and rows.about["trained"]["null"]["generated"] > 0
    assert len(before) < 20_000 and str(tmp_path) not in before.decode(), "small, and without this machine's paths"
    printed = vhs(*again)
    assert studying.DESCRIPTIVE in " ".join(printed.split()) and studying.DESCRIPTIVE in found["sentences"]
    assert "run 1 of" not in printed and len(json.loads((out / "records" / "looks.json").read_text())) == 1, "the same records again are no further look"
    assert [path.name for path in (out / "runs").rglob("*")] == [first.name, "mine.txt"], "a recorded run's files go, and no others"
    shutil.move(record, tmp_path / "away.csv")
    assert "no record is called so" in vhs(*again, "--only", "*-fold-7", code=1)
    early = vhs(*again, "--early")
    assert "Opened 2 times of 1 planned: more often" in early and "3 of 4 records at this one" in early
    (first / "plan.json").write_text("{}")
    assert "did not make: give another --out" in vhs(*again, code=1)


def test_what_cannot_be_made_freezes_nothing(tmp_path):
    file, out = tmp_path / "small.yaml", tmp_path / "out"
    file.write_text(STUDY)
    assert "--only *-fold-7: no record is called so. They are seed-9000_quota-3-split" in vhs("study", file, "--out", out, "--only", "*-fold-7", code=1)
    file.write_text("name: films\nquestion: pooled\nconfig: debug/ctr\nvary: {generation.quota: [3, 6]}\npairs: [mixed - real-matched]\n")
    assert "/nowhere" in vhs("study", file, "data=/nowhere", "--out", out, code=1)
    assert not out.exists()


@pytest.mark.slow
def test_a_study_elsewhere_says_what_it_says_here(cluster, bucket, s3, tmp_path, figure, monkeypatch):
    """Its runs on SLURM and on three nodes of Ray, everything in object storage: the same predictions, sentences and tables."""
    monkeypatch.setattr(cluster, "environment", cluster.environment | s3 | {"VHS_SHARED_DIR": str(tmp_path / "shared")})
    file = tmp_path / "small.yaml"
    file.write_text(STUDY)
    places = {"here": str(tmp_path / "here"), "slurm": f"{bucket}/slurm", "ray": f"{bucket}/ray"}
    vhs("study", file, "--out", places["here"])
    on(cluster, "study", file, "--out", places["slurm"], *SITE)
    submit(cluster, tmp_path, "ray.sbatch", "vhs", "study", str(file), "--out", places["ray"], "--on", "ray", stage="generate", options="--nodes=3")
    found = {name: json.loads(open_storage(place).read("study.json")) for name, place in places.items()}
    kept = {name: Evidence(f"{place}/records") for name, place in places.items()}
    for name in ("slurm", "ray"):
        assert found[name]["sentences"] == found["here"]["sentences"] and found[name]["tables"] == found["here"]["tables"]
        assert sorted(kept[name].names()) == sorted(kept["here"].names())
        for record in kept["here"].names():
            pd.testing.assert_frame_equal(kept[name].read(record).predictions, kept["here"].read(record).predictions)
        assert not [path for path in open_storage(places[name]).list() if path.startswith("runs/")], "a recorded run's files go"
    figure(f"{len(kept['here'].names())} records here, by SLURM and by Ray through S3: equal")
