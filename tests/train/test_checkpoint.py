"""A training run's state: everything comes back, the newest whole one is taken, whatever is wrong is one line that names it."""
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lesion.lora import layers
from lesion.run import devices, state
from lesion.train.checkpoint import STATE, Progress, load_checkpoint, lora_of_step, save_checkpoint
from lesion.train.step import adamw

RECIPE = SimpleNamespace(label="malignant", phase=1, resolution=128, seed=0, lora_format="kohya", data="d", rank=2, alpha=3.0, base="b",
                         lr=1e-2, clip=1.0, min_snr_gamma=None, noise_offset=0.0,
                         precision="fp16", schedule="constant", steps=20, rates=dict)
RECORD = {"base_sha256": "0", "data_sha256": "1", "tiles": 3, "tag_frequency": {}, "provenance": {"git_commit": None}}


def run():
    """(networks, optimizer, scaler) of a tiny network with LoRA."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    layers.inject(network, ["0", "1"], 2, 3.0, devices.generator(0, 0, 1))
    parameters = layers.lora_parameters(network)
    return {"unet": network}, adamw([{"params": parameters}], 1e-2, 0.01), torch.amp.GradScaler("cpu", growth_interval=5)


def learn(networks, optimizer, scaler, steps, bad=()):
    for step in range(steps):
        x = torch.randn(7, 5, generator=torch.Generator().manual_seed(step))
        scaler.scale(networks["unet"](x).square().mean()).backward()
        if step in bad:
            layers.lora_parameters(networks["unet"])[0].grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()


def saved(folder, *steps):
    """Save the state after each of `steps`; the run at the last."""
    networks, optimizer, scaler = run()
    for done in steps:
        learn(networks, optimizer, scaler, 4, bad=(1,))
        save_checkpoint(folder, RECIPE, RECORD, networks, optimizer, scaler, Progress(done, done // 4, 1))
    return networks, optimizer, scaler


def factors(networks):
    return {(name, kind): getattr(part, kind) for name, part in layers.all_factors(networks).items() for kind in ("down", "up")}


def test_everything_comes_back(tmp_path):
    """Factors, moments, progress and the loss scale with its growth count: four further steps are the same to the bit."""
    one = saved(tmp_path, 4, 8)
    two = run()
    at = load_checkpoint(tmp_path, *two)
    assert at == Progress(8, 2, 1)
    assert two[2].state_dict() == one[2].state_dict()
    assert two[2].get_scale() == 2.0**14  # two overflows: a fresh scaler would stand at 2^16
    assert two[2].state_dict()["_growth_tracker"] == 2
    for a in (one, two):
        learn(*a, 4)
    assert one[2].get_scale() == two[2].get_scale() == 2.0**15  # the scale has grown at the same step
    assert all(torch.equal(value, factors(two[0])[key]) for key, value in factors(one[0]).items())


def test_no_state_yet(tmp_path):
    """A folder without a state begins at 0, in silence if nothing was logged, and says so where something was."""
    said = []
    assert load_checkpoint(tmp_path, *run(), said.append) == Progress()
    assert said == []
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n', encoding="utf-8")
    assert load_checkpoint(tmp_path, *run(), said.append) == Progress()
    assert len(said) == 1
    assert "has no saved state, only 2 rows of its log: it begins again at step 0" in said[0]


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "deleted"])
def test_the_older_state_is_taken_and_said(tmp_path, damage):
    """One flipped bit, a cut or deleted newest state: the run goes on from the one before it, says so, and keeps the damaged one aside."""
    saved(tmp_path, 4, 8)
    path = tmp_path / STATE
    data = bytearray(path.read_bytes())
    if damage == "deleted":
        path.unlink()
    else:
        data[-40] ^= 1
        path.write_bytes({"flipped": data, "cut": data[:-9], "empty": b""}[damage])
    said = []
    assert load_checkpoint(tmp_path, *run(), said.append).step == 4
    assert len(said) == 1
    assert "checkpoint.safetensors" in said[0]
    assert "going on from the state before it, checkpoint.previous.safetensors" in said[0]
    assert (tmp_path / "checkpoint.damaged.safetensors").exists() == (damage != "deleted")
    networks, optimizer, scaler = run()
    load_checkpoint(tmp_path, networks, optimizer, scaler)
    save_checkpoint(tmp_path, RECIPE, RECORD, networks, optimizer, scaler, Progress(8))
    assert state.load_state(state.previous_of(path))[1]["step"] == 4  # the good one was not overwritten by the damaged one


def test_nothing_whole_is_left(tmp_path):
    """Both damaged: one line that names both files; no silent restart."""
    saved(tmp_path, 4, 8)
    for path in (tmp_path / STATE, state.previous_of(tmp_path / STATE)):
        path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors is damaged.* and .*\.previous\.safetensors is damaged.*remove"):
        load_checkpoint(tmp_path, *run())


@pytest.mark.parametrize("change", ["renamed tensor", "renamed moment", "renamed entry", "reshaped", "another rank", "text"])
def test_a_state_that_does_not_fit_is_one_line(tmp_path, change):
    """A whole state with a renamed, missing or other-shaped entry: a ValueError that names the file, whatever torch says of it."""
    saved(tmp_path, 4)
    tensors, meta = state.load_state(tmp_path / STATE)
    if change == "renamed tensor":
        tensors["lora.unet.0.other"] = tensors.pop("lora.unet.0.down")
    elif change == "renamed moment":
        tensors["optimizer.0.exp_average"] = tensors.pop("optimizer.0.exp_avg")
    elif change == "renamed entry":
        meta["scalar"] = meta.pop("scaler")
    elif change == "reshaped":
        tensors["optimizer.0.exp_avg"] = tensors["optimizer.0.exp_avg"].flatten()[:3]
    elif change == "another rank":
        tensors["lora.unet.0.down"] = tensors["lora.unet.0.down"][:1]
    else:
        meta["alpha"] = "three"
    state.save_state(tmp_path / STATE, tensors, meta)
    with pytest.raises(ValueError, match="checkpoint.safetensors does not fit this run") as error:
        load_checkpoint(tmp_path, *run())
    assert "\n" not in str(error.value)


def test_a_run_that_never_learnt_writes_no_lora(tmp_path):
    """All steps void: a ValueError at the end, and neither a state of the last step nor a LoRA file."""
    networks, optimizer, scaler = run()
    save_checkpoint(tmp_path, RECIPE, RECORD, networks, optimizer, scaler, Progress(10, 10, 10))  # in the middle it may yet learn
    with pytest.raises(ValueError, match="all 20 steps overflowed in fp16: nothing was learnt, no LoRA is written"):
        save_checkpoint(tmp_path, RECIPE, RECORD, networks, optimizer, scaler, Progress(20, 20, 20))
    assert not (tmp_path / "lora.safetensors").exists()
    assert not lora_of_step(tmp_path, 20).exists()
    assert json.loads(json.dumps(state.load_state(tmp_path / STATE)[1]))["step"] == 10
    save_checkpoint(tmp_path, RECIPE, RECORD, networks, optimizer, scaler, Progress(20, 19, 19))
    assert (tmp_path / "lora.safetensors").exists()


def test_metadata_tells_each_networks_rate_and_the_step():
    """kohya's fields: the U-Net's rate, the text encoder's, and the steps that this file has had."""
    from lesion.train.checkpoint import lora_metadata
    recipe = SimpleNamespace(**{**vars(RECIPE), "rates": lambda: {"unet": 1e-2, "text_encoder": 5e-3}})
    found = lora_metadata(recipe, RECORD, 12)
    assert [found[f"ss_{name}"] for name in ("learning_rate", "unet_lr", "text_encoder_lr", "steps")] == ["0.01", "0.01", "0.005", "12"]
