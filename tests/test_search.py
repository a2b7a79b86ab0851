"""`vhs tune`: the same trials for every arm, judged on the inner validation with the test split out of reach, by Ray Tune here and on a cluster."""

from __future__ import annotations

import html
import json
import signal

import pytest
from cluster import until
from conftest import command, vhs
from hypothesis import given, settings
from hypothesis import strategies as st
from test_chain import begin
from test_slurm_scripts import submit

from jobs import config, plan, search, trial
from jobs.attempt import Inputs
from jobs.config import ConfigError
from jobs.lineage import LeakError, split_rows
from jobs.plan import PlanError
from jobs.stages import evaluate, train
from jobs.unit import Unit
from vhs.settings import Classifier
from vhs.tuning import Range, Search, draw

SMALL = ("epochs=[2,4]", "grace=0.5", "reduction=2", "batch=[8,16]", "head_hidden=[0,1]")
SPACE = config.read("search", [], Search)


@settings(deadline=None)
@given(seed=st.integers(0, 2**32), count=st.integers(1, 40), fewer=st.integers(1, 40))
def test_trials_are_in_range_and_a_function_of_the_seed(seed, count, fewer):
    drawn = draw(SPACE, count, seed)
    assert drawn[:fewer] == draw(SPACE, min(fewer, count), seed) and len(drawn) == count
    for chosen in drawn:
        for name, space in ((name, getattr(SPACE, name)) for name in chosen.__dataclass_fields__):
            value = getattr(chosen, name)
            assert space.low <= value <= space.high if isinstance(space, Range) else value in space, (name, value)
        Classifier(**{key.partition(".")[2]: value for key, value in chosen.overrides(10).items() if key.startswith("classifier.")})


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("learning_rate.low=0", ["learning_rate", "greater than 0"]),
        ("drop_rate.high=1", ["drop_rate 1", "less than 1"]),
        ("batch=[16,0]", ["batch 0", "greater than or equal to 1"]),
        ("drop_rate.low=0.9", ["0.9", "0.6", "lower one first"]),
        ("generated_share.high=1.5", ["generated_share", "1.5"]),
        ("epochs=[4]", ["grace", "4 epochs", "0.25"]),
        ("epoch=[4]", ["epoch", "no such key", "epochs"]),
    ],
)
def test_a_space_that_cannot_be_searched_says_what_is_legal(override, says):
    with pytest.raises(ConfigError) as error:
        config.read("search", [override], Search)
    assert not [word for word in says if word not in str(error.value)], str(error.value)


@pytest.fixture(scope="module")
def run(reference) -> plan.Run:
    return plan.reopen(str(reference), read_only=True)


def trials(run: plan.Run, arms=("real", "real-matched", "mixed"), count: int = 5) -> list[trial.Trial]:
    return search.trials(run, SPACE, list(arms), count)


def test_every_arm_is_given_the_same_trials_and_real_no_generated_images(run):
    made = trials(run)
    by_arm = {arm: [one for one in made if one.arm == arm] for arm in ("real", "real-matched", "mixed")}
    assert len(made) == 15 and [one.settings for one in by_arm["mixed"]] == [one.settings for one in by_arm["real-matched"]] == draw(SPACE, 5, 0)
    assert len({one.unit.identity for one in made}) == 15
    for real, mixed in zip(by_arm["real"], by_arm["mixed"]):
        theirs = mixed.settings.overrides(run.config.generation.quota)
        assert 1 <= theirs.pop("generation.quota") <= run.config.generation.quota
        assert real.settings.overrides(run.config.generation.quota) == theirs and real.settings.generated_share is None


def test_what_cannot_be_searched_is_refused_with_the_way_on(run, tmp_path):
    with pytest.raises(ConfigError, match="pretend.*legal are real, real-matched, mixed"):
        trials(run, ["real", "pretend"])
    fresh = plan.start(config.load("debug/demo"), str(tmp_path / "fresh"))
    with pytest.raises(PlanError, match=f"ingest.*vhs stage label {fresh.url}"):
        trials(fresh)
    folds = plan.start(config.load("debug/demo", ["split.folds=2"]), str(tmp_path / "folds"))
    with pytest.raises(PlanError, match="2 folds.*reported.*split.folds=0"):
        trials(folds)


def test_the_test_split_is_refused_by_name(run):
    (unit,) = [unit for unit in run.units("train") if unit.params["arm"] == "mixed"]
    inside, everything = trial.Inside(run.storage, unit), split_rows(Inputs(run.storage, unit))
    held_out, (mine) = set(everything.held_out.key), set(inside.samples("real").key)
    assert held_out and mine == {*everything.training.key, *everything.inner.key} and not mine & held_out
    for part in ("training", "inner"):
        assert getattr(inside, part).equals(getattr(everything, part))
    assert inside.held_out_patients == everything.held_out_patients and inside.held_out_keys == everything.held_out_keys == held_out
    attempts = {
        "the stages themselves": [lambda: train.work(run.config, inside, None), lambda: evaluate.work(run.config, inside, None)],
        "the split": [lambda: inside.table("splits"), lambda: inside.held_out, lambda: split_rows(inside)],
        "what was predicted": [lambda: inside.table("predictions"), lambda: inside.markers("predictions"), lambda: inside.samples("predictions")],
    }
    for attempt in sum(attempts.values(), []):
        with pytest.raises(LeakError, match="asked for .*: the test split is closed to it"):
            attempt()


