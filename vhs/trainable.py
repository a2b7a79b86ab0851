"""What DreamBooth trains of a model and by what means: whole networks or low-rank adapters, their optimizer, their moving average.

The loop in vhs/dreambooth.py sees one value with a rate to set, a step to take and a state to keep; the model that leaves has plain weights,
whichever means were chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from torch import nn

from vhs.diffusion import Components
from vhs.engine import build_engine, trained
from vhs.settings import DreamBooth

# the projections of attention, as diffusers' UNets and transformers' text encoders name them (Hu et al. 2022 adapt these)
_ADAPTED = ["to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj"]


class Trainable:
    """The UNet of `components`, and the text encoder if settings.train_text_encoder, in training on the accelerator's ranks and device.

    `components`: the same model with the networks in training; `engine.network(compute)` is `compute()`, which calls them, as one forward pass of
    all. The other networks are frozen. Methods are for all ranks to call together. Raises ValueError and ImportError where the optimizer cannot
    run, RuntimeError where the accelerator does not shard as settings.sharding says.
    """

    def __init__(self, components: Components, settings: DreamBooth, accelerator: Accelerator) -> None:
        self._settings, self._leaving = settings, components
        networks = _Networks({name: getattr(components, name) for name in ("unet", "text_encoder")[: 1 + settings.train_text_encoder]})
        for name, network in components.networks.items():
            network.requires_grad_(name in networks).train(name in networks)
            if name not in networks:
                network.to(accelerator.device)
        self._adapters = [_adapter(network, settings) for network in networks.values()] if settings.lora_rank else []
        if settings.gradient_checkpointing:
            self._checkpoint_activations("enable")
        self.engine = build_engine(
            networks,
            lambda networks: build_optimizer([parameter for _, parameter in trained(networks)], settings, accelerator.device),
            accelerator,
            sharding=settings.sharding,
            max_grad_norm=settings.max_grad_norm,
            accumulation=settings.gradient_accumulation,
        )
        self._average = EMAModel(self.engine.held(), decay=settings.ema_decay) if settings.ema_decay else None
        self.components = replace(components, **self.engine.module)

    def _checkpoint_activations(self, word: Literal["enable", "disable"]) -> None:
        """Recompute activations in the backward pass instead of keeping them (Chen et al. 2016)."""
        getattr(self._leaving.unet, f"{word}_gradient_checkpointing")()
        if self._settings.train_text_encoder:
            getattr(self._leaving.text_encoder, f"gradient_checkpointing_{word}")()

    def step(self, learning_rate: float) -> None:
        """Moves the weights along the gradients gathered since the last step, and the average after them."""
        self.engine.learning_rate = learning_rate
        self.engine.step()
        if self._average:
            self._average.step(self.engine.held())

    def state_dict(self) -> dict:
        """A copy on the CPU of all that changes, on rank 0; nothing elsewhere."""
        state = self.engine.state_dict()
        if not self._average:
            return state
        average = {**self._average.state_dict(), "shadow_params": self.engine.whole(self._average.shadow_params)}
        return state and {**state, "average": average}

    def load_state_dict(self, state: dict) -> None:
        """Lays a state over networks that are on their device already."""
        self.engine.load_state_dict(state)
        if self._average:
            pieces = self.engine.pieces(state["average"]["shadow_params"])
            self._average.load_state_dict({**state["average"], "shadow_params": pieces})

    @contextmanager
    def as_they_would_leave(self) -> Iterator[Components]:
        """The model in eval mode with the weights it would leave with now; afterwards training goes on as if nothing had been."""
        if self._average:
            self._average.store(self.engine.held())
            self._average.copy_to(self.engine.held())
        try:
            with self.engine.showing() as networks:
                networks.eval()
                yield self._leaving
                networks.train()
        finally:
            if self._average:
                self._average.restore(self.engine.held())

    def finish(self) -> None:
        """Leaves the networks given to the constructor with plain weights, frozen, in eval mode: averaged, adapters merged, unwrapped."""
        if self._average:
            self._average.copy_to(self.engine.held())
        self.engine.finish()
        for adapter in self._adapters:
            adapter.merge_and_unload(progressbar=False)
        if self._settings.gradient_checkpointing:
            self._checkpoint_activations("disable")
        for network in self._leaving.networks.values():
            network.requires_grad_(False).eval()


class _Networks(nn.ModuleDict):
    """Networks that train together: one for an engine, which sees no more of a forward pass than that it begins and ends."""

    def forward(self, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        return compute()


def build_optimizer(parameters: list[torch.nn.Parameter], settings: DreamBooth, device: torch.device) -> torch.optim.Optimizer:
    """AdamW, or its moments in 8 bits (Dettmers et al. 2022). ValueError where no GPU is, ImportError where the library is missing."""
    options = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **options)
    if device.type != "cuda":
        raise ValueError(
            f"dreambooth.optimizer = adamw_8bit runs on NVIDIA GPUs only and this is {device.type}: set dreambooth.optimizer=adamw, "
            "whose moments take 8 bytes a trained weight instead of 2 (dreambooth.lora_rank leaves few to train)"
        )
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ImportError(
            "dreambooth.optimizer = adamw_8bit needs bitsandbytes: pip install 'vhs[gpu]', or set dreambooth.optimizer=adamw"
        ) from error
    return AdamW8bit(parameters, **options)


def _adapter(network: torch.nn.Module, settings: DreamBooth) -> LoraModel:
    """Low-rank adapters beside every attention projection of `network`, which stays what it is, frozen (Hu et al. 2022; alpha = rank)."""
    config = LoraConfig(r=settings.lora_rank, lora_alpha=settings.lora_rank, init_lora_weights="gaussian", target_modules=_ADAPTED)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return LoraModel(network, config, "default")
