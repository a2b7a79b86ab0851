"""A DreamBooth step at the size of Stable Diffusion 1.5, in a process of its own so that its peak of memory can be read. Minutes, so `slow`.

The weights are random: what is shown is that the loop carries the size and what it costs, not what it learns.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

LIMIT_GIB = 12


@pytest.mark.slow
def test_a_lora_step_at_512_px_stays_within_12_gib(figure):
    process = subprocess.run(
        [sys.executable, __file__], cwd=Path(__file__).resolve().parents[1], capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr[-3000:]
    said = json.loads(process.stdout.splitlines()[-1])
    figure(
        f"SD 1.5 size, 512 px, LoRA 16, checkpointing: peak {said['peak_gib']:.2f} GiB, {said['trained'] / 1e6:.1f} M of {said['all'] / 1e6:.0f} M"
    )
    assert said["peak_gib"] <= LIMIT_GIB and said["loss"] > 0 and said["changed"]


def _step() -> dict:
    import numpy as np
    import torch
    from accelerate import Accelerator
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from jobs.models import WEIGHTS
    from vhs import dreambooth
    from vhs.checkpoint import Silent
    from vhs.diffusion import Components
    from vhs.settings import DreamBooth

    down, up = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    components = Components(  # as the configs of Stable Diffusion 1.5 say
        tokenizer=CLIPTokenizer.from_pretrained(WEIGHTS / "base" / "tokenizer"),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, vocab_size=49408)
        ),
        unet=UNet2DConditionModel(
            sample_size=64, block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8, down_block_types=down,
            up_block_types=up,
        ),
        vae=AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2, latent_channels=4, sample_size=512, scaling_factor=0.18215,
        ),
        scheduler=DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1),
    )  # fmt: skip
    total = sum(parameter.numel() for network in components.networks.values() for parameter in network.parameters())
    probe = components.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_q.weight
    before = probe.detach().clone()
    images = np.random.default_rng(0).integers(0, 256, (2, 512, 512), dtype=np.uint8)

    def batches(epoch, start):
        yield {
            "image": torch.from_numpy(images[:1, None]),
            "key": ["a"],
            "prompt": ["photo of sks large"],
            "weight": torch.ones(1),
            "total": 1,
        }

    class Count(Silent):
        def step(self, step, total, metrics, capture):
            self.trained = sum(tensor.numel() for tensor in capture()["network"].values())

    settings = DreamBooth(steps=1, batch=1, lora_rank=16, learning_rate=1e-3, gradient_checkpointing=True, prompt_dropout=0)
    progress = Count()
    curve = dreambooth.train(components, batches, (images[1:], ["photo of"]), settings, 1, Accelerator(cpu=True), progress)
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB
    after = components.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_q.weight
    changed = not torch.equal(after, before)
    return {"peak_gib": peak_gib, "trained": progress.trained, "all": total, "loss": curve.rows[0]["instance_loss"], "changed": changed}


if __name__ == "__main__":
    print(json.dumps(_step()))
