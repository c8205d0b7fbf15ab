"""The machine under a run: device, precision, processes, memory, and random numbers keyed by what they are for.

Proven by tests/run/test_state.py and tests/train/test_distributed.py.
"""

import contextlib
import ctypes
import functools
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

try:
    import resource
except ImportError:  # Windows
    resource = None

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def device(name: str = "auto") -> torch.device:
    """`auto` is CUDA where there is one, else the CPU. ValueError for a device this machine lacks."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {name} was asked for, but PyTorch sees no CUDA device here; use --device cpu")
    return torch.device(name)


def cpu_name() -> str:
    """The processor's name, as the system tells it."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text(encoding="utf-8").splitlines() if line.startswith("model name")] \
        if info.is_file() else []
    return names[0] if names else platform.processor() or platform.machine()


def autocast(where: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """Autocast to fp16 or bf16 on `where`; nothing for fp32."""
    return torch.autocast(where.type, DTYPES[precision]) if precision != "fp32" else contextlib.nullcontext()


def generator(*key: int) -> torch.Generator:
    """A CPU generator seeded by the whole key, e.g. (seed, step): the same numbers on any device, batch size or resumption.

    Trailing zeros do not count, (seed,) = (seed, 0) = (seed, 0, 0): longer keys beside (seed, step) must end in 1 or more.
    """
    state = int(np.random.SeedSequence(list(key)).generate_state(1, np.uint64)[0])
    return torch.Generator().manual_seed(state & (2**63 - 1))


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks instead of returning them to the kernel: a training step on the CPU frees and takes back gigabytes,
    and the page faults cost up to a third of its time. Nothing elsewhere than on Linux with glibc. Call it once, before the first tensor.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        for option, value in ((-4, 0), (-8, 1), (-1, 2**31 - 1), (-2, 2**28)):  # M_MMAP_MAX, M_ARENA_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
            libc.mallopt(option, value)
    except (OSError, AttributeError):
        pass  # another C library


def peak_mem_gib(where: torch.device) -> float:
    """Peak memory so far: the allocator's on CUDA, the process's resident set elsewhere; 0 where the system does not say.

    On Linux from VmHWM: getrusage's ru_maxrss also counts the process that started this one.
    """
    if where.type == "cuda":
        return torch.cuda.max_memory_allocated(where) / 2**30
    status = Path("/proc/self/status")
    if status.is_file():
        return int(status.read_text(encoding="utf-8").split("VmHWM:")[1].split()[0]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30 if resource else 0.0  # bytes on macOS


def synchronize(where: torch.device) -> None:
    """Wait until the device has done its queued work, so that a clock reads the truth."""
    if where.type == "cuda":
        torch.cuda.synchronize(where)


def process(device_name: str) -> tuple[int, int, torch.device]:
    """(rank, number of processes, device); joins torchrun's process group where there is one."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    where = device(device_name)
    if where.type == "cpu":
        keep_freed_memory()
    if world == 1:
        return 0, 1, where
    if where.type == "cuda":
        where = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(where)
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if where.type == "cuda" else "gloo")
    return torch.distributed.get_rank(), world, where


def distributed(model: nn.Module, world: int, device: torch.device) -> nn.Module:
    """`model`, averaged over processes if there are several and anything is left to train."""
    if world == 1:
        return model
    return nn.parallel.DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


@contextlib.contextmanager
def first_rank_first(rank: int, world: int) -> Iterator[None]:
    """Rank 0 goes through the block alone, then the others: what it leaves in a cache, they read."""
    if rank:
        torch.distributed.barrier()
    yield
    if world > 1 and rank == 0:
        torch.distributed.barrier()


@functools.cache
def _flags_group() -> object:
    """A group of all processes for numbers on the CPU: asking costs no wait for the GPU."""
    return torch.distributed.new_group(backend="gloo")


def agree(number: int, world: int) -> int:
    """The largest `number` of all processes: what one of them has seen (a signal, a NaN), all act on at the same step."""
    if world == 1:
        return number
    largest = torch.tensor([number])
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group=_flags_group())
    return int(largest)


def no_sync(model: nn.Module, wanted: bool) -> contextlib.AbstractContextManager:
    """Skip the gradients' averaging while they accumulate."""
    return model.no_sync() if wanted and hasattr(model, "no_sync") else contextlib.nullcontext()
