"""LoRA files that must not load, and never silently."""
import pytest
import torch
from safetensors.torch import load_file, save_file

from lesion.lora import formats, layers
from lesion.sd import checkpoint


@pytest.fixture(scope="module")
def sd(tiny):
    return checkpoint.load(tiny / "folder")


@pytest.fixture
def good(sd, tmp_path):
    """A kohya file on three modules."""
    g = torch.Generator().manual_seed(0)
    paths = layers.target_paths(sd.unet, "all")[:3]
    factors = {}
    for path in paths:
        base = sd.unet.get_submodule(path)
        kernel = (1, 1) if isinstance(base, torch.nn.Conv2d) else ()
        out, inside = base.weight.shape[:2]
        factors[f"unet.{path}"] = layers.Factors(
            torch.randn(2, inside, *kernel, generator=g), torch.randn(out, 2, *kernel, generator=g), 2.0
        )
    formats.write(tmp_path / "good.safetensors", factors, formats.kohya_metadata(2, 2.0))
    return tmp_path / "good.safetensors"


def read(sd, path):
    return formats.read(path, {"unet": sd.unet, "text_encoder": sd.text_encoder})


def changed(good, change):
    tensors = load_file(good)
    change(tensors)
    save_file(tensors, good.with_name("changed.safetensors"))
    return good.with_name("changed.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.update({"lora_unet_no_such_module.lora_down.weight": torch.zeros(2, 2)}),
            "match no module of this model, first lora_unet_no_such_module",
        ),
        (lambda t: t.update({"stray_lora": torch.zeros(2)}), "match no module"),
        (
            lambda t: t.update({next(iter(t)).split(".")[0] + ".dora_scale": torch.zeros(2)}),
            "a DoRA magnitude of shape",
        ),
        (lambda t: t.update({"lora_unet_mid_block_attentions_0_norm.w_norm": torch.zeros(64)}), "it holds norm layers"),
        (lambda t: t.update({next(iter(t)).split(".")[0] + ".diff": torch.zeros(2)}), "full weight differences"),
        (lambda t: t.update({next(iter(t)).split(".")[0] + ".oft_blocks": torch.zeros(2)}), "OFT or BOFT"),
        (lambda t: t.update({next(iter(t)).split(".")[0] + ".a1.weight": torch.zeros(2)}), "GLoRA"),
        (lambda t: t.update({next(iter(t)).split(".")[0] + ".on_input": torch.zeros(2)}), r"\(IA\)\^3"),
        (lambda t: t.update({"bundle_emb.mole.string_to_param.*": torch.zeros(2, 64)}), "textual-inversion embeddings"),
        (lambda t: t.update({next(iter(t)).split(".")[0] + ".lora_up.bias": torch.zeros(2)}), "it holds biases"),
        (lambda t: t.update({next(iter(t)).split(".")[0] + ".hada_w1_a": torch.zeros(2, 2)}), "do not make its weight"),
        (lambda t: t.update({next(iter(t)).split(".")[0] + ".lokr_w1": torch.zeros(2, 2)}), "do not make its weight"),
        (
            lambda t: t.update({k: v.to(torch.int32) for k, v in t.items() if "lora_up" in k}),
            "floating point is needed",
        ),
        (lambda t: t.pop(next(k for k in t if "lora_up" in k)), "both factors are needed"),
        (lambda t: t.update({k: v.fill_(torch.nan) for k, v in t.items() if "lora_up" in k}), "NaN or infinity"),
        (lambda t: t.update({k: torch.zeros(2, 99) for k in t if "to_q.lora_down" in k}), "of another model family"),
        (lambda t: t.clear(), "holds no tensors"),
    ],
)
def test_refused(sd, good, change, message):
    """Unknown keys, half modules, NaN, foreign shapes and an empty file each raise one clear line."""
    with pytest.raises(ValueError, match=message) as error:
        read(sd, changed(good, change))
    assert "\n" not in str(error.value)


def test_renamed_file_is_refused(sd, good):
    """A file whose every key is wrong (kohya's own loader would load nothing, silently) is refused."""
    tensors = {key.replace("lora_unet_", "lora_unet_x_"): value for key, value in load_file(good).items()}
    save_file(tensors, good.with_name("renamed.safetensors"))
    with pytest.raises(ValueError, match="9 of 9 keys match no module"):
        read(sd, good.with_name("renamed.safetensors"))


def test_truncated_and_missing(sd, good, tmp_path):
    """A cut file, no file, and a folder without a LoRA."""
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(good.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged"):
        read(sd, cut)
    with pytest.raises(ValueError, match="not found"):
        read(sd, tmp_path / "none.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds none of"):
        read(sd, tmp_path / "empty")
    for name in ("a", "b"):
        (tmp_path / "empty" / f"{name}.safetensors").write_bytes(good.read_bytes())
    with pytest.raises(ValueError, match="2 other .safetensors files: give one of them"):
        read(sd, tmp_path / "empty")
    (tmp_path / "old.pt").write_bytes(b"\x80\x02")
    with pytest.raises(ValueError, match="is a pickle.*python -m lesion convert"):
        read(sd, tmp_path / "old.pt")


@pytest.mark.parametrize("cut", [0, 3, 9, 40, -1])
def test_damaged_headers(sd, good, tmp_path, cut):
    """A file cut anywhere, or with another header, is one line."""
    data = good.read_bytes()
    for content in (
        data[:cut],
        b"\xff" * 8 + data[8:],
        data[:8] + b"[" * (len(data) - 8),
        data[:20] + b"\xff" + data[21:],
    ):
        (tmp_path / "bad.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match="bad.safetensors") as error:
            read(sd, tmp_path / "bad.safetensors")
        assert "\n" not in str(error.value)


def test_a_text_projection_is_noted(sd, good):
    """OneTrainer trains CLIP's text projection too, which acts after the context: no effect here, and said."""
    extra = {
        "lora_te_text_projection.lora_down.weight": torch.ones(2, 64),
        "lora_te_text_projection.lora_up.weight": torch.ones(64, 2),
    }
    notes = []
    path = changed(good, lambda tensors: tensors.update(extra))
    factors, _ = formats.read(path, {"unet": sd.unet, "text_encoder": sd.text_encoder}, notes=notes)
    assert len(factors) == 3
    assert len(notes) == 1
    assert "have no effect here, first lora_te_text_projection" in notes[0]


def test_missing_alpha_means_rank_and_flat_convolutions_load(sd, good):
    """Without alpha the scale is 1; 2-D factors for a 1x1 convolution are accepted."""
    def change(tensors):
        for key in [k for k in tensors if k.endswith("alpha")]:
            tensors.pop(key)
        for key in list(tensors):
            tensors[key] = tensors[key].flatten(1) if tensors[key].ndim == 4 else tensors[key]
    factors, _ = read(sd, changed(good, change))
    expected, _ = read(sd, good)
    for name, part in factors.items():
        assert part.alpha == 2.0
        assert torch.equal(part.down, expected[name].down)


def test_nothing_or_nan_is_never_written(tmp_path):
    """Writing refuses an empty LoRA, an unknown layout and NaN, and leaves no file."""
    bad = {"unet.a": layers.Factors(torch.full((1, 2), torch.nan), torch.zeros(2, 1), 1.0)}
    for factors, layout in (({}, "kohya"), (bad, "kohya"), (bad, "other")):
        with pytest.raises(ValueError):
            formats.write(tmp_path / "x.safetensors", factors, {}, layout)
    assert list(tmp_path.iterdir()) == []
