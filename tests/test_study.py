"""`vhs study`: what can be made and what is refused, looks that are counted, and a family of runs that is interrupted and goes on."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pandas as pd
import pytest
from cluster import until
from conftest import command, vhs
from test_chain import SITE, on
from test_slurm_scripts import submit
from test_study_tables import planted

from jobs import config as configuration
from jobs import study as studying
from jobs.config import ConfigError
from jobs.evidence import KEPT, PROTOCOL, Evidence
from jobs.plan import PlanError
from jobs.unit import digest
from shards.storage import open_storage
from vhs.metrics import study as asked
from vhs.metrics.record import Record, decode
from vhs.study import Study


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
