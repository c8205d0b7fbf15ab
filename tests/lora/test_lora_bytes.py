"""A LoRA file's bytes depend on its content alone; strangers' files with impossible parts are refused."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from lesion.lora import formats, layers

NETWORKS = {"unet": nn.ModuleDict({"attn1": nn.ModuleDict({"to_q": nn.Linear(6, 5), "to_k": nn.Linear(6, 5)})})}
NAME, KEY = "unet.attn1.to_q", "lora_unet_attn1_to_q"


def factors(rank: int = 2) -> layers.Factors:
    g = torch.Generator().manual_seed(0)
    return layers.Factors(torch.randn(rank, 6, generator=g), torch.randn(5, rank, generator=g), 3.0)


@pytest.mark.parametrize("layout", formats.FORMATS)
def test_equal_content_gives_equal_bytes(tmp_path, layout):
    """Equal factors and metadata give one file, whatever order they come in (safetensors itself writes metadata in
    random order, so that equal runs would differ in their LoRA's hash); the file stays valid and aligned."""
    metadata = {f"lesion_{name}": f"h\u00e9 {name}" for name in "abcdefghijkl"}
    content = {NAME: factors(), "unet.attn1.to_k": factors(3)}
    written = set()
    for attempt in range(6):
        turned = dict(reversed(metadata.items())) if attempt % 2 else metadata
        formats.write(tmp_path / "a.safetensors", content, turned, layout)
        written.add((tmp_path / "a.safetensors").read_bytes())
    assert len(written) == 1
    assert int.from_bytes(written.pop()[:8], "little") % 8 == 0
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert metadata.items() <= file.metadata().items()
    back, _ = formats.read(tmp_path / "a.safetensors", NETWORKS)
    assert torch.equal(back[NAME].down, content[NAME].down)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{KEY}.alpha": torch.tensor([1.0, 2.0])}, "alpha one number"),
        (
            {f"{KEY}.lora_down.weight": torch.zeros(0, 6), f"{KEY}.lora_up.weight": torch.zeros(5, 0)},
            "rank must be at least 1",
        ),
        ({f"{KEY}.lora_down.weight": torch.tensor(1.0)}, "rank must be at least 1"),
        ({f"{KEY}.alpha": torch.tensor(torch.inf)}, "NaN or infinity"),
    ],
)
def test_impossible_parts_are_refused(tmp_path, change, message):
    """An alpha of two numbers, rank 0 and 0-dim factors each end in one line, not in a traceback."""
    kohya = {f"{KEY}.lora_down.weight": factors().down, f"{KEY}.lora_up.weight": factors().up}
    save_file({**kohya, **change}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=message) as error:
        formats.read(tmp_path / "a.safetensors", NETWORKS)
    assert "\n" not in str(error.value)


def test_a_dotted_alpha_is_read(tmp_path):
    """diffusers refuses it and ComfyUI reads it; ignoring it would lose the scale."""
    dotted = {f"{NAME}.lora_A.weight": factors().down, f"{NAME}.lora_B.weight": factors().up, f"{NAME}.alpha": torch.tensor(0.5)}
    save_file(dotted, tmp_path / "a.safetensors")
    assert formats.read(tmp_path / "a.safetensors", NETWORKS)[0][NAME].alpha == 0.5
