"""Controls: arms whose images are copies, fresh phantoms, or the base model's, through every stage of a run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from conftest import committed, vhs
from test_chain import begin

from jobs import batches, generators, lineage, plan
from jobs.attempt import Inputs, Output
from jobs.config import ConfigError, load
from jobs.stages import prompts, train
from shards import manifest
from shards.storage import open_storage
from vhs.measure import CLASSES

ARMS = "arms=[real,real-matched,mixed,null,oracle,base,measure]"


@pytest.fixture(scope="module")
def run(reference, tmp_path_factory) -> Path:
    """The reference with every control beside it; what they share is taken over."""
    out = tmp_path_factory.mktemp("controls") / "run"
    vhs("run", "debug/demo", ARMS, "--out", out, "--reuse", reference)
    return out


def images(run, generator: str) -> pd.DataFrame:
    opened = plan.reopen(str(run))
    table = manifest.load(opened.storage, paths=generators.committed(opened, "generate", generator, "split")).to_pandas()
    labels = [manifest.read(opened.storage, path).to_pandas() for path in generators.committed(opened, "label", generator, "split")]
    return table.merge(pd.concat(labels), on="key", validate="one_to_one")


def facts(run) -> dict[str, dict]:
    return {fact["arm"]: fact for fact in (json.loads(file.read_text())["facts"] for file in run.glob("classifier/*/split/*.json"))}


def pixels(run, rows) -> list[bytes]:
    return [image.tobytes() for image in batches.load_images(open_storage(run), rows)]


def test_controls_change_nothing_of_the_run_they_stand_beside(run, reference):
    """What the reference made is there byte for byte, but for the report."""
    theirs, ours = committed(reference), committed(run)
    same = [name for name in theirs if not name.startswith(("report", "plan.json"))]
    assert len(same) > 70 and all(ours[name] == theirs[name] for name in same)


def test_null_is_training_images_and_nothing_else(run):
    opened = plan.reopen(str(run))
    scope = lineage.split_rows(Inputs(opened.storage, opened.units("train")[0]))
    copies, training = images(run, "null"), set(pixels(run, scope.training))
    assert len(copies) >= 36 and set(pixels(run, copies)) <= training
    for name, rows in copies.groupby("prompted"):
        often = pd.Series(pixels(run, rows)).value_counts()
        assert len(often) == (scope.training.label == CLASSES.index(name)).sum() or often.max() == 1, "every one of them before any comes again"
        assert (rows.label == CLASSES.index(name)).all() and rows.accepted.all() and set(rows.label_source) == {"known"}
    assert (copies.near_distance < 0.23).mean() > 0.9, "the guard against copies, which is not asked here, would know them"


def test_oracle_is_fresh_phantoms_of_their_class(run):
    """That measure what they were asked for: the class is the drawing program's, not the labeller's."""
    opened = plan.reopen(str(run))
    fresh = images(run, "oracle")
    real = manifest.load(opened.storage, paths=opened.committed("ingest")).to_pandas()
    assert not set(pixels(run, fresh)) & set(pixels(run, real)) and len(set(pixels(run, fresh))) == len(fresh) >= 36
    assert fresh.accepted.all() and (fresh.label == fresh.prompted.map(CLASSES.index)).all()
    (marker,) = generators.committed(opened, "dreambooth", "oracle", "split")
    assert opened.marker(marker).facts["patients_seen"] == []


def test_base_draws_as_the_base_model_does(run):
    from jobs import models
    from jobs.drawing import draw
    from jobs.stages import generate

    opened = plan.reopen(str(run))
    unit = next(unit for unit in opened.units("generate") if generators.made_by(unit.params) == "base")
    wanted = generate.wanted(opened.config, unit.params)[: opened.config.generation.batch]
    assert "sks" not in wanted[0].prompt and unit.params["class"] in wanted[0].prompt
    drawn = [image.tobytes() for image in draw(opened.config, models.base(opened.config), opened.config.generation, wanted)]
    stored = manifest.load(opened.storage, paths=[unit.marker]).to_pandas().head(len(drawn))
    assert pixels(run, stored) == drawn


def test_a_control_s_image_can_be_drawn_again(run):
    for name in generators.KNOWING:
        assert "the same bytes" in vhs("regenerate", run, images(run, name).key[5])


def test_every_control_is_trained_like_mixed(run):
    found = facts(run)
    mixed = found["mixed"]
    for arm in generators.CONTROLS:
        assert (found[arm]["steps"], found[arm]["real"], found[arm]["class_prior"]) == (mixed["steps"], mixed["real"], mixed["class_prior"])
    for arm in generators.KNOWING:
        assert found[arm]["generated_by_class"] == mixed["generated_by_class"] and sum(mixed["generated_by_class"]) == mixed["generated"] > 0
    lineages = {file.parent.parts[-4]: json.loads(file.read_text()) for file in run.glob("classifier/*/split/*/*/lineage.json")}
    assert set(lineages) == {"real", "real-matched", "mixed", *generators.CONTROLS}


def test_the_report_tells_each_difference_and_what_it_is_worth(run):
    summary = json.loads((run / "report" / "summary.json").read_text())
    pairs = [" - ".join(found["arms"]) for found in summary["differences"]]
    assert pairs == ["mixed - real-matched", "mixed - base", "null - real-matched", "base - real-matched", "oracle - real-matched", "mixed - real"]
    assert summary["differences"][0] == summary["paired"] and json.loads((run / "plan.json").read_text())["analysis"]["differences"] == pairs
    page = (run / "report" / "index.html").read_text()
    assert "what DreamBooth brought" in page and "copies of training images" in page and "fresh phantoms" in page
    status = vhs("status", run)
    assert "generated for null/split" in status and "0 errors" in vhs("verify", run, "--full")


def test_copies_are_nearer_to_training_and_fresh_images_are_not(run):
    """The controls are the measure's own: all of null's images are training images, of oracle's none, and the base model has seen none."""
    summary = json.loads((run / "report" / "summary.json").read_text())["likeness"]
    nearer = {name: found["nearer to training"] for name, found in summary["others"].items()}
    assert set(nearer) == set(generators.CONTROLS) and nearer["null"]["share"] == 1 > nearer["null"]["chance"][1]
    for name in ("oracle", "base"):
        assert nearer[name]["chance"][0] <= nearer[name]["share"] <= nearer[name]["chance"][1], name
    probes = {name: found["probe"] for name, found in summary["others"].items()}
    assert probes["null"] is None and probes["base"]["auroc"] > 0.8 > probes["oracle"]["auroc"], "the base model draws blurred phantoms"
    page = (run / "report" / "index.html").read_text()
    assert f"<td>{probes['base']['auroc']:.3g}</td>" in page and f"<td>{summary['probe']['auroc']:.3g}</td>" in page


