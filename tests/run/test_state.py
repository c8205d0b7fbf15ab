"""Keyed random numbers, saved state, optimizer state, hashes: what a resumed run stands on."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lesion.run import devices
from lesion.run.optim import load_optimizer_tensors, optimizer_tensors
from lesion.run.state import files_sha256, load_newest, load_state, previous_of, provenance, save_state, weights_sha256

# --- random numbers --------------------------------------------------------------------------------------------------


def draw(*key):
    return torch.randn(8, generator=devices.generator(*key))


def test_generators_are_keyed():
    """The same key gives the same numbers, any other key others: order, length and every part of the key count."""
    keys = [
        (0,),
        (1,),
        (0, 1),
        (1, 1),
        (1, 2),
        (2, 1),
        (0, 0, 1),
        (0, 1, 8),
        (0, 8, 1),
        (7, 1399),
        (1399, 7),
        (2**31, 1),
    ]
    draws = {tuple(draw(*key).tolist()) for key in keys}
    assert len(draws) == len(keys)
    assert all(torch.equal(draw(*key), draw(*key)) for key in keys)


def test_the_generator_leaves_the_global_one_alone():
    """Neither reads nor moves PyTorch's global random numbers."""
    before = torch.get_rng_state()
    first = draw(3, 5)
    torch.manual_seed(99)
    assert torch.equal(first, draw(3, 5))
    torch.set_rng_state(before)
    draw(3, 5)
    assert torch.equal(torch.get_rng_state(), before)


def test_trailing_zeros_do_not_count():
    """As the docstring warns: (seed,), (seed, 0) and (seed, 0, 0) are one key. The package's keys avoid the clash."""
    assert torch.equal(draw(5), draw(5, 0))
    assert torch.equal(draw(5), draw(5, 0, 0))
    assert "trailing zero" in devices.generator.__doc__.lower()
    steps = {tuple(draw(5, step).tolist()) for step in range(100)}
    others = {tuple(draw(5, 0, number).tolist()) for number in (1, 2, 8)}  # LoRA of two networks, validation noise
    assert len(steps | others) == 103


def test_consecutive_keys_are_independent():
    """Neighbouring steps and seeds are uncorrelated: |r| of 10,000 normals stays under 4 standard errors."""
    count = 10_000
    one, *others = (torch.randn(count, generator=devices.generator(*key)) for key in ((0, 1), (0, 2), (1, 1), (1, 2)))
    for other in others:
        assert abs(torch.corrcoef(torch.stack([one, other]))[0, 1].item()) < 4 / count**0.5


# --- device and precision --------------------------------------------------------------------------------------------


