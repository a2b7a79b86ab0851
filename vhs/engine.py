"""How a network lies on the ranks while it trains: whole on each of them (DDP), or in shares that DeepSpeed puts together where they are needed.

ZeRO (Rajbhandari et al. 2020) shares out gradients, moments and the copy of the weights that the optimizer moves; its stage 3 also the weights.
Both loops (vhs/dreambooth.py, vhs/training.py) see one engine: a network to call, a step to take, a state to keep. The state is that of the whole
network whatever the shares, and what leaves has plain weights. Methods are for all ranks to call together, for they may exchange shares.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast, convert_outputs_to_fp32, recursively_apply
from torch import nn
from torch.nn import functional as F

Optimize = Callable[[nn.Module], torch.optim.Optimizer]  # the optimizer of the network it is given
_MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, as torch and DeepSpeed call them


def build_engine(
    network: nn.Module, optimize: Optimize, accelerator: Accelerator, *, sharding: dict | None, max_grad_norm: float, accumulation: int = 1
) -> Engine:
    """The engine that `sharding` asks for: None, or the content of a DeepSpeed configuration (vhs/settings.py). `accumulation`: backward passes a step.

    RuntimeError when the accelerator is not of that kind: accelerate itself would go on with another.
    """
    if bool(sharding) != (accelerator.distributed_type == DistributedType.DEEPSPEED):
        asked = f"ZeRO stage {sharding['zero_optimization']['stage']}" if sharding else "no sharding"
        raise RuntimeError(f"{asked} was asked for, but accelerate prepares {accelerator.distributed_type.value}: make the accelerator with it")
    if sharding:
        return Sharded(network, optimize, accelerator, sharding["zero_optimization"]["stage"], max_grad_norm, accumulation)
    return Replicated(network, optimize, accelerator, max_grad_norm)


class _Rated:
    """An engine's learning rate, the same for all its groups of parameters."""

    optimizer: torch.optim.Optimizer

    @property
    def learning_rate(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    @learning_rate.setter
    def learning_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate


class Replicated(_Rated):
    """`network`, to be called, is whole on every rank; DDP averages its gradients."""

    def __init__(self, network: nn.Module, optimize: Optimize, accelerator: Accelerator, max_grad_norm: float) -> None:
        self._accelerator, self._max_grad_norm = accelerator, max_grad_norm
        self.module = network  # what is trained
        self.network, self.optimizer = accelerator.prepare(network, optimize(network))

    def about(self) -> dict:
        """What trains, for the record: the class that has the network, how many ranks."""
        return {"engine": type(self.network).__name__, "ranks": self._accelerator.num_processes}

    def accumulating(self) -> AbstractContextManager:
        """Around forward and backward passes whose gradients wait for those of a later one."""
        return self._accelerator.no_sync(self.network)

    def backward(self, loss: torch.Tensor) -> None:
        self._accelerator.backward(loss)

    def step(self) -> None:
        """Moves the weights along the gradients gathered since the last step."""
        self._accelerator.clip_grad_norm_(self.module.parameters(), self._max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def held(self) -> list[nn.Parameter]:
        """What this rank holds of each trained parameter: it shares their memory."""
        return [parameter for _, parameter in trained(self.module)]

    def whole(self, pieces: list[torch.Tensor]) -> list[torch.Tensor]:
        """Each rank's pieces, shaped like `held()`, put together: on the CPU of rank 0, nothing elsewhere."""
        return [_to_cpu(piece) for piece in pieces] if self._accelerator.is_main_process else []

    def pieces(self, wholes: list[torch.Tensor]) -> list[torch.Tensor]:
        """This rank's pieces of what `whole` put together, on its device."""
        return [whole.to(self._accelerator.device) for whole in wholes]

    @contextmanager
    def showing(self) -> Iterator[nn.Module]:
        """The network with plain weights and rank 0's buffers, on every rank's device, to look at."""
        self._share_buffers()
        yield self.module

    def _share_buffers(self) -> None:
        """Batch-norm statistics are of each rank's own rows, and one model is judged and leaves: rank 0's."""
        for buffer in self.module.buffers():
            buffer.copy_(broadcast(buffer.clone(), from_process=0))

    def finish(self) -> nn.Module:
        """The network given to the constructor, unwrapped, as `showing` has it, on any device."""
        self._share_buffers()
        return self._accelerator.unwrap_model(self.network, keep_fp32_wrapper=False)  # else autocast stays on what leaves here

    def state_dict(self) -> dict:
        """Copies on the CPU of all that changes, on rank 0; nothing elsewhere."""
        if not self._accelerator.is_main_process:
            return {}
        state = {"network": _changing(self.module), "optimizer": self.optimizer.state_dict()}
        if self._accelerator.scaler:
            state["scaler"] = self._accelerator.scaler.state_dict()
        return recursively_apply(_to_cpu, state)

    def load_state_dict(self, state: dict) -> None:
        """That of any number of ranks will do."""
        with torch.no_grad():
            for name, tensor in _changing(self.module).items():
                tensor.copy_(state["network"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        if self._accelerator.scaler:
            self._accelerator.scaler.load_state_dict(state["scaler"])


class Sharded(_Rated):
    """`network`, to be called, is a copy of the one given, in shares under DeepSpeed; the one given waits on the CPU for the weights to leave with."""

    def __init__(
        self, network: nn.Module, optimize: Optimize, accelerator: Accelerator, stage: int, max_grad_norm: float, accumulation: int
    ) -> None:
        import deepspeed

        self._accelerator, self._leaving, self._stage = accelerator, network.cpu(), stage
        accelerator.gradient_accumulation_steps = accumulation
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        config |= {"gradient_clipping": max_grad_norm, "gradient_accumulation_steps": accumulation, "train_micro_batch_size_per_gpu": 1}
        module = copy.deepcopy(network)
        for parameter in module.parameters():
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)  # DeepSpeed cannot send channels_last
        self._engine, self.optimizer = accelerator.prepare(module, optimize(module))
        found = self._engine.zero_optimization_stage() if isinstance(self._engine, deepspeed.DeepSpeedEngine) else None
        if found != stage:
            raise RuntimeError(f"ZeRO stage {stage} was asked for, accelerate prepared {type(self._engine).__name__} of stage {found}")
        self.module, self._zero = self._engine.module, self._engine.optimizer
        self.network = convert_outputs_to_fp32(self._engine.forward)  # as accelerate does where it autocasts itself
        self._make_moments()

    def _make_moments(self) -> None:
        """What the optimizer would make in its first step: a state can be laid over it, and DeepSpeed overlooks those of a second group."""
        for flat in self._zero.single_partition_of_fp32_groups if self._stage < 3 else self._zero.fp32_partitioned_groups_flat:
            self._zero.optimizer.state[flat] = {key: torch.zeros_like(flat) for key in _MOMENTS}
        self._set_step(0)
        if self._stage < 3:
            self._zero._lazy_init_hp_params_optimizer_state()

    def _set_step(self, step: int) -> None:
        """How many steps the moments have seen: torch counts in tensors, DeepSpeed's own Adam in plain numbers."""
        for state in self._zero.optimizer.state.values():
            state["step"] = torch.tensor(float(step)) if isinstance(self._zero.optimizer, torch.optim.AdamW) else step

    def about(self) -> dict:
        """What trains, for the record: DeepSpeed's class, how many ranks, the ZeRO stage found, the share of the moments that this rank holds."""
        total = sum(getattr(parameter, "ds_numel", parameter.numel()) for _, parameter in trained(self.module))
        held = sum(state["exp_avg"].numel() for state in self._zero.optimizer.state.values()) / total
        about = {"engine": type(self._engine).__name__, "ranks": self._accelerator.num_processes}
        return about | {"zero_stage": int(self._engine.zero_optimization_stage()), "moments_held": round(held, 3)}

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        self._engine.set_gradient_accumulation_boundary(False)
        yield
        self._engine.set_gradient_accumulation_boundary(True)

    def backward(self, loss: torch.Tensor) -> None:
        self._engine.backward(loss, scale_wrt_gas=False)  # the loops divide by the number of passes themselves

    def step(self) -> None:
        """FloatingPointError where DeepSpeed leaves a step out, which it does in silence."""
        self._engine.step()
        if not self._engine.was_step_applied():
            raise FloatingPointError("the gradient is no longer a number: lower the learning rate, or take no mixed precision")

    def held(self) -> list[nn.Parameter]:
        if self._stage < 3:
            return [parameter for _, parameter in trained(self.module)]
        return [nn.Parameter(parameter.ds_tensor.data) for _, parameter in trained(self.module)]

    def whole(self, pieces: list[torch.Tensor]) -> list[torch.Tensor]:
        wholes = (self._whole(parameter, piece) for (_, parameter), piece in zip(trained(self.module), pieces, strict=True))
        wholes = [_to_cpu(whole) if self._accelerator.is_main_process else None for whole in wholes]  # one at a time on the device
        return wholes if self._accelerator.is_main_process else []

    def pieces(self, wholes: list[torch.Tensor]) -> list[torch.Tensor]:
        return [self._piece(parameter, whole) for (_, parameter), whole in zip(trained(self.module), wholes, strict=True)]

    def _whole(self, parameter: nn.Parameter, piece: torch.Tensor) -> torch.Tensor:
        if self._stage < 3:
            return piece
        piece = piece.detach().to(self._accelerator.device)
        everyone = [torch.empty_like(piece) for _ in range(self._accelerator.num_processes)]
        torch.distributed.all_gather(everyone, piece)
        return torch.cat(everyone)[: parameter.ds_numel].view(parameter.ds_shape)

    def _piece(self, parameter: nn.Parameter, whole: torch.Tensor) -> torch.Tensor:
        whole = whole.to(self._accelerator.device)
        if self._stage < 3:
            return whole
        each = parameter.ds_tensor.numel()
        padded = F.pad(whole.flatten(), (0, each * self._accelerator.num_processes - whole.numel()))
        return padded.split(each)[self._accelerator.process_index]

    @contextmanager
    def showing(self) -> Iterator[nn.Module]:
        self._fill()
        yield self._leaving.to(self._accelerator.device)
        self._leaving.cpu()

    def finish(self) -> nn.Module:
        self._fill()
        return self._leaving

    @torch.no_grad()
    def _fill(self) -> None:
        """Puts the weights together in the network that leaves, rank 0's buffers with them."""
        for (_, target), (_, source), piece in zip(trained(self._leaving), trained(self.module), self.held(), strict=True):
            target.copy_(self._whole(source, piece))
        for target, source in zip(self._leaving.buffers(), self.module.buffers(), strict=True):
            target.copy_(broadcast(source.clone(), from_process=0))

    def state_dict(self) -> dict:
        from deepspeed.utils import safe_get_full_optimizer_state

        names, moments = [name for name, _ in trained(self.module)], {}
        for key in _MOMENTS:
            wholes = (safe_get_full_optimizer_state(parameter, key) for _, parameter in trained(self.module))
            moments[key] = [_to_cpu(whole) if self._accelerator.is_main_process else None for whole in wholes]
        wholes = self.whole(self.held())
        if not self._accelerator.is_main_process:
            return {}
        return {
            "network": dict(zip(names, wholes, strict=True)) | {name: _to_cpu(buffer) for name, buffer in self.module.named_buffers()},
            "optimizer": moments | {"step": int(next(iter(self._zero.optimizer.state.values()))["step"]), "rate": self.learning_rate},
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """That of any number of ranks will do: each takes its share of the whole."""
        self._set_step(state["optimizer"]["step"])
        for number, (name, parameter) in enumerate(trained(self.module)):
            self._set(parameter, state["network"][name], {key: state["optimizer"][key][number] for key in _MOMENTS})
        for name, buffer in self.module.named_buffers():
            buffer.copy_(state["network"][name])
        self.learning_rate = state["optimizer"]["rate"]

    def _set(self, parameter: nn.Parameter, weights: torch.Tensor, moments: dict[str, torch.Tensor]) -> None:
        """Weights, their copy that the optimizer moves, and its moments, each rank its share."""
        from deepspeed import utils, zero

        set_weights, set_moment = utils.safe_set_full_fp32_param, utils.safe_set_full_optimizer_state
        if self._stage == 3:  # there they fail where ranks do not divide a tensor
            set_weights, set_moment = utils.safe_set_local_fp32_param, utils.safe_set_local_optimizer_state
        set_weights(parameter, self._piece(parameter, weights))
        for key, moment in moments.items():
            set_moment(parameter, self._piece(parameter, moment), key)
        with zero.GatheredParameters([parameter], modifier_rank=0, enabled=self._stage == 3):
            parameter.copy_(weights)


Engine = Replicated | Sharded


def trained(network: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Its parameters that take gradients, by name."""
    return [(name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad]


def _changing(network: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(trained(network)), **dict(network.named_buffers())}


def _to_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the CPU: a second set of moments has no room on the GPU."""
    return tensor.detach().to("cpu", copy=True)
