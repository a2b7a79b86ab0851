import copy
import itertools

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from vhs import diffusion, dreambooth, pretraining
from vhs.checkpoint import Silent, load, save
from vhs.settings import DreamBooth, Pretraining

TINY = Pretraining(resolution_px=32, codec_channels=(8, 8, 16), unet_channels=(8, 16), text_width=32, text_layers=1)
IMAGES = np.random.default_rng(0).integers(0, 256, (10, 1, 32, 32), dtype=np.uint8)
PRIORS = np.random.default_rng(1).integers(0, 256, (6, 32, 32), dtype=np.uint8), ["photo of large dog heart"] * 6
BATCH, STEPS_PER_EPOCH = 4, 3


def settings(**changes):
    return DreamBooth(**{"steps": 7, "batch": BATCH, "learning_rate": 1e-3, **changes})


def batches(epoch, start):
    """10 images in batches of 4, the last one partial, another order each epoch."""
    order = np.random.default_rng(epoch).permutation(len(IMAGES))
    for rows in itertools.islice(np.array_split(order, [4, 8]), start, None):
        n = len(rows)
        yield {"image": torch.from_numpy(IMAGES[rows]), "prompt": ["photo of sks large dog heart"] * n, "weight": torch.ones(n), "total": n}


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


def train(base, progress=None, priors=PRIORS, batches=batches, **changes):
    progress = progress or Recorder()
    parts = dreambooth.train(copy.deepcopy(base), batches, priors, settings(**changes), STEPS_PER_EPOCH, Accelerator(cpu=True), progress)
    return parts, progress


def weights(parts, name="unet"):
    return torch.cat([value.flatten().double() for value in getattr(parts, name).state_dict().values()])


@pytest.mark.parametrize("train_text_encoder", [False, True])
def test_a_killed_run_resumes_to_the_bit(base, tmp_path, train_text_encoder):
    whole, record = train(base, train_text_encoder=train_text_encoder)
    killed = Recorder(keep_at=4, die_at=5)
    with pytest.raises(KeyboardInterrupt):
        train(base, killed, train_text_encoder=train_text_encoder)
    save(killed.kept, tmp_path / "state.pt")
    resumed, second = train(base, Recorder(state=load(tmp_path / "state.pt")), train_text_encoder=train_text_encoder)
    assert second.metrics == record.metrics[4:]
    for name in base.networks:
        assert torch.equal(weights(whole, name), weights(resumed, name))


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

    assert torch.equal(weights(train(base, batches=padded)[0]), weights(train(base, batches=other_padding)[0]))


def test_the_sum_over_ranks_of_weighted_losses_is_the_mean_of_the_global_batch(base):
    """Two half batches that know the global total add up to the whole batch's loss (the ranks' average times their number)."""
    parts, options = diffusion.Components(**vars(copy.deepcopy(base))), settings(prior_loss_weight=0.0, prompt_dropout=0.0)
    each = lambda latents, *_: latents.mean((1, 2, 3)) ** 2  # noqa: E731  noise differs between splits, so take a loss without any
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diffusion, "denoising_loss", lambda components, *rest: each(*rest))
        step_loss = dreambooth._StepLosses(parts, PRIORS, options, Accelerator(cpu=True))
        batch = next(batches(0, 0))
        rows = ("image", "prompt", "weight")
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
    with pytest.raises(ValueError, match="ended at batch 1 of 3: steps_per_epoch is wrong"):
        train(base, batches=lambda epoch, start: itertools.islice(batches(epoch, 0), start, 1))


def test_bfloat16_trains_float32_weights_and_leaves_a_plain_model(base):
    """Mixed precision must not stay on the networks afterwards: what is saved and sampled is the model alone."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    try:
        accelerator = Accelerator(cpu=True, mixed_precision="bf16")
        parts = dreambooth.train(copy.deepcopy(base), batches, PRIORS, settings(steps=2), STEPS_PER_EPOCH, accelerator, Recorder())
    finally:
        AcceleratorState._reset_state()
    assert parts.unet.dtype == torch.float32 and not torch.equal(weights(parts), weights(base))
    plain = copy.deepcopy(base.unet)
    plain.load_state_dict(parts.unet.state_dict())
    latents, context = torch.ones(1, 4, 8, 8), diffusion.embed(base, ["photo of large dog heart"])
    with torch.no_grad():
        assert torch.equal(parts.unet(latents, 5, context).sample, plain(latents, 5, context).sample)
