"""The dry run says what a run would do: the units it then has, from data, phantoms or `expect`, at stated or at measured rates."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from conftest import ROOT, vhs

from jobs import config, fits, forecast, plan, rates
from jobs.config import ConfigError, load
from jobs.stages import STAGES
from jobs.status import costs


def planned(settings, calibrate=None):
    return forecast.forecast(settings, forecast.sizes(settings, plan.Run("nowhere", settings, read_only=True)), calibrate)


@pytest.mark.parametrize("name", config.names())
def test_every_packaged_config_plans(name, real_data):
    settings = load(name, [f"data={real_data / 'ctr'}"] if "ctr" in name else [])
    made = planned(settings)
    assert [row.stage for row in made.rows] == [stage.NAME for stage in STAGES if stage.NAME != "prompts" or settings.prompts.candidates]
    assert made.hours > 0 and all(row.units >= 1 and row.memory_gb > 0 for row in made.rows)
    assert made.sizes.train > made.sizes.valid > 0 and made.sizes.test > 0
    assert any("can at best find a difference of" in line for line in forecast.detectable(made.sizes, settings.split.folds))


def test_the_plan_is_what_the_run_did_and_its_rates_are_the_runs(reference):
    run = plan.reopen(str(reference), read_only=True)
    did = {cost.stage: cost for cost in costs(run)}
    stated, measured = planned(run.config), planned(run.config, run)
    assert not any(row.measured for row in stated.rows) and all(row.measured for row in measured.rows if row.stage != "split")
    for row in measured.rows:
        if row.stage not in ("generate", "label"):  # these go in rounds: how many is a guess
            assert row.units == did[row.stage].units, row.stage
        if row.measured:
            assert row.seconds / row.units == pytest.approx(did[row.stage].core_seconds / did[row.stage].units, rel=1e-6), row.stage
    steps = sum(run.marker(path).facts["steps"] for path in run.committed("train"))
    assert next(row.steps for row in measured.rows if row.stage == "train") == pytest.approx(steps, rel=0.35)


def test_more_work_takes_longer_and_more_workers_shorten_it():
    small, large = planned(load("debug/demo")), planned(load("debug/demo", ["dreambooth.steps=1000", "generation.quota=5000", "split.folds=2"]))
    for stage in ("dreambooth", "generate", "train"):
        one, other = (next(row for row in made.rows if row.stage == stage) for made in (small, large))
        assert other.seconds > one.seconds, stage
    assert large.ceiling == 3 * small.ceiling
    assert planned(load("debug/demo", ["execution.workers=2"])).hours < small.hours


def test_without_data_it_needs_to_be_told_sizes(tmp_path):
    with pytest.raises(ConfigError, match="is not here.*expect="):
        planned(load("debug/ctr", ["data=nowhere"]))
    made = planned(load("debug/ctr", ["data=nowhere", "expect={train: 1400, valid: 200, test: 400}"]))
    assert (made.sizes.images, made.sizes.judged) == (2000, 400) and "data not here" in forecast.notes(made)[0]
    assert "data not here (/nope), sizes as in expect: 1400 training" in vhs("run", "paper", "data=/nope", "--dry-run", "--out", tmp_path / "run")
    with pytest.raises(ConfigError, match="expect.tset: no such key. Legal here: judged, test, train, valid"):
        load("debug/demo", ["expect={train: 1, test: 1, tset: 1}"])


def test_what_exceeds_the_machine_is_remarked(tmp_path):
    large = ["classifier.model=tf_efficientnet_b7", "classifier.size_px=600", "classifier.epochs=300", "execution.device=cpu"]
    memory, time = fits.remarks(planned(load("debug/demo", large)), memory_gb=16)
    assert re.match(r"memory: train takes about \d\d GB, this machine has 16. Less of it: classifier.size_px", memory)
    assert re.match(r"time: about \d+ hours are \d+ days of one CPU core, \d+ hours of them train. Less of it: classifier.size_px", time)
    assert fits.remarks(planned(load("debug/demo"))) == [] and 0 < fits.here_gb() < 1e6
    (gpu,) = fits.remarks(planned(load("debug/demo", [*large[:2], "execution.device=cuda"])))
    assert "the GPU that is planned for has 24" in gpu
    dry = ("run", "debug/demo", *large, "--dry-run", "--out", tmp_path / "run")
    assert "time: about" in vhs(*dry) and "time: about" not in vhs(*dry, "--gpus", "8"), "where it is planned for more machines"


def test_an_unknown_model_is_said_to_be_unknown(tmp_path):
    made = planned(load("debug/demo", ["classifier.model=resnet26t", "base=someone/else", f"base_revision={'a' * 40}"]))
    unknown = {row.stage for row in made.rows if row.seconds is None}
    assert unknown == {"priors", "dreambooth", "generate", "train", "evaluate"} and made.hours is None
    assert "unknown" in vhs("run", "debug/demo", "classifier.model=resnet26t", "--dry-run", "--out", tmp_path / "run")


def test_rates_of_another_device_are_refused(reference):
    with pytest.raises(ConfigError, match="one CPU core.*one 24 GB GPU"):
        planned(load("debug/demo", ["execution.device=cuda"]), plan.reopen(str(reference), read_only=True))


@pytest.mark.parametrize("name", ["dogheart", "paper"])
def test_expected_test_images_without_labels_are_not_judged(name):
    made = planned(load(name, ["data=nowhere"]))
    said = forecast.detectable(made.sizes, load(name).split.folds)
    assert (made.sizes.test, made.sizes.judged) == (400, 0) and not any("the test part" in line for line in said)
    with pytest.raises(ConfigError, match="judged is 5 of only 4 test images"):
        load(name, ["expect={train: 10, test: 4, judged: 5}"])


def test_a_dry_run_of_one_scope_is_refused():
    assert "a dry run plans every scope" in " ".join(vhs("run", "debug/demo", "--dry-run", "--scope", "split", code=1).split())


def test_a_scope_that_is_not_planned_is_refused_before_anything_is_begun(tmp_path):
    said = vhs("run", "debug/demo", "split.folds=2", "--scope", "fold-2", "--out", tmp_path / "run", code=1)
    assert "--scope fold-2: the plan's scopes are split, fold-0, fold-1" in " ".join(said.split()) and not (tmp_path / "run").exists()


def test_the_help_of_stage_names_every_stage():
    said = " ".join(vhs("stage", "--help", environment={"COLUMNS": "250"}).split())
    assert f"{', '.join(stage.NAME for stage in STAGES[:-1])} or {STAGES[-1].NAME}." in said


def test_unlabelled_test_images_detect_nothing():
    sizes = forecast.Sizes(1400, 200, 400, 0, 1, 0, "")
    said = forecast.detectable(sizes, folds=7)
    assert len(said) == 2 and "folds together, 1600" in said[0] and "carry no labels" in said[1]


def test_the_command_shows_the_plan_without_torch(tmp_path):
    printed = vhs("run", "debug/demo", "--dry-run", "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists() and re.search(r"dreambooth.*stated", printed) and "can at best find a difference" in printed
    code = (
        "import sys\nfrom jobs import forecast, plan\nfrom jobs.config import load\nc = load('debug/demo')\n"
        "forecast.forecast(c, s := forecast.sizes(c, plan.Run('nowhere', c, read_only=True)))\nforecast.detectable(s, 0)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("name", ["resnet10t", "tf_efficientnet_lite0", "vit_tiny_patch16_224"])
def test_the_table_of_classifiers_is_counted(name):
    import timm
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    stated = rates.CLASSIFIERS[name]
    with torch.device("meta"):
        net = timm.create_model(name, in_chans=1, num_classes=3).eval()
        with FlopCounterMode(display=False) as count, torch.no_grad():
            net(torch.zeros(1, 1, stated.side_px, stated.side_px))
    assert stated.gflop == pytest.approx(count.get_total_flops() / 1e9, rel=0.05)
    assert stated.parameters_m == pytest.approx(sum(p.numel() for p in net.parameters()) / 1e6, rel=0.05)