def test_a_reported_fold_is_refused_by_name(tmp_path):
    folds = plan.start(config.load("debug/demo", ["split.folds=2"]), str(tmp_path / "folds"))
    vhs("stage", "split", folds.url)
    folds.refresh()
    inputs = {role: tuple((path, folds.marker(path).sha256) for path in folds.committed(stage)) for role, stage in (("real", "ingest"), ("splits", "split"))}
    for scope in ("split", "fold-0"):
        with pytest.raises(LeakError, match=f"no reported fold.*{scope}.*2 folds"):
            trial.Inside(folds.storage, Unit("train", "tune", "json", {}, {"scope": scope, "arm": "real", "seed": 0}, inputs))


def test_a_trial_reads_no_byte_of_a_test_image(reference, tmp_path):
    """Where every test image is destroyed it says the same."""
    spoiled, said = begin(tmp_path / "spoiled", reference), {}
    one = next(one for one in search.trials(spoiled, config.read("search", [*SMALL, "epochs=[2]"], Search), ["mixed"], 1))
    held_out = split_rows(Inputs(spoiled.storage, one.unit)).held_out
    for row in held_out.itertuples():
        with open(spoiled.storage.local(row.path), "r+b") as shard:
            shard.seek(row.offset)
            shard.write(b"\0" * row.size)
    for name, url in (("whole", str(reference)), ("spoiled", spoiled.url)):
        trial.perform(url, "tune/none.json", one, said.setdefault(name, []).append)
    figures = {name: [(row["validation_loss"], row["validation_accuracy"], row["generated"]) for row in rows] for name, rows in said.items()}
    assert len(held_out) > 0 and len(figures["whole"]) == 2 and figures["whole"] == figures["spoiled"] and figures["whole"][0][2] > 0


def test_a_loss_that_is_no_number_is_an_answer(run):
    said = []
    one = search.trials(run, config.read("search", [*SMALL, "learning_rate={low: 1.0e+30, high: 1.0e+30}"], Search), ["real"], 1)[0]
    trial.perform(run.storage.url, "tune/none.json", one, said.append)
    found = search._result(one, said)
    assert found["state"] == "diverged" and "learning rate" in said[-1]["diverged"]


def records(run, name: str = "search") -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (run / "tune" / name).glob("*.json")}


@pytest.mark.slow
def test_an_interrupted_search_goes_on_and_the_page_shows_it(reference, tmp_path):
    begin(tmp_path / "run", reference)
    run, again = tmp_path / "run", ("tune", tmp_path / "run", *SMALL, "--trials", "6", "--arms", "real,mixed")
    first = command(*again)
    until(lambda: first.poll() is not None or records(run), "a finished trial", patience_s=300)
    first.send_signal(signal.SIGINT)
    printed, _ = first.communicate(timeout=60)
    before = records(run)
    assert 0 < len(before) < 12 and first.returncode, printed
    printed = vhs(*again)
    after, table = records(run), json.loads((run / "tune" / "search.json").read_text())
    assert len(before) <= len(after) == len(table["trials"]) == 12 and before.items() <= after.items(), "a finished trial is not repeated"
    assert {(one["arm"], one["number"]) for one in table["trials"]} == {(arm, n) for arm in ("real", "mixed") for n in range(6)}
    assert {one["state"] for one in table["trials"]} <= {"whole", "stopped"} and set(table["best"]) == {"real", "mixed"}
    assert all(one["generated"] > 0 if one["arm"] == "mixed" else one["generated"] == 0 for one in table["trials"])
    best = table["best"]["mixed"]["settings"]
    assert f"classifier.learning_rate={best['learning_rate']} " in printed and "flatter" in printed and "0 units" not in printed
    vhs("report", run)
    page, plain = html.unescape((run / "report" / "index.html").read_text()), (reference / "report" / "index.html").read_text()
    assert 'id="search-search"' in page and f"classifier.learning_rate={best['learning_rate']} " in page and page.count("<svg") == plain.count("<svg") + 1
    refused = vhs(*again, "batch=[8]", code=1)
    assert "another space: batch" in refused and "--name" in refused


@pytest.mark.slow
def test_twelve_trials_on_three_nodes_of_a_ray_cluster(cluster, reference, tmp_path, figure):
    begin(tmp_path / "run", reference)
    arguments = ("tune", str(tmp_path / "run"), *SMALL, "epochs=[4,6]", "grace=0.25", "--trials", "6", "--arms", "real,mixed", "--on", "ray")
    said = submit(cluster, tmp_path, "ray.sbatch", "vhs", *arguments, stage="generate", options="--nodes=3")
    found = json.loads((tmp_path / "run" / "tune" / "search.json").read_text())["trials"]
    nodes, states = {one["node"] for one in found}, [one["state"] for one in found]
    figure(f"{len(found)} trials on {len(nodes)} nodes, {states.count('whole')} whole, {states.count('stopped')} stopped by ASHA")
    assert len({one["identity"] for one in found}) == 12 == len(records(tmp_path / "run")), said
    assert set(states) == {"whole", "stopped"} and len(nodes) >= 2
    for one in (one for one in found if one["state"] == "stopped"):
        assert 0 < len(one["epochs"]) < one["settings"]["epochs"]
