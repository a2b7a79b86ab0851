"""ZeRO over real gloo processes: DeepSpeed's engine is the one asked for, states are shared out, curves are DDP's and resume, plain weights leave."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import committed, vhs
from test_distributed import BATCH, IMAGES, _dataset
from test_dreambooth import BATCHES_PER_EPOCH, MEANS, PRIORS, TINY, Recorder, settings
from test_dreambooth import batches as whole_batches

from jobs import batches, config, world
from shards import manifest
from shards.storage import open_storage
from vhs import checkpoint, dreambooth, engine, pretraining, trainable, training
from vhs.curve import Curve
from vhs.networks import build_classifier
from vhs.sampling import sample
from vhs.settings import CONFIGS, Classifier, DreamBooth, Generation

ALIKE = 1e-5  # relative; DDP adds up in another order and clips by another formula, 1e-7 a step, which AdamW blows up where a gradient is all but zero
IN_PIECES = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}  # no parameter is too small to be shared out
ALL = {**MEANS["all"], "max_grad_norm": 0.045}  # clips some of the steps: AdamW alone would not mind a gradient of another scale
BATCH_NORM, LAYER_NORM = "test_efficientnet", "test_convnext"

# case -> (loop, options), which two ranks run one after the other; DDP first, for accelerate keeps to DeepSpeed once it was asked for it
CASES = {
    "dreambooth none": ("dreambooth", {}),
    "dreambooth all none": ("dreambooth", ALL),
    "dreambooth zero2": ("dreambooth", {"sharding": "zero2"}),
    "dreambooth zero3": ("dreambooth", {"sharding": IN_PIECES}),
    "dreambooth all zero2": ("dreambooth", {"sharding": "zero2", **ALL}),
    "classifier zero2": ("classifier", {"model": LAYER_NORM, "sharding": "zero2"}),
    "classifier zero3": ("classifier", {"model": BATCH_NORM, "sharding": IN_PIECES}),
}
SHARDED = [case for case in CASES if not case.endswith("none")]
SLOW = {
    **{f"dreambooth {name} {sharding}": ("dreambooth", {"sharding": IN_PIECES if sharding == "pieces" else sharding, **means})
       for sharding in ("none", "zero2", "zero3", "pieces") for name, means in {**MEANS, "all": ALL, "bf16": {"mixed_precision": "bf16"}}.items()},
    "dreambooth whole zero2_offload": ("dreambooth", {"sharding": "zero2_offload"}),
    "dreambooth all zero3_offload": ("dreambooth", {"sharding": "zero3_offload", **ALL}),
}  # fmt: skip


def _dreambooth(_: str, progress, **changes):
    options, parts = settings(**changes), pretraining.build(TINY)

    def mine(epoch, start):
        rows = slice(world.rank(), None, world.size())
        for batch in whole_batches(epoch, start):
            yield {name: value if name == "total" else value[rows] for name, value in batch.items()}

    drawn = {}

    def draw(model):
        return sample(model, ["photo of sks large dog heart"], [1], 32, Generation(steps=2))

    def show(step, model):
        drawn[step] = draw(model)

    accelerator, shown = world.accelerator("cpu", options.mixed_precision, options.sharding), int(bool(options.sharding))
    curve = dreambooth.train(parts, mine, PRIORS, options, BATCHES_PER_EPOCH, accelerator, progress, show, shown)
    if shown and world.rank() == 0:  # looking on changed nothing, or the curve would not be that of DDP, which nobody looked at
        assert options.lora_rank or np.array_equal(drawn[7], draw(parts)), "what was shown last is what left"
    return curve, torch.nn.ModuleDict(parts.networks)


def _classifier(folder: str, progress, model: str, sharding=None, loss=None):
    """23 images in batches of 6: the last has 3 rows for one rank and 2 for the other, in the validation too."""
    storage = open_storage(folder)
    rows = manifest.load(storage, "real").to_pandas()
    choice = Classifier(model=model, weights="scratch", head_hidden=0, drop_rate=0.0, size_px=32, sharding=sharding)
    accelerator, curve = world.accelerator("cpu", "no", choice.sharding), Curve(7)
    epochs = batches.Epochs(storage, rows, BATCH, batches.shuffled(len(rows), seed=3))
    inner = batches.Epochs(storage, rows, BATCH, lambda epoch: np.arange(len(rows)))
    truth = dict(zip(rows.key, rows.label))
    net = training.fit(
        build_classifier(choice, seed=0), loss or training.cross_entropy(), epochs, steps=7, steps_per_epoch=epochs.steps, learning_rate=1e-3,
        weight_decay=0.01, accelerator=accelerator, progress=progress, seed=0, curve=curve, keep_best=True, sharding=choice.sharding,
        validate=training.inner_validation(lambda: inner(0, 0), truth, accelerator, 32),
    )  # fmt: skip
    assert len(training.predict(net, inner(0, 0), accelerator)["key"]) == IMAGES
    return curve, net


def _shares(of: engine.Sharded) -> dict:
    """The engine's class and ZeRO stage, and the share of the moments and of the trained weights that this rank holds."""
    total = sum(getattr(parameter, "ds_numel", parameter.numel()) for _, parameter in engine.trained(of.module))
    moments = sum(state["exp_avg"].numel() for state in of._zero.optimizer.state.values())
    return {
        "engine": type(of._engine).__name__,
        "stage": int(of._engine.zero_optimization_stage()),
        "moments_held": moments / total,
        "weights_held": sum(piece.numel() for piece in of.held()) / total,
    }


