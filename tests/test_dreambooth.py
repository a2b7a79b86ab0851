import copy
import importlib.util
import itertools
import random

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from vhs import diffusion, dreambooth, pretraining
from vhs.checkpoint import Silent, load, save
from vhs.sampling import sample
from vhs.settings import DreamBooth, Generation, Pretraining
from vhs.trainable import build_optimizer

TINY = Pretraining(resolution_px=32, codec_channels=(8, 8, 16), unet_channels=(8, 16), text_width=32, text_layers=1)
IMAGES = np.random.default_rng(0).integers(0, 256, (10, 1, 32, 32), dtype=np.uint8)
PRIORS = np.random.default_rng(1).integers(0, 256, (6, 32, 32), dtype=np.uint8), ["photo of large dog heart"] * 6
BATCH, BATCHES_PER_EPOCH = 4, 3


def settings(**changes):
    return DreamBooth(**{"steps": 7, "batch": BATCH, "learning_rate": 1e-3, **changes})


def batches(epoch, start):
    """10 images in batches of 4, the last one partial, another order each epoch."""
    order = np.random.default_rng(epoch).permutation(len(IMAGES))
    for rows in itertools.islice(np.array_split(order, [4, 8]), start, None):
        n = len(rows)
        images, keys = torch.from_numpy(IMAGES[rows]), [f"key-{row}" for row in rows]
        yield {"image": images, "key": keys, "prompt": ["photo of sks large dog heart"] * n, "weight": torch.ones(n), "total": n}


class Recorder(Silent):
    """Keeps metrics, one captured state, and may pull the plug."""

    def __init__(self, state=None, keep_at=None, die_at=None):
        self.state, self.keep_at, self.die_at, self.metrics, self.kept = state, keep_at, die_at, [], None

    def resume(self):
        return self.state

    def step(self, step, total, metrics, capture):
        self.metrics.append(metrics)
        if step == self.keep_at:
            self.kept = capture()
        if step == self.die_at:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def base():
    return pretraining.build(TINY)


def train(base, progress=None, priors=PRIORS, batches=batches, show=(), **changes):
    progress = progress or Recorder()
    parts = copy.deepcopy(base)
    progress.curve = dreambooth.train(
        parts, batches, priors, settings(**changes), BATCHES_PER_EPOCH, Accelerator(cpu=True), progress, *show
    )
    return parts, progress


def weights(parts, name="unet"):
    return torch.cat([value.flatten().double() for value in getattr(parts, name).state_dict().values()])


MEANS = {
    "whole": {},
    "lora": {"lora_rank": 2},
    "average": {"ema_decay": 0.9},
    "accumulation": {"gradient_accumulation": 2},
    "checkpointing": {"gradient_checkpointing": True},
    "text encoder": {"train_text_encoder": True},
    "all": {"lora_rank": 2, "ema_decay": 0.9, "gradient_accumulation": 2, "gradient_checkpointing": True, "train_text_encoder": True},
}


@pytest.mark.parametrize("means", MEANS)
def test_resumed_at_a_random_step_gives_the_same_curve_and_weights(base, tmp_path, means, figure):
    kept = random.SystemRandom().randrange(1, 7)
    figure(f"{means}: resumed at step {kept} of 7")
    whole, record = train(base, **MEANS[means])
    killed = Recorder(keep_at=kept, die_at=min(kept + 1, 7))
    with pytest.raises(KeyboardInterrupt):
        train(base, killed, **MEANS[means])
    save(killed.kept, tmp_path / "state.pt")
    resumed, second = train(base, Recorder(state=load(tmp_path / "state.pt")), **MEANS[means])
    assert second.metrics == record.metrics[kept:] and second.curve.rows == record.curve.rows and len(record.curve.rows) == 7
    for name in base.networks:
        assert torch.equal(weights(whole, name), weights(resumed, name))


