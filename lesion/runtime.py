"""What a run needs beside its algorithm: device, precision, keyed random numbers, saved state, provenance.

Proven by tests/test_runtime.py.
"""
import contextlib
import ctypes
import hashlib
import json
import platform
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lesion import __version__, files

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def device(name: str = "auto") -> torch.device:
    """`auto` is CUDA where there is one, else the CPU. ValueError for a device this machine lacks."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {name} was asked for, but PyTorch sees no CUDA device here; use --device cpu")
    return torch.device(name)


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
    """Peak memory so far: the allocator's on CUDA, the process's resident set elsewhere.

    On Linux from VmHWM: getrusage's ru_maxrss also counts the process that started this one.
    """
    if where.type == "cuda":
        return torch.cuda.max_memory_allocated(where) / 2**30
    status = Path("/proc/self/status")
    if status.is_file():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30  # bytes on macOS


def synchronize(where: torch.device) -> None:
    """Wait until the device has done its queued work, so that a clock reads the truth."""
    if where.type == "cuda":
        torch.cuda.synchronize(where)


def save_state(path: Path, tensors: dict[str, Tensor], meta: dict) -> None:
    """Write tensors and a JSON-able `meta` as one safetensors file, atomically."""
    tensors = {key: value.detach().to("cpu").contiguous().clone() for key, value in tensors.items()}
    with files.atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"meta": json.dumps(meta)})


def load_state(path: Path) -> tuple[dict[str, Tensor], dict]:
    """(tensors, meta) of `save_state`. ValueError for a damaged or foreign file."""
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["meta"])  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged or not a saved state ({error})") from None


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """{"<parameter number>.<name>": tensor} of an optimizer's state; hyperparameters are not state, they come from flags."""
    state = optimizer.state_dict()["state"]
    return {f"{number}.{name}": torch.as_tensor(value) for number, values in state.items() for name, value in values.items()}


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` took."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, name = key.split(".", 1)
        state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    for parameter, values in optimizer.state.items():  # fused AdamW walks raw memory: moments must lie as their parameter does
        for name, value in values.items():
            if value.shape == parameter.shape:
                values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def weights_sha256(*networks: nn.Module) -> str:
    """SHA-256 over names, shapes and bytes of all parameters: equal only if nothing changed."""
    digest = hashlib.sha256()
    for network in networks:
        for key, value in sorted(network.state_dict().items()):
            digest.update(f"{key} {value.dtype} {list(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def files_sha256(paths: list[Path]) -> str:
    """Identity of a checkpoint: a single file's SHA-256; for a folder, the SHA-256 of its weight files' SHA-256s in order."""
    hashes = [files.sha256_file(path) for path in paths]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def provenance() -> dict:
    """Versions, platform and git commit (with `+changes` if the tree is dirty): what a run folder records of its origin."""
    return {"lesion": __version__, "git_commit": _git_commit(), "python": platform.python_version(), "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine(),
            "command": " ".join(sys.argv)}


def _git_commit() -> str | None:
    root = Path(__file__).resolve().parent.parent
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True).stdout.strip()
        dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=root, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+changes" if dirty.strip() else "")