def test_a_control_that_saw_a_held_out_patient_is_refused(run):
    """Planted: a copy of a test image. The guard that knows generated images knows controls."""
    opened = plan.reopen(str(run))
    unit = next(unit for unit in opened.units("train") if unit.params["arm"] == "null")
    inputs = Inputs(opened.storage, unit)
    scope = lineage.split_rows(inputs)
    assert len(train.accepted(opened.config, inputs, scope)) >= 36
    with pytest.raises(lineage.LeakError, match="generator/null/split"):
        train.accepted(opened.config, inputs, replace(scope, held_out_patients=frozenset(inputs.facts("generator")["patients_seen"][:1])))


def test_controls_alone_need_no_dreambooth(reference, tmp_path):
    """What calibrates the verdict: nothing is fine-tuned, and the quota is what each control gives."""
    out = tmp_path / "run"
    vhs("run", "debug/demo", "arms=[real-matched,null,oracle]", "classifier.epochs=1", "--out", out, "--reuse", reference)
    found = facts(out)
    assert not (out / "generator" / "split").exists() and not (out / "priors").exists()
    assert found["null"]["generated_by_class"] == found["oracle"]["generated_by_class"] == [12, 12, 12]
    assert found["real-matched"]["generated"] == 0 and len({fact["steps"] for fact in found.values()}) == 1
    summary = json.loads((out / "report" / "summary.json").read_text())
    assert summary["paired"] is None and [found["arms"][0] for found in summary["differences"]] == ["null", "oracle"]
    page = (out / "report" / "index.html").read_text().replace("\u00a0", " ")
    assert "none was planned, for mixed is not among the arms" in page and "No verdict rests on any of them" in page and "DreamBooth on the same" not in page


