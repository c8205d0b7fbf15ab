"""`python -m lesion convert FILE.ckpt`: a pickled checkpoint as safetensors, without running anything that is pickled
in it.

torch reads it with weights_only, in a process of its own that ends with the conversion. Classes that a trainer pickled
beside the weights (callbacks, optimizers) are stood in for by an empty class; a pickle that names something that could
act is refused. Proven by tests/sd/test_convert.py.
"""
import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

PICKLES = (".ckpt", ".bin", ".pt", ".pth")
ATTACKS = re.compile(
    r"(builtins|__builtin__)\.(eval|exec|execfile|compile|open|__import__|input|breakpoint)|"
    r"(os|posix|nt|sys|subprocess|socket|"
    r"shutil|importlib|runpy|ctypes|pty|commands|webbrowser|urllib|requests|pickle|_pickle|torch\.hub|torch\.load)\..+"
)
MOST_CLASSES = 500
DICTS = ("state_dict", "model", "module", "model_state_dict", "params_ema", "params")  # where trainers keep the weights


def main(argv: list[str]) -> None:
    """Convert the pickles of the command line, one after the other."""
    parser = argparse.ArgumentParser(
        prog="lesion convert",
        description="Convert pickled checkpoints (.ckpt, .bin, .pt) to safetensors.",
        allow_abbrev=False,
    )
    parser.error = lambda message: parser.exit(
        2, f"lesion convert: {' '.join(message.split())} (see lesion convert --help)\n"
    )
    parser.add_argument(
        "files",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="pickled checkpoint, LoRA or component (.ckpt, .bin, .pt, .pth)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="of one file's result; default: FILE with the ending .safetensors"
    )
    args = parser.parse_args(argv)
    if args.out and len(args.files) > 1:
        parser.error(f"--out is for one file, {len(args.files)} are given")
    for file in args.files:
        out = args.out or default_out(file)
        print(convert(file, out), flush=True)


def default_out(file: Path) -> Path:
    """The same name with the ending .safetensors; a text encoder's pytorch_model.bin becomes model.safetensors, as
    transformers has it."""
    return file.with_name("model.safetensors") if file.name == "pytorch_model.bin" else file.with_suffix(".safetensors")


def convert(file: Path, out: Path) -> str:
    """Convert in a process of its own; a sentence that says what was written and what was left out.

    ValueError, one line: not there, not a pickle, `out` exists, damaged, holding something that could act, or no
    tensors.
    """
    if not file.is_file():
        raise ValueError(f"{file} not found")
    if file.suffix not in PICKLES:
        raise ValueError(f"{file} is no pickled checkpoint: allowed are {', '.join(PICKLES)}")
    if out.suffix != ".safetensors":
        raise ValueError(f"{out}: the result's name must end in .safetensors")
    if out.exists():
        raise ValueError(f"{out} exists already: move it, or give another --out")
    handle, name = tempfile.mkstemp(dir=out.parent if str(out.parent) else ".", prefix=f".{out.name}.", suffix=".tmp")
    os.close(handle)
    environment = {key: value for key, value in os.environ.items() if key != "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"}
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
    try:
        child = subprocess.run(
            [
                sys.executable,
                "-c",
                "import sys; from lesion.sd import convert; sys.exit(convert.child(*sys.argv[1:]))",
                str(file),
                name,
            ],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            check=False,
            env=environment,
        )
        if child.returncode:
            said = child.stderr.strip().splitlines() or [f"the converting process ended with {child.returncode}"]
            raise ValueError(f"{file} was not converted: {said[-1]}")
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        os.replace(name, out)
    finally:
        Path(name).unlink(missing_ok=True)
    return f"{file} -> {out}: {child.stdout.strip()}"


