from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from vhs import diffusion, pretraining, sampling
from vhs.settings import Generation, Pretraining

TINY = Pretraining(resolution_px=32, codec_channels=(8, 8, 16), unet_channels=(8, 16), text_width=32, text_layers=1)
PROMPTS = ["photo of small dog heart", "photo of normal dog heart", "photo of large dog heart", "photo of large human heart"]
SOLVERS = ("dpm++", "sde-dpm++", "pndm")


@pytest.fixture(scope="module")
def tiny():
    parts = pretraining.build(TINY)
    with torch.no_grad():  # an untrained UNet answers almost nothing to its prompt: let it
        for parameter in parts.unet.parameters():
            parameter.mul_(1.5)
    return parts


def drawn(tiny, prompts=PROMPTS, seeds=(1, 2, 3, 4), size_px=32, **settings):
    return sampling.sample(tiny, list(prompts), list(seeds), size_px, Generation(steps=4, **settings))


def difference(a, b):
    return np.abs(a.astype(int) - b).mean()


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_batch_repeats_to_the_bit(tiny, solver):
    first = drawn(tiny, solver=solver)
    assert first.shape == (4, 32, 32) and first.dtype == np.uint8 and first.std() > 1
    assert np.array_equal(first, drawn(tiny, solver=solver))


@pytest.mark.parametrize("solver", SOLVERS)
def test_an_image_depends_on_its_own_seed_and_prompt_not_on_its_neighbours(tiny, solver):
    batch = drawn(tiny, solver=solver)
    other = drawn(tiny, PROMPTS[:1] + PROMPTS[3:0:-1], (1, 30, 20, 10), solver=solver)
    assert difference(batch[0], other[0]) < 0.1 and difference(batch[1], other[1]) > 1
    assert difference(batch[:1], drawn(tiny, PROMPTS[:1], (1,), solver=solver)) < 0.1, "alone as in a batch"


def test_each_solver_draws_pictures_of_its_own(tiny):
    pictures = [drawn(tiny, solver=solver) for solver in SOLVERS]
    assert all(difference(a, b) > 0.5 for a, b in zip(pictures, pictures[1:] + pictures[:1]))


def test_guidance_one_takes_half_the_passes_and_guidance_matters(tiny, monkeypatch):
    sizes, forward = [], tiny.unet.forward
    monkeypatch.setattr(tiny.unet, "forward", lambda x, *rest, **named: sizes.append(len(x)) or forward(x, *rest, **named))
    plain = drawn(tiny, guidance=1.0)
    assert sizes == [4] * 4
    sizes.clear()
    guided = drawn(tiny, guidance=4.0)
    assert sizes == [8] * 4 and not np.array_equal(plain, guided)


def test_guidance_is_free_plus_scale_times_the_difference(tiny):
    """With an empty prompt both passes say the same, so any guidance draws the unguided image."""
    plain = drawn(tiny, [""] * 4, guidance=1.0)
    assert difference(plain, drawn(tiny, [""] * 4, guidance=7.5)) < 0.1


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_perfect_denoiser_leads_any_solver_to_its_image(tiny, solver, prediction_type, monkeypatch):
    """A model that knows one image: every solver must end there, which holds only if noise levels, spacing and prediction type agree."""
    clean = torch.linspace(-2, 2, 256).reshape(1, 4, 8, 8)
    scheduler = DDPMScheduler.from_config(tiny.scheduler.config, prediction_type=prediction_type)

    def oracle(x, timestep, *_, **__):
        signal = scheduler.alphas_cumprod[int(timestep)]
        noise = (x - signal.sqrt() * clean) / (1 - signal).sqrt()
        return SimpleNamespace(sample=noise if prediction_type == "epsilon" else signal.sqrt() * noise - (1 - signal).sqrt() * clean)

    monkeypatch.setattr(tiny.unet, "forward", oracle)
    monkeypatch.setattr(diffusion, "decode_latents", lambda components, latents: latents)
    settings = Generation(steps=20, guidance=1.0, solver=solver)
    latents = sampling.sample(replace(tiny, scheduler=scheduler), [""] * 2, [5, 6], 32, settings)
    assert (latents - clean).square().mean().sqrt() < 0.05  # SD's PNDM stops at the lowest noise level, 0.03, not at none


def test_sizes_other_than_the_trained_one_and_illegal_calls(tiny):
    assert drawn(tiny, PROMPTS[:1], (1,), size_px=48).shape == (1, 48, 48)
    with pytest.raises(ValueError, match="size_px = 30.*multiple of 4"):
        drawn(tiny, size_px=30)
    with pytest.raises(ValueError, match="4 prompts and 3 seeds"):
        drawn(tiny, seeds=(1, 2, 3))