def _run(folder: str, loop: str, progress, options: dict) -> dict:
    """A loop to its end -> what this rank saw. The network that left must be made of plain, whole parameters."""
    made = []

    def noted(*arguments, **named):
        made.append(engine.build_engine(*arguments, **named))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        for module in (trainable, training):
            patch.setattr(module, "build_engine", noted)
        curve, network = {"dreambooth": _dreambooth, "classifier": _classifier}[loop](folder, progress, **options)
    for name, parameter in network.named_parameters():
        assert type(parameter) is torch.nn.Parameter and parameter.numel() and not hasattr(parameter, "ds_id"), name
    weights = [tensor.double().flatten() for tensor in network.state_dict().values()]
    seen = {"curve": curve.rows, "weights": [float(part.sum()) for part in weights], "size": float(torch.cat(weights).abs().mean())}
    return seen | (_shares(made[0]) if isinstance(made[0], engine.Sharded) else {})


def _rank(folder: str, cases: dict, kept: int) -> None:
    """One rank: each case to its end, then once more from the checkpoint of step `kept`; writes what it saw."""
    torch.set_num_threads(1)
    records = {}
    for case, (loop, options) in cases.items():
        file, progress = f"{folder}/{case}.pt", Recorder(keep_at=kept)
        whole = _run(folder, loop, progress, options)
        if world.rank() == 0:
            checkpoint.save(progress.kept, file)
        torch.distributed.barrier()
        records[case] = {"whole": whole, "resumed": _run(folder, loop, Recorder(state=checkpoint.load(file)), options)}
    with open(_record(folder, cases, world.rank(), world.size()), "w") as out:
        json.dump(records, out)


def _record(folder, cases: dict, rank: int, ranks: int) -> str:
    return f"{folder}/{next(iter(cases))} rank {rank} of {ranks}.json"


def _launched(folder, ranks: int, cases: dict, kept: int) -> list[dict]:
    """What each of `ranks` ranks wrote: case -> whole and resumed."""
    world.launch(ranks, _rank, str(folder), cases, kept)
    return [json.loads(Path(_record(folder, cases, rank, ranks)).read_text()) for rank in range(ranks)]


def _difference(ours: dict, theirs: dict) -> float:
    """The largest relative difference of two curves' losses, and of the weights' mean size."""
    assert len(ours["curve"]) == len(theirs["curve"]) > 0
    pairs = [(row[name], other[name]) for row, other in zip(ours["curve"], theirs["curve"]) for name in other if name.endswith("loss")]
    return max(abs(mine - other) / abs(other) for mine, other in [*pairs, (ours["size"], theirs["size"])])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("sharding")
    _dataset(made)
    return made


@pytest.fixture(scope="module")
def kept() -> int:
    return random.SystemRandom().randrange(1, 7)


@pytest.fixture(scope="module")
def two(folder, kept) -> list[dict]:
    return _launched(folder, 2, CASES, kept)