def test_sampling_while_training_changes_nothing(base):
    """Neither the random numbers nor the weights; and what is shown is what would leave, with the average's weights."""
    seen = {}

    def show(step, model):
        seen[step] = sample(model, ["photo of sks large dog heart"] * 2, [1, 2], 32, Generation(steps=2))

    everything = MEANS["all"]
    looked, record = train(base, show=(show, 3), **everything)
    plain, undisturbed = train(base, **everything)
    assert list(seen) == [3, 6] and record.metrics == undisturbed.metrics
    for name in base.networks:
        assert torch.equal(weights(looked, name), weights(plain, name))
    last, _ = train(base, show=(show, 7), **{**everything, "lora_rank": 0})
    assert np.array_equal(seen[7], sample(last, ["photo of sks large dog heart"] * 2, [1, 2], 32, Generation(steps=2)))


def test_means_that_save_memory_or_time_change_no_result(base):
    plain, _ = train(base)
    for means in ({"gradient_checkpointing": True}, {"cache_latents": False}):
        assert torch.equal(weights(train(base, **means)[0]), weights(plain))


def test_adapters_are_merged_and_a_plain_diffusers_folder_is_left(base, tmp_path):
    adapted, _ = train(base, lora_rank=2, train_text_encoder=True)
    changed = {}
    for name in ("unet", "text_encoder"):
        before, after = getattr(base, name).state_dict(), getattr(adapted, name).state_dict()
        assert before.keys() == after.keys()
        changed[name] = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed["unet"] and all(key.rsplit(".", 1)[0].endswith(("to_q", "to_k", "to_v", "to_out.0")) for key in changed["unet"])
    assert changed["text_encoder"] and all("_proj" in key for key in changed["text_encoder"])
    ranks = [
        torch.linalg.matrix_rank(adapted.unet.state_dict()[key] - base.unet.state_dict()[key], rtol=1e-3).item() for key in changed["unet"]
    ]
    assert max(ranks) <= 2
    for name, parts in (("adapted", adapted), ("base", base)):
        diffusion.save(parts, tmp_path / name)
    files = [{file.relative_to(tmp_path / name) for file in (tmp_path / name).rglob("*")} for name in ("adapted", "base")]
    assert files[0] == files[1]
    assert torch.equal(weights(diffusion.load(tmp_path / "adapted")), weights(adapted).half().double())


def test_two_batches_of_a_step_weigh_as_one(base):
    """The gradient of accumulated batches is their mean: after one step of AdamW the weights are those of the mean's sign."""
    seen = []

    def spied(epoch, start):
        for number, batch in enumerate(batches(epoch, start), start):
            seen.append((epoch, number))
            yield batch

    _, record = train(base, batches=spied, gradient_accumulation=2, steps=4)
    assert seen == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1)]
    _, single = train(base, steps=1)
    parts = diffusion.Components(**vars(copy.deepcopy(base)))
    losses_of = dreambooth._Losses(parts, PRIORS, settings(), Accelerator(cpu=True), lambda compute: compute())
    both = [losses_of(batch, number)[0].item() for number, batch in enumerate(itertools.islice(batches(0, 0), 2))]
    assert both[0] == pytest.approx(single.metrics[0]["instance_loss"], rel=1e-5)
    assert record.metrics[0]["instance_loss"] == pytest.approx(np.mean(both), rel=1e-5)


def test_eight_bit_adam_says_what_it_needs(base):
    with pytest.raises(ValueError, match="NVIDIA GPUs only and this is cpu: set dreambooth.optimizer=adamw"):
        train(base, optimizer="adamw_8bit")
    if importlib.util.find_spec("bitsandbytes") is None:
        with pytest.raises(ImportError, match=r"pip install 'vhs\[gpu\]'"):
            build_optimizer([torch.nn.Parameter(torch.zeros(2))], settings(optimizer="adamw_8bit"), torch.device("cuda"))


def test_only_what_is_trained_changes(base):
    for train_text_encoder, changing in ((False, {"unet"}), (True, {"unet", "text_encoder"})):
        parts, _ = train(base, train_text_encoder=train_text_encoder)
        assert {name for name in base.networks if not torch.equal(weights(parts, name), weights(base, name))} == changing


def test_prior_preservation_weighs_in(base):
    results = {share: train(base, prior_loss_weight=share) for share in (0.0, 1.0, 2.0)}
    assert len({float(weights(parts).sum()) for parts, _ in results.values()}) == 3
    first = {share: record.metrics[0] for share, (_, record) in results.items()}
    assert first[1.0] == first[2.0] and first[1.0]["prior_loss"] > 0 and first[0.0]["prior_loss"] == 0
    no_class_images = np.zeros((0, 32, 32), np.uint8), []
    train(base, priors=no_class_images, prior_loss_weight=0.0)
    with pytest.raises(ValueError, match="no class images.*prior_loss_weight to 0"):
        train(base, priors=no_class_images)


