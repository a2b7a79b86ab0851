"""Images for (prompt, seed) pairs, one batch a call. Each image's noise comes from a generator of its own, whatever its neighbours are.

The cost of a generated image is UNet calls: a second-order solver needs 20 where the study's PNDM took 50, and a batch shares each call.
Which images share a batch is for the caller to fix: kernels round differently at other batch sizes, by a grey level here and there.
"""

from __future__ import annotations

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, PNDMScheduler

from vhs import diffusion
from vhs.diffusion import Components
from vhs.settings import Generation


def build_solver(components: Components, settings: Generation) -> DPMSolverMultistepScheduler | PNDMScheduler:
    """The solver with the model's own noise levels and prediction type, its time steps set.

    dpm++: DPM-Solver++(2M), Lu et al. 2022, time steps trailing so that it starts from pure noise (Lin et al. 2023, section 3.3).
    sde-dpm++: its stochastic twin, SDE-DPM-Solver++(2M) there: the noise added at each step washes out the errors of the steps before.
    pndm: the study's, Liu et al. 2022, as Stable Diffusion 1.x ships it.
    """
    config = components.scheduler.config
    if settings.solver == "pndm":
        solver = PNDMScheduler.from_config(config, skip_prk_steps=True, timestep_spacing="leading", steps_offset=1)
    else:
        kind = "sde-dpmsolver++" if settings.solver == "sde-dpm++" else "dpmsolver++"
        solver = DPMSolverMultistepScheduler.from_config(config, algorithm_type=kind, solver_order=2, timestep_spacing="trailing")
    solver.set_timesteps(settings.steps, device=components.unet.device)
    return solver


@torch.no_grad()
def sample(components: Components, prompts: list[str], seeds: list[int], size_px: int, settings: Generation) -> np.ndarray:
    """One batch: prompts[i] drawn from the noise of seeds[i] -> uint8 [n, size_px, size_px].

    Classifier-free guidance (Ho & Salimans 2022) runs both passes as one batch of 2n; guidance 1 needs only the prompted pass.
    Raises ValueError for lists of different length and for a size the codec cannot carry.
    """
    if len(prompts) != len(seeds):
        raise ValueError(f"each image has a prompt and a seed, got {len(prompts)} prompts and {len(seeds)} seeds")
    if size_px % components.factor:
        raise ValueError(f"size_px = {size_px} does not fit this codec: it must be a multiple of {components.factor}")
    unet, solver = components.unet, build_solver(components, settings)
    shape = (unet.config.in_channels, size_px // components.factor, size_px // components.factor)
    streams = [torch.Generator().manual_seed(seed) for seed in seeds]

    def noise() -> torch.Tensor:
        return torch.stack([torch.randn(shape, generator=stream) for stream in streams]).to(unet.device)

    latents = noise() * solver.init_noise_sigma
    guided = settings.guidance > 1
    context = diffusion.embed(components, [""] * len(prompts) + list(prompts) if guided else list(prompts)).to(unet.dtype)
    for timestep in solver.timesteps:
        scaled = solver.scale_model_input(torch.cat([latents, latents]) if guided else latents, timestep)
        prediction = unet(scaled.to(unet.dtype), timestep, context).sample.float()  # the solver sums in float32 whatever the model's dtype
        if guided:
            free, prompted = prediction.chunk(2)
            prediction = free + settings.guidance * (prompted - free)
        fresh = {"variance_noise": noise()} if settings.solver == "sde-dpm++" else {}
        latents = solver.step(prediction, timestep, latents, **fresh).prev_sample
    return diffusion.decode_latents(components, latents)
