import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from jobs import pretrain as command
from jobs.config import ConfigError
from vhs import diffusion, phantom, pretraining
from vhs.checkpoint import Silent
from vhs.labelling import Labeller
from vhs.settings import Pretraining

TINY = Pretraining(
    resolution_px=32, codec_channels=(8, 8, 8, 8), unet_channels=(8, 16), text_width=32, text_layers=1, phantoms_per_view=16,
    codec_steps=6, codec_batch=4, codec_crop_px=32, steps=6, adapt_steps=2, batch=4, labeller_steps=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def images():
    return phantom.draw_many("canine_lateral", "textbook", range(24), 64)[0]


class Recorder(Silent):
    def __init__(self, state=None, die_at=None):
        self.state, self.die_at, self.metrics, self.kept = state, die_at, [], None

    def resume(self):
        return self.state

    def step(self, step, total, metrics, capture):
        self.metrics.append(metrics)
        if step == self.die_at:
            self.kept = capture()
            raise KeyboardInterrupt


def test_the_basis_gives_unit_variance_and_more_components_lose_less(images, monkeypatch):
    pixels = torch.from_numpy(images)[:, None] / 127.5 - 1
    errors = []
    for channels in (1, 4, 64):
        monkeypatch.setattr(pretraining, "LATENT_CHANNELS", channels)
        basis = pretraining.PatchBasis.fit(images, 8)
        latents = basis.encode(pixels)
        assert latents.shape == (24, channels, 8, 8)
        torch.testing.assert_close(latents.square().mean((0, 2, 3)), torch.ones(channels), rtol=1e-2, atol=1e-2)
        errors.append((basis.decode(latents) - pixels).square().mean().item())
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-8


def test_crops_are_a_function_of_the_step_and_whole_at_the_end(images):
    settings = Pretraining(resolution_px=64, codec_crop_px=32, codec_batch=16, codec_steps=10)
    early, late = pretraining.crops(images, 3, settings), pretraining.crops(images, 9, settings)
    assert early.shape == (16, 1, 32, 32) and late.shape == (4, 1, 64, 64)
    assert torch.equal(early, pretraining.crops(images, 3, settings)) and not torch.equal(early, pretraining.crops(images, 4, settings))
    assert early.min() >= -1 and early.max() <= 1 and early.dtype == torch.float32


def test_a_killed_stage_resumes_to_the_bit(images):
    basis = pretraining.PatchBasis.fit(images, 8)

    def run(progress):
        components = pretraining.build(TINY)
        pretraining.train_codec(components, images[:, :32, :32], basis, TINY, Accelerator(cpu=True), progress)
        latents = basis.encode(torch.from_numpy(images)[:, None, :32, :32] / 127.5 - 1)
        return components, latents

    whole, latents = run(record := Recorder())
    killed = Recorder(die_at=4)
    with pytest.raises(KeyboardInterrupt):
        run(killed)
    again, _ = run(second := Recorder(state=killed.kept))
    assert second.metrics == record.metrics[4:]
    assert all(torch.equal(a, b) for a, b in zip(whole.vae.state_dict().values(), again.vae.state_dict().values(), strict=True))
    names = [("canine_lateral", "small")] * len(latents)
    before = whole.unet.conv_out.weight.clone()
    pretraining.train_denoiser(whole, latents, names, TINY, 3, Accelerator(cpu=True), Silent())
    assert not torch.equal(before, whole.unet.conv_out.weight)


def test_the_untrained_text_encoder_tells_sizes_and_subjects_apart():
    """Angles between outputs at the word that differs: the denoiser can only follow a prompt it can tell from another."""
    components = pretraining.build(Pretraining())
    prompts = [f"photo of {size} {subject} heart" for subject in ("dog", "human") for size in ("small", "normal", "large")]
    with torch.no_grad():
        outputs = torch.nn.functional.normalize(diffusion.embed(components, prompts), dim=-1)
    sizes, subjects = outputs[:3, 3] @ outputs[:3, 3].T, outputs[::3, 4] @ outputs[::3, 4].T
    for cosines in (sizes, subjects):
        assert (cosines - torch.eye(len(cosines))).abs().max() < 0.7


def test_initial_weights_are_a_function_of_the_seed_and_leave_the_global_stream_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, second = pretraining.build(TINY), pretraining.build(TINY)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first.unet.conv_in.weight, second.unet.conv_in.weight)
    assert not torch.equal(first.unet.conv_in.weight, pretraining.build(TINY.model_copy(update={"seed": 1})).unet.conv_in.weight)