@pytest.mark.parametrize("case", SHARDED)
def test_the_engine_is_the_one_asked_for_and_states_are_shared_out(two, case, figure):
    stage = 3 if case.endswith("zero3") else 2
    for rank, records in enumerate(two):
        seen = records[case]["whole"]
        figure(f"{case}: rank {rank} of 2 holds {seen['moments_held']:.3f} of the moments, {seen['weights_held']:.3f} of the weights")
        assert (seen["engine"], seen["stage"]) == ("DeepSpeedEngine", stage)
        assert seen["moments_held"] == pytest.approx(0.5, abs=0.02)
        assert seen["weights_held"] == (1 if stage == 2 else pytest.approx(0.5, abs=0.02))


@pytest.mark.parametrize("case", SHARDED)
def test_ranks_agree_and_resume(two, case, kept, figure):
    first, second = (records[case] for records in two)
    figure(f"{case}: resumed at step {kept} of 7")
    for part in ("curve", "weights"):
        assert first["whole"][part] == second["whole"][part]
        assert first["resumed"][part] == first["whole"][part]


@pytest.mark.parametrize("case", [case for case in SHARDED if case.startswith("dreambooth")])
def test_the_curve_is_ddps(two, case, figure):
    """Its noise hangs on the ranks, so the curve to compare with is that of as many ranks under DDP."""
    difference = _difference(two[0][case]["whole"], two[0][f"{case.rsplit(' ', 1)[0]} none"]["whole"])
    figure(f"{case}: {difference:.1e} from DDP's")
    assert difference < ALIKE


def test_a_classifier_on_two_ranks_has_the_curve_of_one_process(two, folder, figure):
    """Without batch norm, whose statistics are each rank's, nothing in it hangs on the ranks."""
    difference = _difference(two[0]["classifier zero2"]["whole"], _run(str(folder), "classifier", checkpoint.Silent(), {"model": LAYER_NORM}))
    figure(f"{difference:.1e} from one process's")
    assert difference < ALIKE


def _steep(model, batch, draw) -> torch.Tensor:
    """A loss of 0 whose gradient is no number."""
    answers = model(batch["image"])[:, 0]
    return (answers - answers.detach()).abs().sqrt()


def _one_rank(folder: str, cases: dict, kept: int) -> None:
    """A rank that is alone, and what it must refuse: case -> what was said."""
    _rank(folder, cases, kept)
    zero2, said = settings(sharding="zero2"), {}
    accelerator = world.accelerator("cpu", "no", zero2.sharding)
    accelerator.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage"] = 1
    with pytest.raises(RuntimeError) as error:
        dreambooth.train(pretraining.build(TINY), whole_batches, PRIORS, zero2, BATCHES_PER_EPOCH, accelerator, checkpoint.Silent())
    said["another stage"] = str(error.value)
    with pytest.raises(FloatingPointError) as error:
        _classifier(folder, checkpoint.Silent(), LAYER_NORM, "zero2", loss=_steep)
    said["no number"] = str(error.value)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    with pytest.raises(RuntimeError) as error:
        world.accelerator("cpu", "no", zero2.sharding)
    said["no DeepSpeed"] = str(error.value)
    with open(f"{folder}/said.json", "w") as out:
        json.dump(said, out)


def test_one_rank(folder, kept, two, figure):
    """A single rank has the curve of a process without DeepSpeed; what accelerate would do in silence is refused."""
    cases = {"alone zero2": CASES["dreambooth zero2"]}
    world.launch(1, _one_rank, str(folder), cases, kept)
    alone = json.loads(Path(_record(folder, cases, 0, 1)).read_text())["alone zero2"]
    assert alone["whole"]["engine"] == "DeepSpeedEngine" and alone["resumed"]["curve"] == alone["whole"]["curve"]
    difference = _difference(alone["whole"], _run(str(folder), "dreambooth", checkpoint.Silent(), {}))
    figure(f"{difference:.1e} from the curve without DeepSpeed")
    assert difference < ALIKE
    said = json.loads((folder / "said.json").read_text())
    assert "ZeRO stage 2 was asked for, accelerate prepared DeepSpeedEngine of stage 1" in said["another stage"]
    assert "gradient is no longer a number" in said["no number"]
    assert "unset ACCELERATE_USE_CPU (it is true)" in said["no DeepSpeed"]


def test_an_accelerator_that_does_not_shard_is_refused(folder):
    with pytest.raises(RuntimeError, match="ZeRO stage 2 was asked for, but accelerate prepares NO"):
        dreambooth.train(
            pretraining.build(TINY), whole_batches, PRIORS, settings(sharding="zero2"), BATCHES_PER_EPOCH, Accelerator(cpu=True), checkpoint.Silent()
        )
    with pytest.raises(RuntimeError, match="needs a launched rank"):
        world.accelerator("cpu", "no", settings(sharding="zero2").sharding)


