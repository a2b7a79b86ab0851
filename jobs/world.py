"""Ranks, devices, threads and the numerics they make: the only place that reads rank variables.

One rank is one process. Launchers (torchrun, srun through later backends, the local one below) set RANK, LOCAL_RANK, WORLD_SIZE and the rendezvous;
everything else in the project asks here.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
from collections.abc import Callable
from dataclasses import dataclass

from jobs import interrupt

QUIET = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
    "KMP_BLOCKTIME": "0",
}  # idle OpenMP threads that spin slow a busy machine 5-fold


TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # malloc.h's numbers of what mallopt sets
MEET_S = 600  # for every machine of a launch to come
_talk = None  # the process group for words between ranks


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def machines() -> tuple[int, int, str]:
    """(how many machines this job has, which of them this is, a name for this start of the job): as SLURM says, else (1, 0, "")."""
    get = os.environ.get
    name = f"slurm-{get('SLURM_JOB_ID', '')}-{get('SLURM_RESTART_COUNT', '0')}" if "SLURM_JOB_ID" in os.environ else ""
    return int(get("SLURM_STEP_NUM_NODES", 1)), int(get("SLURM_NODEID", 0)), name


def set_environment(threads: int):
    """Before torch is imported: threads of the numeric libraries. Inherited by every process started from here."""
    os.environ.update(QUIET, OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads), OPENBLAS_NUM_THREADS=str(threads))
    os.environ.update(
        TRANSFORMERS_VERBOSITY="error", DIFFUSERS_VERBOSITY="error", HF_HUB_DISABLE_PROGRESS_BARS="1"
    )  # one display a run: ours
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else each rank warns of what `accelerator` asks DDP for
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with a fixed workspace


def set_numerics(threads: int):
    """Make torch and BLAS repeat themselves: thread count, deterministic algorithms, no autotuned kernels. And keep memory from step to step."""
    import scipy.linalg  # noqa: F401  loads its own BLAS, which is limited below
    import torch
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(threads)
    threadpool_limits(threads, user_api="blas")  # Ray loads numpy before any code of ours runs, and by then it has counted the machine's cores
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # filling every new array with NaN, to find who reads it, costs a tenth
    torch.backends.cudnn.benchmark = False
    _keep_memory()


def _keep_memory():
    """What a step frees stays for the next one. glibc gives large arrays back to the kernel, which fills them with zeros when they are wanted again:
    a fifth of a training's time on a CPU. Other allocators have no such call."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(MMAP_THRESHOLD, 2**30)
        mallopt(TRIM_THRESHOLD, 2**31 - 1)


def give_memory_back():
    """To the kernel, all that is kept and not in use."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def device(wanted: str):
    """The torch device of this rank. `wanted`: auto | cpu | cuda."""
    import torch

    if wanted == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("execution.device = cuda, but torch sees no GPU here: use auto or cpu, or check CUDA_VISIBLE_DEVICES")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())


def numerics(threads: int, device) -> dict[str, str]:
    """What bytes depend on: equal numerics, equal bytes. Recorded with every generated shard (contract 5)."""
    import cv2
    import diffusers
    import torch
    import transformers

    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": str(threads),
        "cuda": str(torch.version.cuda) if device.type == "cuda" else "",
        **{module.__name__: str(module.__version__) for module in (torch, diffusers, transformers, cv2)},
    }


def cpu_name() -> str:
    """The processor's own name."""
    return next((line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.machine())


def _cpuinfo() -> list[str]:
    try:
        with open("/proc/cpuinfo") as lines:
            return list(lines)
    except OSError:
        return []


def accelerator(wanted: str, mixed_precision: str = "no", sharding: dict | None = None):
    """A fresh Accelerator for this rank, over gloo on CPUs, NCCL on GPUs: for DDP, or with `sharding`, a DeepSpeed configuration, for ZeRO."""
    from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(
        reset_partial_state=size() == 1
    )  # stages of one process differ in precision; the state is a process-wide singleton
    place = device(wanted)
    cpu = place.type == "cpu"
    os.environ["DS_ACCELERATOR"] = place.type  # accelerate imports DeepSpeed to compare classes; it would say that it looks for GPUs
    group = [InitProcessGroupKwargs(backend="gloo" if cpu else "nccl")] if size() > 1 or sharding else []
    if sharding:
        return _sharding_accelerator(place, mixed_precision, sharding, group)
    # Else DDP fills its buckets in another order after a process's first step. Where a gradient lies in a bucket says in which order three ranks or more add
    # it up, so a resumed training would end with other bytes.
    group.append(DistributedDataParallelKwargs(find_unused_parameters=True))
    return Accelerator(cpu=cpu, mixed_precision=mixed_precision, kwargs_handlers=group)


def _sharding_accelerator(place, mixed_precision: str, sharding: dict, group: list):
    """RuntimeError where accelerate would give something else, which it does without a word."""
    import logging
    import warnings

    import torch

    if "LOCAL_RANK" not in os.environ:
        raise RuntimeError("DeepSpeed needs a launched rank, even if it is the only one, and this process is none: start it by world.launch")
    if place.type == "cpu" and torch.cuda.is_available():
        raise RuntimeError("execution.device = cpu, but DeepSpeed takes the GPUs it sees: hide them (CUDA_VISIBLE_DEVICES=) or set execution.device=cuda")
    if place.type == "cuda":
        os.environ["LOCAL_RANK"] = str(place.index)  # DeepSpeed takes cuda:LOCAL_RANK, and some launchers show a rank no GPU but its own
    import deepspeed
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.utils import DistributedType
    from transformers.integrations import unset_hf_deepspeed_config

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # one display a run: ours
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning)  # it calls them
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else its start compiles for minutes; gloo does without
    if mixed_precision == "bf16":  # as DDP has it: float32 weights and gradients, products in half precision
        sharding = sharding | {"torch_autocast": {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}}
    made = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=sharding), kwargs_handlers=group)
    if made.distributed_type != DistributedType.DEEPSPEED:
        raise RuntimeError(
            f"ZeRO was asked for and accelerate gives {made.distributed_type.value}: unset ACCELERATE_USE_CPU "
            f"(it is {os.environ.get('ACCELERATE_USE_CPU', 'unset')})"
        )
    unset_hf_deepspeed_config()  # accelerate tells transformers and diffusers to load and average models in shares: ours are whole until then
    return made