def test_device(monkeypatch):
    """`auto` falls back to the CPU; a CUDA device that is not there is refused with what to do."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices.device() == torch.device("cpu")
    with pytest.raises(ValueError, match="--device cpu"):
        devices.device("cuda:1")


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_autocast(precision, dtype):
    """Matrix products run in the asked precision; fp32 is no autocast at all."""
    with devices.autocast(torch.device("cpu"), precision):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is dtype


# --- saved state -----------------------------------------------------------------------------------------------------


def test_state_round_trip(tmp_path):
    """Tensors of several dtypes, strided views and 0-dim ones come back bit for bit, with their JSON."""
    base = torch.randn(4, 6)
    tensors = {
        "view": base.t()[1:, ::2],
        "shared": base,
        "scalar": torch.tensor(3.0),
        "half": base.half(),
        "int": torch.arange(3),
    }
    meta = {"step": 20, "alpha": {"unet.a": 8.0}, "scaler": {}}
    save_state(tmp_path / "state.safetensors", tensors, meta)
    back, known = load_state(tmp_path / "state.safetensors")
    assert known == meta
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[key], tensors[key]) and back[key].dtype == tensors[key].dtype for key in tensors)


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="needs /proc")
def test_a_loaded_state_maps_no_file(tmp_path):
    """Windows does not replace a mapped file: the tensors of a state are copies, so the next can take its place."""
    path = tmp_path / "state.safetensors"
    save_state(path, {"x": torch.arange(1000.0)}, {})
    tensors, _ = load_state(path)
    assert str(path) not in Path("/proc/self/maps").read_text(encoding="utf-8")
    assert tensors["x"][-1] == 999


def test_a_damaged_state_is_refused(tmp_path):
    """Truncated anywhere, foreign, or not a file: one line that names it, never a traceback or half a state."""
    path = tmp_path / "state.safetensors"
    save_state(path, {"a": torch.arange(100.0)}, {"step": 1})
    whole = path.read_bytes()
    for length in (0, 4, 8, 60, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="is damaged or not a saved state") as error:
            load_state(path)
        assert str(path) in str(error.value)
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="not a saved state"):
        load_state(path)
    with pytest.raises(ValueError, match="not a saved state"):
        load_state(tmp_path / "absent.safetensors")


# --- optimizer -------------------------------------------------------------------------------------------------------


def adamw(start):
    parameters = [nn.Parameter(x.clone()) for x in start]
    groups = [{"params": parameters[:1], "peak_lr": 1e-2}, {"params": parameters[1:], "peak_lr": 3e-3}]
    return parameters, torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1)


def step(parameters, optimizer, gradients):
    for parameter, gradient in zip(parameters, gradients):
        parameter.grad = gradient.clone() if gradient is not None else None
    optimizer.step()


def test_optimizer_state_through_a_file(tmp_path):
    """AdamW saved and loaded takes the same next steps bit for bit, one parameter without any state yet included."""
    g = torch.Generator().manual_seed(0)
    start = [torch.randn(3, 4, generator=g), torch.randn(5, generator=g), torch.randn(2, generator=g)]
    gradients = [[torch.randn(x.shape, generator=g) for x in start] for _ in range(6)]
    parameters, optimizer = adamw(start)
    for one in gradients[:3]:
        step(parameters, optimizer, [*one[:2], None])
    save_state(tmp_path / "s", optimizer_tensors(optimizer), {})

    resumed, other = adamw(parameters)
    load_optimizer_tensors(other, load_state(tmp_path / "s")[0])
    for one in gradients[3:]:
        step(parameters, optimizer, one)
        step(resumed, other, one)
    assert all(torch.equal(a, b) for a, b in zip(parameters, resumed))
    fresh, forgetful = adamw(start)  # the state matters: without it the steps differ
    step(fresh, forgetful, gradients[3])
    assert not torch.equal(fresh[0] - start[0], parameters[0] - start[0])


def test_optimizer_settings_come_from_flags(tmp_path):
    """Learning rates are not part of the saved state: a resumed run takes those of its own flags."""
    parameters, optimizer = adamw([torch.ones(2), torch.ones(2)])
    step(parameters, optimizer, [torch.ones(2), torch.ones(2)])
    saved = optimizer_tensors(optimizer)
    _, other = adamw([torch.ones(2), torch.ones(2)])
    other.param_groups[0]["lr"] = 0.5
    load_optimizer_tensors(other, saved)
    assert [group["lr"] for group in other.param_groups] == [0.5, 1e-2]
    assert [group["peak_lr"] for group in other.param_groups] == [1e-2, 3e-3]


# --- hashes and provenance -------------------------------------------------------------------------------------------


def test_weights_hash_sees_every_change():
    """One bit, one name, one dtype or one shape changes the hash; a copy does not."""

    def network(**more):
        torch.manual_seed(0)
        return nn.ModuleDict({"a": nn.Linear(3, 3, **more), "b": nn.Linear(3, 3, bias=False)})

    reference = weights_sha256(network())
    assert weights_sha256(network()) == reference
    changed = network()
    changed["b"].weight.data.view(-1).view(torch.int32)[4] ^= 1
    renamed = nn.ModuleDict({"a": network()["a"], "c": network()["b"]})
    reshaped = network()
    reshaped["b"].weight.data = reshaped["b"].weight.data.reshape(1, 9)
    hashes = [weights_sha256(x) for x in (changed, renamed, reshaped, network().half(), network(bias=False))]
    assert len({reference, *hashes}) == 6


def test_files_hash(tmp_path):
    """One file: its SHA-256. Several: the SHA-256 of the joined hex hashes, in order."""
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "b").write_bytes(b"")
    one, two = (hashlib.sha256(data).hexdigest() for data in (b"abc", b""))
    assert files_sha256([tmp_path / "a"]) == one
    assert files_sha256([tmp_path / "a", tmp_path / "b"]) == hashlib.sha256((one + two).encode()).hexdigest()
    assert files_sha256([tmp_path / "b", tmp_path / "a"]) == hashlib.sha256((two + one).encode()).hexdigest()


def test_provenance(monkeypatch):
    """A run records versions and the commit, and says where git is missing by None; all of it is JSON."""
    known = json.loads(json.dumps(provenance()))
    assert {"lesion", "git_commit", "python", "torch", "device", "command"} <= known.keys()
    assert known["torch"] == torch.__version__

    def no_git(*_, **__):
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", no_git)
    assert provenance()["git_commit"] is None


def test_peak_memory_is_this_process_own():
    """A small process started by a large one reports its own peak, and half a GiB touched is seen in it."""
    code = ("import torch; from lesion.run import devices; small = devices.peak_mem_gib(torch.device('cpu')); x = torch.ones(2**27); "
            "print(small, devices.peak_mem_gib(torch.device('cpu')))")
    here = torch.ones(3 * 2**28)  # 3 GiB, which ru_maxrss of the child would count
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=Path(__file__).parents[2], check=True, encoding="utf-8")
    small, large = map(float, done.stdout.split())
    assert here[0] == 1
    assert small < 2
    assert 0.4 < large - small < 0.7


def test_a_state_that_is_its_own_predecessor_leaves_nothing(tmp_path):
    """Killed between the two renames of a save: both names are one file, and the next save leaves no third."""
    path = tmp_path / "x.safetensors"
    save_state(path, {"a": torch.ones(1)}, {"step": 1}, keep_last=True)
    os.link(path, previous_of(path))
    save_state(path, {"a": torch.ones(1)}, {"step": 2}, keep_last=True)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["x.previous.safetensors", "x.safetensors"]
    assert load_newest(path)[1] == {"step": 2}