def test_the_setting_is_a_name_or_a_file_whose_content_counts(tmp_path):
    read = lambda value: DreamBooth(sharding=value).sharding  # noqa: E731
    assert read("none") is None and read(None) is None
    for name in ("zero2", "zero3", "zero2_offload", "zero3_offload"):
        content = json.loads((CONFIGS / "deepspeed" / f"{name}.json").read_text())
        assert read(name) == content == read(content) and content["zero_optimization"]["stage"] == int(name[4])
    own = tmp_path / "mine.json"
    own.write_text(json.dumps({"train_batch_size": "auto", "fp16": {"enabled": "auto"}, **IN_PIECES}))
    assert read(str(own)) == IN_PIECES == Classifier(sharding=str(own)).sharding


def test_a_setting_that_cannot_be_is_explained(tmp_path):
    def refused(*overrides: str) -> str:
        with pytest.raises(config.ConfigError) as error:
            config.load("debug/demo", list(overrides))
        return str(error.value)

    def own(content: dict) -> str:
        (tmp_path / "mine.json").write_text(json.dumps(content))
        return refused(f"classifier.sharding={tmp_path / 'mine.json'}")

    assert "dreambooth.sharding = 'zero4': none, zero2, zero2_offload, zero3, zero3_offload, or" in refused("dreambooth.sharding=zero4")
    assert "stage 2 or 3" in own({"zero_optimization": {"stage": 1}})
    assert "gradient_clipping is said by this section's own settings" in own({**IN_PIECES, "gradient_clipping": 0})
    assert "bf16 is said by this section's own settings" in own({**IN_PIECES, "bf16": {"enabled": True}})
    assert "goes by a language model's width" in own({"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}})
    assert "nvme is not supported" in own({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}})
    assert "adamw_8bit" in refused("dreambooth.sharding=zero2", "dreambooth.optimizer=adamw_8bit")
    assert "take bf16 or no" in refused("classifier.sharding=zero2", "classifier.mixed_precision=fp16")


@pytest.mark.slow
def test_every_means_under_every_sharding(folder, kept, figure):
    first, second = _launched(folder, 2, SLOW, kept)
    for case in (case for case in SLOW if not case.endswith("none")):
        ours, base = first[case], first[f"{case.rsplit(' ', 1)[0]} none"]["whole"]
        difference = _difference(ours["whole"], base)
        figure(f"{case}: {difference:.1e} from DDP's, resumed at step {kept}")
        assert ours["whole"]["engine"] == "DeepSpeedEngine" and difference < (0.01 if "bf16" in case else ALIKE)
        assert ours["resumed"]["curve"] == ours["whole"]["curve"] and ours["resumed"]["weights"] == ours["whole"]["weights"]
        assert second[case]["whole"]["weights"] == ours["whole"]["weights"]


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "sharding"), [(2, "none"), (2, "zero2"), (2, "zero3"), (1, "zero2")])
def test_a_run_of_several_ranks_resumes_after_a_kill(ranks, sharding, tmp_path):
    """The debug run, killed in the middle of DreamBooth and of the classifier, then finished by the same command."""
    few = ["arms=[real]", "generation.quota=1", "generation.max_rounds=1", "generation.unit_images=2", "generation.batch=2", "generation.steps=1",
           "dreambooth.steps=6", "priors.images=3", "priors.steps=1", "labeller.steps=0", "execution.checkpoint_steps=2"]  # fmt: skip
    overrides = [*few, *(f"{section}.{key}" for section in ("dreambooth", "classifier") for key in (f"sharding={sharding}", f"ranks={ranks}"))]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    for stage in ("dreambooth", "train"):
        printed = vhs("run", "debug/demo", *overrides, "--out", killed, environment={"VHS_CRASH_AT": "training-step:5"}, code=1)
        assert stage in printed and list(killed.glob("checkpoints/*/*.pt")), printed
    for run in (killed, whole):
        vhs("run", "debug/demo", *overrides, "--out", run)
    ours, theirs = committed(killed), committed(whole)
    assert len(theirs) > 0 and {name for name in theirs if ours[name] != theirs[name]} == set()