def test_psnr_of_a_known_error():
    images = np.full((2, 8, 8), 100, np.uint8)
    assert pretraining.psnr_db(images, images + 1) == pytest.approx(20 * np.log10(255))


def test_the_command_trains_a_folder_resumes_it_and_refuses_other_values(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "HELD_OUT", 8)
    monkeypatch.setattr(command, "judge", lambda settings, out, components: {})
    config = tmp_path / "tiny.yaml"
    config.write_text(json.dumps(TINY.model_dump(mode="json")))  # YAML reads JSON
    command.pretrain(config, tmp_path / "out")
    for view in TINY.views:
        labeller = Labeller.load(tmp_path / "out" / "labeller" / view)
        assert (labeller.view.name, labeller.size_px) == (view, TINY.resolution_px) and labeller.thresholds is not None
    first = diffusion.load(tmp_path / "out").unet.conv_in.weight
    command.pretrain(config, tmp_path / "out")
    assert torch.equal(first, diffusion.load(tmp_path / "out").unet.conv_in.weight)
    with pytest.raises(ConfigError, match="other values of batch"):
        command.pretrain(config, tmp_path / "out", overrides=["batch=8"])
    command.pretrain(config, tmp_path / "next", init=str(tmp_path / "out"), overrides=["codec_steps=0", "steps=0", "adapt_steps=0", "labeller_steps=0"])
    assert torch.equal(first, diffusion.load(tmp_path / "next").unet.conv_in.weight)


def test_going_on_from_a_base_goes_on_with_the_labellers_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "HELD_OUT", 8)
    monkeypatch.setattr(command, "judge", lambda settings, out, components: {})
    config, still = tmp_path / "tiny.yaml", ["codec_steps=0", "steps=0", "adapt_steps=0", "views=[canine_lateral]"]
    config.write_text(json.dumps(TINY.model_dump(mode="json")))
    folders = {"begun": None, "afresh": None, "on": str(tmp_path / "begun")}
    for name, init in folders.items():
        rate = [] if name == "begun" else ["labeller_learning_rate=1e-12"]  # so small that the weights show where they came from
        command.pretrain(config, tmp_path / name, init=init, overrides=[*still, *rate])
    begun, afresh, on = (Labeller.load(tmp_path / name / "labeller" / "canine_lateral").net.state_dict() for name in folders)
    weights = [name for name in begun if name.endswith("weight")]
    assert weights and all(torch.equal(begun[name], on[name]) for name in weights)
    assert not all(torch.equal(begun[name], afresh[name]) for name in weights)


def test_judging_counts_how_often_the_drawn_heart_has_the_prompted_size(tmp_path, monkeypatch):
    class Reader:
        """Reads 9 from everything: always right about normal, wrong about the others."""

        def measure(self, images, keys, passes):
            assert len(images) == len(set(keys)) and images.dtype == np.uint8
            return SimpleNamespace(index=np.full(len(images), 9.0))

    monkeypatch.setattr(command, "HELD_OUT", 8)
    monkeypatch.setattr(command, "DRAWN_PER_CLASS", 16)
    monkeypatch.setattr(command, "_labeller", lambda view, init: Reader())
    (tmp_path / "training").mkdir()
    settings = TINY.model_copy(update={"views": ("canine_lateral",)})
    figures = command.judge(settings, tmp_path, pretraining.build(settings), guidances=(1.0,))["canine_lateral"]
    assert figures["guidance_1.0"] == {"class_agreement": pytest.approx(1 / 3), "by_class": [0, 1, 0], "mean_index": [9, 9, 9]}
    assert 0 < figures["psnr_db"] < 30 and figures["index_error_phantoms"] == figures["index_error_reconstructions"] > 0
    assert {file.name for file in (tmp_path / "training").glob("*.png")} == {"codec_canine_lateral.png", "drawn_canine_lateral_1.0.png"}
