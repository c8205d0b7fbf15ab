"""How strong a LoRA is: from its tensors, its metadata, its config, --lora-alpha, or not known and then said."""
import json
import time

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lesion.lora import formats

NETWORKS = {"unet": nn.ModuleDict({"attn1": nn.ModuleDict({"to_q": nn.Linear(6, 5), "to_k": nn.Linear(6, 5)})})}
RANK = 2


def lora(path, style="base_model.model.", metadata=None, rank=RANK):
    """A LoRA of two modules in peft's or diffusers' names; its path."""
    g = torch.Generator().manual_seed(0)
    tensors = {}
    for name in ("to_q", "to_k"):
        tensors[f"{style}attn1.{name}.lora_A.weight"] = torch.randn(rank, 6, generator=g)
        tensors[f"{style}attn1.{name}.lora_B.weight"] = torch.randn(5, rank, generator=g)
    save_file(tensors, path, metadata)
    return path


def config(folder, **entries):
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": 16, **entries})
    , encoding="utf-8")


def scales(path, **more):
    return {
        name.split(".")[-1]: part.alpha / len(part.down)
        for name, part in formats.read(path, NETWORKS, **more)[0].items()
    }


def refusal(path):
    started = time.monotonic()
    with pytest.raises(ValueError) as error:
        formats.read(path, NETWORKS)
    assert "\n" not in str(error.value)
    assert time.monotonic() - started < 2
    return str(error.value)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "skin.safetensors", "x y.safetensors"])
def test_the_config_beside_any_name(tmp_path, name):
    """A renamed adapter keeps its strength: 16 / 2, not 1."""
    config(tmp_path)
    assert scales(lora(tmp_path / name)) == {"to_q": 8, "to_k": 8}


def test_nothing_says_it(tmp_path):
    """peft's names without a config: refused, with the flag; diffusers' names: scale 1, as diffusers reads them, and
    said."""
    peft, diffusers = lora(tmp_path / "a.safetensors"), lora(tmp_path / "b.safetensors", "unet.")
    assert "does not say how strong it is" in refusal(peft)
    assert scales(peft, alpha=6.0) == {"to_q": 3, "to_k": 3}
    notes = []
    assert scales(diffusers, notes=notes) == {"to_q": 1, "to_k": 1}
    assert "says no alpha for 2 of 2 modules: read at scale 1" in notes[0]
    assert "--lora-alpha N" in notes[0]
    assert scales(diffusers, alpha=6.0) == {"to_q": 3, "to_k": 3}
    ours = lora(
        tmp_path / "c.safetensors", "unet.", {"lesion_step": "3"}
    )  # our own diffusers layout has the scale baked in
    assert scales(ours, notes=(quiet := [])) == {"to_q": 1, "to_k": 1}
    assert quiet == []


def test_what_is_said_wins(tmp_path):
    """--lora-alpha does not override a file that says its own alpha, and says so."""
    config(tmp_path)
    notes = []
    assert scales(lora(tmp_path / "a.safetensors"), alpha=1.0, notes=notes) == {"to_q": 8, "to_k": 8}
    assert "says its own alpha: --lora-alpha 1 was not used" in notes[0]


def test_patterns_and_rslora(tmp_path):
    """alpha_pattern by name, by ending, by peft's simple patterns; rsLoRA divides by the root of the rank."""
    for pattern in ("to_q", "attn1.to_q", "attn\\d.to_q", ".*to_q", "^attn1.to_q$"):
        config(tmp_path, alpha_pattern={pattern: 4})
        assert scales(lora(tmp_path / "a.safetensors")) == {"to_q": 2, "to_k": 8}, pattern
    config(tmp_path, alpha_pattern={"o_q": 4, "to": 4})  # not an ending at a dot
    assert scales(lora(tmp_path / "a.safetensors")) == {"to_q": 8, "to_k": 8}
    config(tmp_path, use_rslora=True)
    assert scales(lora(tmp_path / "a.safetensors"))["to_q"] == pytest.approx(16 / 2**0.5)