def test_padding_rows_change_nothing(base):
    def padded(epoch, start):
        for batch in batches(epoch, start):
            yield {**batch, "weight": torch.cat([batch["weight"][:-1], torch.zeros(1)]), "image": batch["image"].clone()}

    def other_padding(epoch, start):
        for batch in padded(epoch, start):
            batch["image"][-1] = 255 - batch["image"][-1]
            yield batch

    assert torch.equal(
        weights(train(base, batches=padded, cache_latents=False)[0]), weights(train(base, batches=other_padding, cache_latents=False)[0])
    )


def test_the_sum_over_ranks_of_weighted_losses_is_the_mean_of_the_global_batch(base):
    """Two half batches that know the global total add up to the whole batch's loss (the ranks' average times their number)."""
    parts, options = diffusion.Components(**vars(copy.deepcopy(base))), settings(prior_loss_weight=0.0, prompt_dropout=0.0)
    each = lambda latents, *_: latents.mean((1, 2, 3)) ** 2  # noqa: E731  noise differs between splits, so take a loss without any
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diffusion, "denoising_loss", lambda components, *rest: each(*rest))
        step_loss = dreambooth._Losses(parts, PRIORS, options, Accelerator(cpu=True), lambda compute: compute())
        batch = next(batches(0, 0))
        rows = ("image", "key", "prompt", "weight")
        halves = [batch | {name: batch[name][half] for name in rows} for half in (slice(0, 3), slice(3, 4))]
        torch.testing.assert_close(sum(step_loss(half, 0)[0] for half in halves), step_loss(batch, 0)[0])


def test_learning_rate_warms_up_and_falls():
    cosine = [dreambooth.learning_rate_at(step, settings(steps=100, warmup_steps=10, learning_rate=1.0)) for step in range(100)]
    assert cosine[0] == pytest.approx(0.1) and max(cosine) == cosine[10] == 1.0
    assert cosine[99] < 0.001 and cosine[10:] == sorted(cosine[10:], reverse=True)
    assert {dreambooth.learning_rate_at(step, settings(steps=100, schedule="constant", learning_rate=0.5)) for step in range(100)} == {0.5}


def test_bad_input_and_a_broken_loss_are_said(base):
    with pytest.raises(ValueError, match="6 images and 1 prompts"):
        train(base, priors=(PRIORS[0], ["one"]))
    with pytest.raises(ValueError, match="float32 weights, the UNet holds torch.float16"):
        half = copy.deepcopy(base)
        half.unet.half()
        train(half)
    with pytest.raises(FloatingPointError, match="no longer a number"):
        broken = copy.deepcopy(base)
        broken.unet.conv_in.weight.data.fill_(torch.nan)
        train(broken)
    with pytest.raises(ValueError, match="ended at batch 1 of 3: batches_per_epoch is wrong"):
        train(base, batches=lambda epoch, start: itertools.islice(batches(epoch, 0), start, 1))


def test_bfloat16_trains_float32_weights_and_leaves_a_plain_model(base):
    """Mixed precision must not stay on the networks afterwards: what is saved and sampled is the model alone."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    try:
        accelerator = Accelerator(cpu=True, mixed_precision="bf16")
        parts = copy.deepcopy(base)
        dreambooth.train(parts, batches, PRIORS, settings(steps=2), BATCHES_PER_EPOCH, accelerator, Recorder())
    finally:
        AcceleratorState._reset_state()
    assert parts.unet.dtype == torch.float32 and not torch.equal(weights(parts), weights(base))
    plain = copy.deepcopy(base.unet)
    plain.load_state_dict(parts.unet.state_dict())
    latents, context = torch.ones(1, 4, 8, 8), diffusion.embed(base, ["photo of large dog heart"])
    with torch.no_grad():
        assert torch.equal(parts.unet(latents, 5, context).sample, plain(latents, 5, context).sample)