@pytest.mark.parametrize(("overrides", "said"), [
    (["arms=[real,null]"], "real-matched is what mixed"), (["arms=[real,real-matched]"], "real-matched is what mixed"),
    (["arms=[real-matched,oracle]", "data=folder"], "only phantoms can be drawn"), (["arms=[real-matched,nil]"], "real-matched"),
])  # fmt: skip
def test_controls_that_cannot_be(overrides, said):
    with pytest.raises(ConfigError, match=said):
        load("debug/demo", overrides)


def test_the_planner_counts_controls(tmp_path):
    dry = ("run", "demo", "--dry-run", "--out", tmp_path / "run")
    plain, more, alone = vhs(*dry), vhs(*dry, ARMS), vhs(*dry, "arms=[real-matched,null,oracle]")
    units = [{line.split()[1]: int(line.split()[3]) for line in text.splitlines() if line.startswith("│ ")} for text in (plain, more, alone)]
    assert units[1]["generate"] == 4 * units[0]["generate"] and units[1]["train"] == 2 * units[0]["train"] and units[1]["dreambooth"] == 4
    assert "priors" in units[0] and "priors" not in units[2] and units[2]["dreambooth"] == 2 and "prompts" not in units[0]


def test_prompts_are_ranked_on_training_images_and_the_best_one_draws(reference, tmp_path, monkeypatch):
    """One candidate is another wording; the other asks in words that the base has not learnt. No other image of the data is opened."""
    out = tmp_path / "run"
    candidates = "prompts.candidates=['{token} x-ray of a {subject} with a {size} heart','{token} nonsense {size}']"
    begin(out, reference, candidates, "prompts.images=4", "generation.max_rounds=1")
    vhs("stage", "generate", out)
    (marker,) = out.glob("prompts/split-*.json")
    found = json.loads(marker.read_text())["facts"]
    assert [row["images"] for row in found["ranking"]] == [12, 12, 12] and found["best"] == found["ranking"][0]["prompt"]
    ranks = [row["rank"] for row in found["ranking"]]
    assert ranks == sorted(ranks) and {row["prompt"] for row in found["ranking"]} >= {load("debug/demo").dreambooth.instance_prompt, "{token} nonsense {size}"}
    drawn = manifest.load(open_storage(out), paths=plan.reopen(str(out)).committed("generate")).to_pandas()
    assert set(drawn.prompt[drawn.prompted == "small"]) == {found["best"].format(token="sks", size="small", subject="dog")}
    looked, load_images = set(), batches.load_images
    monkeypatch.setattr(batches, "load_images", lambda storage, rows: looked.update(rows.key) or load_images(storage, rows))
    opened = plan.reopen(str(out))
    (unit,) = opened.units("prompts")
    inputs = Inputs(opened.storage, unit)
    (tmp_path / "again").mkdir()
    again = prompts.work(opened.config, inputs, Output(tmp_path / "again", None, None))
    assert again.facts == found and looked == set(lineage.split_rows(inputs).training.key)
    with pytest.raises(ConfigError, match="asks for every class in the same words"):
        load("debug/demo", ["prompts.candidates=['{token} heart']"])