def test_metadata_of_diffusers(tmp_path):
    """lora_adapter_metadata, a network's entries under its prefix."""
    said = json.dumps(
        {"unet.r": 2, "unet.lora_alpha": 5, "unet.target_modules": ["to_q"], "text_encoder.lora_alpha": 99}
    )
    assert scales(lora(tmp_path / "a.safetensors", "unet.", {"lora_adapter_metadata": said})) == {
        "to_q": 2.5,
        "to_k": 2.5,
    }


def test_another_files_config(tmp_path):
    """A config of another rank belongs to another file."""
    config(tmp_path, r=8)
    assert "has rank 2 and the adapter's config says 8: it is another file's config" in refusal(
        lora(tmp_path / "a.safetensors")
    )
    config(tmp_path, r=8, rank_pattern={"to_q": 2, "to_k": 2})
    assert scales(lora(tmp_path / "a.safetensors")) == {"to_q": 8, "to_k": 8}


BAD = [
    {"lora_alpha": "16"},
    {"lora_alpha": None, "alpha": []},
    {"lora_alpha": float("nan")},
    {"lora_alpha": True},
    {"r": 0},
    {"r": "2"},
    {"r": 2.5},
    {"alpha_pattern": [1]},
    {"alpha_pattern": {"to_q": "x"}},
    {"alpha_pattern": {"(a+)+b": 1}},
    {"alpha_pattern": {"(x+x+)+y": 1}},
    {"alpha_pattern": {"a" * 1000: 1}},
    {"alpha_pattern": {".*.*.*.*to_q": 1}},
    {"alpha_pattern": {str(i): 1 for i in range(5000)}},
    {"rank_pattern": {"[": 1}},
    {"peft_type": "OFT"},
    {"bias": "all"},
    {"fan_in_fan_out": True},
    {"init_lora_weights": "pissa"},
    {"init_lora_weights": "olora"},
    {"layer_replication": [[0, 2]]},
    {"modules_to_save": ["conv_in"]},
    {"lora_bias": True},
    {"use_qalora": True},
    {"alora_invocation_tokens": [3]},
    {"use_dora": True},
    {"an_option_of_tomorrow": 3},
]


@pytest.mark.parametrize("entries", BAD, ids=lambda entries: str(entries)[:40])
def test_configs_are_not_believed(tmp_path, entries):
    """Numbers that are none, patterns that never end, another adapter, another start (which changes the base), options
    that are not known: refused in one line, at once."""
    config(tmp_path, **entries)
    message = refusal(lora(tmp_path / "a.safetensors"))
    assert any(key in message for key in entries)
    said = json.dumps({f"unet.{key}": value for key, value in {"r": 2, "lora_alpha": 4, **entries}.items()})
    assert refusal(lora(tmp_path / "b.safetensors", "unet.", {"lora_adapter_metadata": said}))


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "[]", "3", "null", '{"a":' * 50_000, ""])
def test_json_that_is_none(tmp_path, text):
    """adapter_config.json and lora_adapter_metadata that are not JSON objects, or nested without end."""
    (tmp_path / "adapter_config.json").write_text(text, encoding="utf-8")
    assert "adapter_config.json" in refusal(lora(tmp_path / "a.safetensors"))
    assert "lora_adapter_metadata" in refusal(
        lora(tmp_path / "b.safetensors", "unet.", {"lora_adapter_metadata": text})
    )


@pytest.mark.parametrize(
    "metadata",
    [
        {"modelspec.prediction_type": "v"},
        {"ss_v_parameterization": "True"},
        {"ss_v2": "True"},
        {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"},
        {"modelspec.unheard_of": "1"},
    ],
)
def test_a_lora_of_another_prediction(tmp_path, metadata):
    """A LoRA of a v-prediction or SD 2 model says so in its metadata: refused, the entry named."""
    assert next(iter(metadata)) in refusal(lora(tmp_path / "a.safetensors", "unet.", metadata))


def test_clip_skip_is_noted(tmp_path):
    """A LoRA trained on an earlier layer of the text encoder draws, and it is said."""
    notes = []
    assert scales(lora(tmp_path / "a.safetensors", "unet.", {"ss_clip_skip": "2", "lesion_step": "1"}), notes=notes)
    assert "was trained with clip skip '2'" in notes[0]