@dataclass(frozen=True)
class Place:
    """This machine among those that share a launch: number `node` of `nodes`; the ranks meet at the first, `host`:`port`."""

    nodes: int = 1
    node: int = 0
    host: str = "localhost"
    port: int = 0


def launch(ranks: int, function: Callable, *arguments, place: Place = Place()):
    """Run `function(*arguments)` in `ranks` processes that know each other, this machine's part of them here -> what it returned on rank 0 (None
    on a machine without it); an error in one ends all of a machine and is raised here as RuntimeError.

    The one place where processes meet: every backend ends here. Ranks are numbered machine after machine.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGTERM,SIGINT,SIGUSR2"  # handed on to the ranks, which save and stop; killed after 30 s

    alone = place.nodes == 1  # then torch finds a free port itself
    config = LaunchConfig(
        min_nodes=place.nodes,
        max_nodes=place.nodes,
        nproc_per_node=ranks // place.nodes,
        run_id=str(os.getpid()) if alone else f"{place.host}:{place.port}",
        rdzv_backend="c10d" if alone else "static",
        rdzv_endpoint=f"{place.host}:{place.port}",
        rdzv_configs={} if alone else {"rank": place.node, "timeout": MEET_S},
        max_restarts=0,
        start_method="spawn",
        local_addr="localhost" if alone else None,
    )
    try:
        return elastic_launch(config, _as_rank)(os.getpid(), function, *arguments).get(0)
    except SignalException as error:
        if error.sigval == signal.SIGINT:
            raise KeyboardInterrupt from None
        raise interrupt.Interrupted(error.sigval.name) from None
    except ChildFailedError as error:
        interrupt.check()
        first, failure = error.get_first_failure()
        message = failure.message["message"] if isinstance(failure.message, dict) else failure.message
        raise RuntimeError(f"rank {first} of {ranks}: {message} (exit {failure.exitcode})") from error
    finally:
        interrupt.listen_again()


def on_any_rank(flag: bool) -> bool:
    """Whether `flag` is true on any rank; every rank asks at the same point."""
    if size() == 1:
        return flag
    import torch
    from torch import distributed

    global _talk
    _talk = _talk or distributed.new_group(backend="gloo")  # a word between processes, whatever carries the gradients
    word = torch.tensor(int(flag))
    distributed.all_reduce(word, distributed.ReduceOp.MAX, group=_talk)
    return bool(word)


def _as_rank(parent: int, function: Callable, *arguments):
    """A rank's life: it ends with its parent, however that ends, and leaves its error where the parent finds it."""
    from torch.distributed.elastic.multiprocessing.errors import record

    end_with(parent)
    interrupt.listen()
    return record(function)(*arguments)


def end_with(parent: int):
    """This process, a child of process `parent`, is killed when that one ends."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)
