"""`vhs bench generate`: our sampler beside diffusers' pipeline and beside the bare networks."""

from __future__ import annotations

import io
import time
from contextlib import redirect_stderr

from jobs.bench.race import Result, race, rows


def generate(
    images: int = 8, repeats: int = 3, batch: int = 8, steps: int = 20, size_px: int = 128, model: str = "packaged", device: str = "auto"
) -> Result:
    """Our sampler beside diffusers' pipeline, one image a call and batched, and beside the networks alone called as often."""
    import torch
    from diffusers import DPMSolverMultistepScheduler, PNDMScheduler, StableDiffusionPipeline

    from jobs import models, world
    from vhs import diffusion, sampling
    from vhs.settings import Generation

    place = world.device(device)
    gpu = place.type == "cuda"
    parts = diffusion.load(models.WEIGHTS / "base" if model == "packaged" else model, place, torch.float16 if gpu else torch.float32)
    settings, prompt = Generation(steps=steps, batch=batch, guidance=2.0), "photo of sks normal dog heart Cardiovascular Thoracic radiograph x-ray"
    groups = [list(range(start, min(start + batch, images))) for start in range(0, images, batch)]

    def pipeline(solver) -> StableDiffusionPipeline:
        made = StableDiffusionPipeline(
            vae=parts.vae, text_encoder=parts.text_encoder, tokenizer=parts.tokenizer, unet=parts.unet, scheduler=solver,
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
        made.set_progress_bar_config(disable=True)
        return made

    config = parts.scheduler.config
    pndm = pipeline(PNDMScheduler.from_config(config, skip_prk_steps=True, timestep_spacing="leading", steps_offset=1))
    dpm = pipeline(DPMSolverMultistepScheduler.from_config(config, algorithm_type="dpmsolver++", timestep_spacing="trailing"))

    def theirs(pipe: StableDiffusionPipeline, of: list[list[int]], calls: int):
        for group in of:
            seeds = [torch.Generator().manual_seed(seed) for seed in group]
            pipe([prompt] * len(group), height=size_px, width=size_px, num_inference_steps=calls, guidance_scale=2.0, generator=seeds)

    def ours():
        for group in groups:
            sampling.sample(parts, [prompt] * len(group), group, size_px, settings)

    @torch.no_grad()
    def bare():
        side = size_px // parts.factor
        for group in groups:
            n = len(group)
            latents = torch.zeros(n, parts.unet.config.in_channels, side, side, device=place, dtype=parts.unet.dtype)
            context = diffusion.embed(parts, [prompt] * (2 * n)).to(parts.unet.dtype)
            for _ in range(steps):
                parts.unet(torch.cat([latents, latents]), 500, context)
            parts.vae.decode(latents)
        if gpu:
            torch.cuda.synchronize()

    alone = [[number] for number in range(images)]
    contenders = {
        f"vhs: DPM-Solver++ {steps}, batch {batch}": ours,
        "diffusers: PNDM 50, one image a call": lambda: theirs(pndm, alone, 50),
        f"diffusers: DPM-Solver++ {steps}, one image a call": lambda: theirs(dpm, alone, steps),
        f"diffusers: DPM-Solver++ {steps}, batch {batch}": lambda: theirs(dpm, groups, steps),
        f"UNet and decoder alone, {steps} calls, batch {batch}": bare,
    }
    with redirect_stderr(io.StringIO()):  # one notice a pipeline of what it was built from
        rates = race(contenders, images, repeats, time.perf_counter if gpu else time.process_time)
    name = torch.cuda.get_device_name(place) if gpu else world.cpu_name()
    return Result("generate", "images per second" if gpu else "images per core-second", name, images, repeats, rows(rates))
