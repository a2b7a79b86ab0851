"""What DreamBooth trains of a model and by what means: whole networks or low-rank adapters, their optimizer, their moving average.

The loop in vhs/dreambooth.py sees one value with a rate to set, a step to take and a state to keep; the model that leaves has plain weights,
whichever means were chosen.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.utils import recursively_apply
from diffusers.training_utils import EMAModel
from peft import LoraConfig
from peft.tuners.lora import LoraModel

from vhs.diffusion import Components
from vhs.settings import DreamBooth

# the projections of attention, as diffusers' UNets and transformers' text encoders name them (Hu et al. 2022 adapt these)
_ADAPTED = ["to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj"]


class Trainable:
    """The UNet of `components`, and the text encoder if settings.train_text_encoder, prepared for training on the accelerator's device.

    `components`: the same model with the prepared networks in place, for forward passes. The other networks are frozen. Raises ValueError and
    ImportError where the optimizer cannot run.
    """

    def __init__(self, components: Components, settings: DreamBooth, accelerator: Accelerator) -> None:
        self._accelerator, self._settings = accelerator, settings
        components.to(accelerator.device)
        self._frozen_again = list(components.networks.values())
        self._networks = {name: getattr(components, name) for name in ("unet", "text_encoder")[: 1 + settings.train_text_encoder]}
        for name, network in components.networks.items():
            network.requires_grad_(name in self._networks).train(name in self._networks)
        self._adapters = [_adapter(network, settings) for network in self._networks.values()] if settings.lora_rank else []
        if settings.gradient_checkpointing:
            self._checkpoint_activations("enable")
        self.parameters = [parameter for network in self._networks.values() for _, parameter in _trained(network)]
        optimizer = build_optimizer(self.parameters, settings, accelerator.device)
        *self._prepared, self._optimizer = accelerator.prepare(*self._networks.values(), optimizer)
        self._average = EMAModel(self.parameters, decay=settings.ema_decay) if settings.ema_decay else None
        self.components = replace(components, **dict(zip(self._networks, self._prepared, strict=True)))

    def _checkpoint_activations(self, word: Literal["enable", "disable"]) -> None:
        """Recompute activations in the backward pass instead of keeping them (Chen et al. 2016)."""
        getattr(self._networks["unet"], f"{word}_gradient_checkpointing")()
        if "text_encoder" in self._networks:
            getattr(self._networks["text_encoder"], f"gradient_checkpointing_{word}")()

    def unsynchronised(self) -> ExitStack:
        """A context whose gradients stay on their rank, to be averaged with those of a later backward pass."""
        stack = ExitStack()
        for network in self._prepared:
            stack.enter_context(self._accelerator.no_sync(network))
        return stack

    def step(self, learning_rate: float) -> None:
        """Moves the weights along the gradients gathered since the last step, and the average after them."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._accelerator.clip_grad_norm_(self.parameters, self._settings.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        if self._average:
            self._average.step(self.parameters)

    def state_dict(self) -> dict:
        """A copy on the CPU of all that changes: a second set of moments has no room on the GPU."""
        state = {name: dict(_trained(network)) for name, network in self._networks.items()}
        state |= {name: part.state_dict() for name, part in self._stateful().items()}
        return recursively_apply(lambda tensor: tensor.detach().to("cpu", copy=True), state)

    def load_state_dict(self, state: dict) -> None:
        """Lays a state over networks that are on their device already."""
        with torch.no_grad():
            for name, network in self._networks.items():
                for parameter_name, parameter in _trained(network):
                    parameter.copy_(state[name][parameter_name])
        for name, part in self._stateful().items():
            part.load_state_dict(state[name])
        if self._average:
            self._average.to(self._accelerator.device)

    def _stateful(self) -> dict:
        parts = {"optimizer": self._optimizer, "average": self._average, "scaler": self._accelerator.scaler}
        return {name: part for name, part in parts.items() if part}

    @contextmanager
    def as_they_would_leave(self) -> Iterator[Components]:
        """The model in eval mode with the weights it would leave with now; afterwards training goes on as if nothing had been."""
        if self._average:
            self._average.store(self.parameters)
            self._average.copy_to(self.parameters)
        for network in self._networks.values():
            network.eval()
        try:
            yield self.components
        finally:
            for network in self._networks.values():
                network.train()
            if self._average:
                self._average.restore(self.parameters)

    def finish(self) -> None:
        """Leaves the networks given to the constructor with plain weights, frozen, in eval mode: averaged, adapters merged, unwrapped."""
        if self._average:
            self._average.copy_to(self.parameters)
        for adapter in self._adapters:
            adapter.merge_and_unload(progressbar=False)
        if self._settings.gradient_checkpointing:
            self._checkpoint_activations("disable")
        for network in self._prepared:
            self._accelerator.unwrap_model(network, keep_fp32_wrapper=False)  # else autocast stays on the networks that leave here
        for network in self._frozen_again:
            network.requires_grad_(False).eval()


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


def _trained(network: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad]


def _adapter(network: torch.nn.Module, settings: DreamBooth) -> LoraModel:
    """Low-rank adapters beside every attention projection of `network`, which stays what it is, frozen (Hu et al. 2022; alpha = rank)."""
    config = LoraConfig(r=settings.lora_rank, lora_alpha=settings.lora_rank, init_lora_weights="gaussian", target_modules=_ADAPTED)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return LoraModel(network, config, "default")