def child(file: str, out: str) -> int:
    """What the other process does: read `file` with weights_only, write its tensors to `out`; 0, or 1 with the reason
    on stderr."""
    from safetensors.torch import save_file
    try:
        tensors, left_out = tensors_of(read(Path(file)))
        save_file(tensors, out, metadata={"format": "pt"})
    except Exception as error:  # torch raises by what is wrong with the file: it ends in one line
        print(" ".join(str(error).split()) or type(error).__name__, file=sys.stderr)
        return 1
    what = (
        f"; left out, as no tensors: {', '.join(left_out[:6])}{' ...' if len(left_out) > 6 else ''}" if left_out else ""
    )
    print(f"{len(tensors)} tensors{what}")
    return 0


def read(file: Path) -> object:
    """The pickled object, read with weights_only; every class that is not torch's is an empty one. ValueError for what
    could act."""
    import torch
    stood_in, lists = {}, set()
    while True:
        try:
            with torch.serialization.safe_globals([(kind, name) for name, kind in stood_in.items()]):
                return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            appended = re.search(r"Can only append to lists, but got <class '[\w.]*\.(\w+)'>", str(error))
            if appended and appended[1] not in lists:  # a list's class: stood in for by one
                lists.add(appended[1])
                stood_in = {name: _stand_in(name, lists) for name in stood_in}
                continue
            match = re.search(
                r"GLOBAL (\S+) was not an allowed global|unsupported GLOBAL (\S+) whose module", str(error)
            )
            if match is None:
                raise ValueError(f"it is damaged, or no checkpoint that torch can read ({_last(error)})") from None
            name = match[1] or match[2]
            name = name if "." in name else f"builtins.{name}"
            if ATTACKS.fullmatch(name) or match[2] or len(stood_in) > MOST_CLASSES:
                raise ValueError(
                    f"it names {name}, which could act when opened and has no place among weights: do not trust the "
                    "file"
                ) from None
            stood_in[name] = _stand_in(name, lists)


def _stand_in(name: str, lists: set[str]) -> type:
    short = name.rpartition(".")[2]
    return type(short, (Empty, list) if short in lists else (Empty,), {})


def _last(error: Exception) -> str:
    lines = [
        line.strip() for line in str(error).splitlines() if line.strip() and "documentation of torch.load" not in line
    ]
    return (lines[-1] if lines else type(error).__name__)[:200]


class Empty:
    """Stands in for a pickled class: takes every argument and every state, and does nothing."""

    def __new__(cls, *_, **__):
        return super().__new__(cls)

    def __init__(self, *_, **__):
        pass

    def __setstate__(self, state):
        pass


def tensors_of(loaded: object) -> tuple[dict, list[str]]:
    """{name: tensor}, each with memory of its own, and the names of what else stood beside them. ValueError if there
    are no tensors."""
    import torch
    beside = []
    if isinstance(loaded, dict) and not any(isinstance(value, torch.Tensor) for value in loaded.values()):
        key = next((key for key in DICTS if isinstance(loaded.get(key), dict)), None)
        if key is None:
            raise ValueError(
                f"it holds no tensors: its entries are {', '.join(map(str, list(loaded)[:8]))}"
                if loaded
                else "it holds no tensors"
            )
        beside = [str(other) for other in loaded if other != key]
        loaded = loaded[key]
    elif isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        beside = [str(key) for key in loaded if key != "state_dict"]
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict):
        raise ValueError(f"it holds {type(loaded).__name__}, not weights by name")
    tensors, seen = {}, set()
    for key, value in loaded.items():
        if not isinstance(value, torch.Tensor) or not isinstance(key, str):
            beside.append(str(key))
            continue
        if value.is_sparse or value.is_quantized or value.is_complex():
            raise ValueError(f"tensor {key} is sparse, quantised or complex, which safetensors does not hold")
        value = value.detach().contiguous()
        place = (value.untyped_storage().data_ptr(), value.untyped_storage().nbytes())
        whole = place[1] == value.numel() * value.element_size()
        if place in seen or not whole:  # shared memory, which safetensors does not hold, or a part of something larger
            value = value.clone()
        seen.add(place)
        tensors[key] = value
    if not tensors:
        raise ValueError("it holds no tensors")
    return tensors, beside
