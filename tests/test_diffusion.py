import copy
import hashlib
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st

from vhs import diffusion, pretraining
from vhs.settings import Pretraining

TINY = Pretraining(resolution_px=32, codec_channels=(8, 8, 16), unet_channels=(8, 16), text_width=32, text_layers=1)


@pytest.fixture(scope="module")
def tiny():
    return pretraining.build(TINY)


def digests(folder):
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.rglob("*") if file.is_file()}


def test_load_gives_back_what_save_wrote(tiny, tmp_path):
    diffusion.save(tiny, tmp_path / "a", dtype=torch.float32)
    again = diffusion.load(tmp_path / "a")
    for name in tiny.networks:
        before, after = tiny.networks[name].state_dict(), again.networks[name].state_dict()
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
        assert not again.networks[name].training
    assert again.scheduler.config.prediction_type == "v_prediction"
    text = ["photo of sks large dog heart", ""]
    assert torch.equal(diffusion.tokenize(tiny, text), diffusion.tokenize(again, text))


def test_the_same_weights_make_the_same_bytes_wherever_they_came_from(tiny, tmp_path):
    diffusion.tokenize(tiny, ["a use leaves no trace in the folder"])
    diffusion.save(tiny, tmp_path / "a")
    diffusion.save(diffusion.load(tmp_path / "a"), tmp_path / "b")
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert str(tmp_path) not in "".join(file.read_text() for file in (tmp_path / "b").rglob("*.json"))


def test_a_folder_that_is_no_model_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="model_index.json"):
        diffusion.load(tmp_path)


@pytest.mark.parametrize(
    ("file", "said", "match"),
    [
        ("unet/config.json", {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 80}, "text_time"),
        ("unet/config.json", {"in_channels": 9}, "takes 9 channels for 4"),
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "prediction_type 'sample'"),
        ("model_index.json", {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}, "it has a text_encoder_2"),
        ("model_index.json", {"_class_name": "StableDiffusionXLPipeline"}, "is a StableDiffusionXLPipeline"),
    ],
)
def test_a_model_of_another_kind_is_refused_before_its_weights_are_read(tiny, tmp_path, file, said, match):
    diffusion.save(tiny, tmp_path)
    path = tmp_path / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **said}))
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"not asked for")
    with pytest.raises(ValueError, match=f"{match}.*legal is .* epsilon or v_prediction"):
        diffusion.load(tmp_path)


def test_stable_diffusion_pipeline_opens_the_folder_and_draws(tiny, tmp_path):
    from diffusers import StableDiffusionPipeline

    diffusion.save(tiny, tmp_path)
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("photo of large human heart", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    assert image.size == (32, 32) and pipeline.safety_checker is None
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["vae"] == ["diffusers", "AutoencoderKL"]


def test_images_become_scaled_posterior_means_and_come_back_as_uint8(tiny):
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 1, 32, 32), dtype=np.uint8))
    latents = diffusion.encode_images(tiny, images)
    assert latents.shape == (2, 4, 8, 8)
    assert torch.equal(latents, diffusion.encode_images(tiny, images)), "the posterior's mean, not a draw"
    decoded = diffusion.decode_latents(tiny, latents)
    assert decoded.shape == (2, 32, 32) and decoded.dtype == np.uint8
    doubled = replace(tiny, vae=copy.deepcopy(tiny.vae))
    doubled.vae.register_to_config(scaling_factor=2.0)
    assert torch.equal(diffusion.encode_images(doubled, images), 2 * latents)
    assert np.array_equal(diffusion.decode_latents(doubled, 2 * latents), decoded)


def test_what_the_codec_cannot_take_is_an_error(tiny):
    with pytest.raises(ValueError, match="multiples of 4"):
        diffusion.encode_images(tiny, torch.zeros(1, 1, 30, 30, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"uint8 images \[N,1,S,S\], got torch.float32"):
        diffusion.encode_images(tiny, torch.zeros(1, 1, 32, 32))
    with pytest.raises(FloatingPointError, match="NaN"):
        diffusion.decode_latents(tiny, torch.full((1, 4, 8, 8), torch.nan))


class Oracle:
    """A UNet that knows the clean latents and the noise, so it predicts what is asked of it (off by `error`)."""

    def __init__(self, scheduler, clean, noise, error=0.0):
        self.scheduler, self.clean, self.noise, self.error = scheduler, clean, noise, error

    def __call__(self, noisy, timesteps, embeddings):
        velocity = self.scheduler.config.prediction_type == "v_prediction"
        answer = self.scheduler.get_velocity(self.clean, self.noise, timesteps) if velocity else self.noise
        return SimpleNamespace(sample=answer + self.error)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@given(seed=st.integers(0, 2**32 - 1))
def test_a_perfect_predictor_has_no_loss_and_an_error_costs_its_square(prediction_type, tiny, seed):
    draw = torch.Generator().manual_seed(seed)
    clean, noise = torch.randn(3, 4, 8, 8, generator=draw), torch.randn(3, 4, 8, 8, generator=draw)
    timesteps = torch.randint(1000, (3,), generator=draw)
    scheduler = DDPMScheduler.from_config(tiny.scheduler.config, prediction_type=prediction_type)
    loss = lambda error, gamma: diffusion.denoising_loss(  # noqa: E731
        replace(tiny, scheduler=scheduler, unet=Oracle(scheduler, clean, noise, error)), clean, None, noise, timesteps, gamma
    )
    assert torch.equal(loss(0.0, None), torch.zeros(3))
    torch.testing.assert_close(loss(0.5, None), torch.full((3,), 0.25))
    snr = scheduler.alphas_cumprod[timesteps] / (1 - scheduler.alphas_cumprod[timesteps])
    expected = snr.clamp(max=5) / (snr if prediction_type == "epsilon" else snr + 1)
    torch.testing.assert_close(loss(0.5, 5.0), 0.25 * expected)


def test_an_unknown_prediction_type_is_refused(tiny):
    scheduler = DDPMScheduler.from_config(tiny.scheduler.config, prediction_type="sample")
    z = torch.zeros(1, 4, 8, 8)
    with pytest.raises(ValueError, match="'sample'.*epsilon.*v_prediction"):
        diffusion.denoising_loss(replace(tiny, scheduler=scheduler), z, None, z, torch.zeros(1, dtype=torch.int64))


def test_the_embedded_tokenizer_keeps_its_words_whole_and_spells_any_other(tiny):
    words = tiny.tokenizer.tokenize("photo of large human heart Cardiovascular Thoracic radiograph x-ray")
    assert [word.removesuffix("</w>") for word in words] == "photo of large human heart cardiovascular thoracic radiograph x - ray".split()
    assert tiny.tokenizer.decode(tiny.tokenizer("größe sks").input_ids, skip_special_tokens=True) == "größe sks"
