"""LoHa, LoKr, DoRA, rsLoRA and LoCon: what peft trains and saves draws the same here, and LyCORIS' files give LyCORIS'
formulas."""
import shutil

import pytest
import torch
from safetensors.torch import save_file

from lesion.lora import formats, layers
from lesion.sd import checkpoint, names

TARGETS = ["to_q", "to_v", "attn2.to_out.0", "conv1", "proj_in"]


def inputs():
    g = torch.Generator().manual_seed(3)
    return torch.randn(2, 4, 16, 16, generator=g), torch.tensor([17, 803]), torch.randn(2, 77, 64, generator=g)


@pytest.fixture(scope="module")
def sd(tiny):
    return checkpoint.load(tiny / "folder")


def predict(tiny, path, **more):
    """Our noise prediction with the LoRA of `path`, merged."""
    sd = checkpoint.load(tiny / "folder")
    networks = {"unet": sd.unet, "text_encoder": sd.text_encoder}
    factors, _ = formats.read(path, networks, **more)
    combined = layers.combine([(factors, 1.0)])
    for name, network in networks.items():
        layers.set_factors(network, layers.of_network(combined, name))
        layers.merge(network)
    with torch.no_grad():
        return sd.unet(*inputs())


def adapter(tiny, config):
    """diffusers' U-Net with peft's adapter of `config`, every one of its numbers moved away from its start."""
    from diffusers import UNet2DConditionModel
    from peft import get_peft_model
    model = get_peft_model(UNet2DConditionModel.from_pretrained(tiny / "folder" / "unet"), config)
    g = torch.Generator().manual_seed(0)
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=g)
            parameter.data = parameter.data * (1 + 0.2 * noise) if "magnitude" in key else 0.2 * noise
    return model.eval()


def configs():
    from peft import LoHaConfig, LoKrConfig, LoraConfig
    some = dict(target_modules=TARGETS)
    return {
        "lora": LoraConfig(r=4, lora_alpha=16, **some), "rslora": LoraConfig(r=4, lora_alpha=6, use_rslora=True, **some),
        "dora": LoraConfig(r=4, lora_alpha=16, use_dora=True, **some),
        "patterns": LoraConfig(r=4, lora_alpha=16, rank_pattern={"attn2.to_v": 2, "conv1": 3}, alpha_pattern={"attn2.to_v": 5}, **some),
        "loha": LoHaConfig(r=4, alpha=6, **some), "loha large": LoHaConfig(r=16, alpha=6, **some),
        "loha conv": LoHaConfig(r=4, alpha=6, use_effective_conv2d=True, **some),
        "lokr": LoKrConfig(r=4, alpha=6, **some), "lokr both": LoKrConfig(r=2, alpha=6, decompose_both=True, decompose_factor=4, **some),
        "lokr conv": LoKrConfig(r=2, alpha=6, use_effective_conv2d=True, **some),
    }  # fmt: skip


@pytest.mark.parametrize(
    "kind", ["lora", "rslora", "dora", "patterns", "loha", "loha large", "loha conv", "lokr", "lokr both", "lokr conv"]
)
def test_what_peft_saves_draws_the_same(tiny, tmp_path, sd, kind):
    """peft's own forward and ours on its save_pretrained, linear layers, 1x1 and 3x3 convolutions; a tenth of alpha
    would show."""
    model = adapter(tiny, configs()[kind])
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        x, t, context = inputs()
        expected = model(x, t, context).sample
        plain = sd.unet(x, t, context)
    ours = predict(tiny, tmp_path)
    assert (expected - plain).abs().max() > 0.1
    assert (ours - expected).abs().max() < 1e-4 * max(1.0, expected.abs().max().item())


def test_two_adapters_in_one_folder_are_one_lora(tiny, tmp_path, sd):
    """unet/ and text_encoder/ of peft beside each other; each part's own config counts."""
    from peft import LoraConfig, get_peft_model
    from transformers import CLIPTextModel
    model = adapter(tiny, configs()["lora"])
    model.save_pretrained(tmp_path / "unet")
    text = get_peft_model(
        CLIPTextModel.from_pretrained(tiny / "folder" / "text_encoder"),
        LoraConfig(r=2, lora_alpha=10, target_modules=["q_proj"]),
    )
    for key, parameter in text.named_parameters():
        if "lora_B" in key:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    text.save_pretrained(tmp_path / "text_encoder")
    networks = {"unet": sd.unet, "text_encoder": sd.text_encoder}
    factors, _ = formats.read(tmp_path, networks)
    scales = {name.split(".")[0]: part.alpha / len(part.down) for name, part in factors.items()}
    assert scales == {"unet": 4.0, "text_encoder": 5.0}
    assert len(formats.files(tmp_path)) == 2
    with pytest.raises(ValueError, match="holds a LoRA in 2 files"):
        formats.find(tmp_path)


def test_a_renamed_adapter_keeps_its_strength(tiny, tmp_path):
    """The file renamed within its folder: the config beside it is found. Copied away without it: refused until
    --lora-alpha says."""
    model = adapter(tiny, configs()["lora"])
    model.save_pretrained(tmp_path / "a")
    expected = predict(tiny, tmp_path / "a")
    (tmp_path / "a" / "adapter_model.safetensors").rename(tmp_path / "a" / "skin.safetensors")
    assert torch.equal(predict(tiny, tmp_path / "a" / "skin.safetensors"), expected)
    assert torch.equal(predict(tiny, tmp_path / "a"), expected)
    shutil.copy(tmp_path / "a" / "skin.safetensors", tmp_path / "alone.safetensors")
    with pytest.raises(ValueError, match="does not say how strong it is .* --lora-alpha N"):
        predict(tiny, tmp_path / "alone.safetensors")
    assert torch.equal(predict(tiny, tmp_path / "alone.safetensors", alpha=16.0), expected)


# --- LyCORIS' files --------------------------------------------------------------------------------------------------

LINEAR, CONV = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "down_blocks.0.resnets.0.conv1"
G = torch.Generator().manual_seed(5)


def rand(*shape):
    return torch.randn(*shape, generator=G) * 0.1


def read_one(sd, tmp_path, path, tensors):
    """The full update that a file with one module's tensors gives."""
    save_file(
        {f"lora_unet_{path.replace('.', '_')}.{key}": value.contiguous() for key, value in tensors.items()},
        tmp_path / "a.safetensors",
    )
    factors, _ = formats.read(tmp_path / "a.safetensors", {"unet": sd.unet, "text_encoder": sd.text_encoder})
    layer = sd.unet.get_submodule(path)
    ours = (layers.LoRALinear if layer.weight.ndim == 2 else layers.LoRAConv2d)(
        layer, len(factors[f"unet.{path}"].down), 1.0
    )
    part = factors[f"unet.{path}"]
    ours.scale = part.alpha / len(part.down)
    ours.lora_down.weight.data, ours.lora_up.weight.data = part.down, part.up
    return ours.delta()


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    assert expected.abs().max() > 1e-3


@pytest.mark.parametrize("rank", [2, 4, 16])
def test_loha(sd, tmp_path, rank):
    """alpha / r (w1_a w1_b) * (w2_a w2_b), on a linear layer and on a 3x3 convolution; small ranks stay factors, large
    ones do not."""
    for path in (LINEAR, CONV):
        shape = sd.unet.get_submodule(path).weight.shape
        flat = shape[0], shape[1:].numel()
        t = {"hada_w1_a": rand(flat[0], rank), "hada_w1_b": rand(rank, flat[1]), "hada_w2_a": rand(flat[0], rank),
             "hada_w2_b": rand(rank, flat[1]), "alpha": torch.tensor(3.0)}
        expected = 3 / rank * ((t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])).reshape(shape)
        close(10 * read_one(sd, tmp_path, path, t), 10 * expected)


def test_loha_cp(sd, tmp_path):
    """hada_t1, hada_t2: each factor is sum_ij t[i,j] w_a[i,out] w_b[j,in]."""
    out, inside, *kernel = sd.unet.get_submodule(CONV).weight.shape
    t = {
        f"hada_{name}": rand(4, size) * 5
        for name, size in (("w1_a", out), ("w1_b", inside), ("w2_a", out), ("w2_b", inside))
    }
    t |= {"hada_t1": rand(4, 4, *kernel) * 5, "hada_t2": rand(4, 4, *kernel) * 5, "alpha": torch.tensor(2.0)}
    w1, w2 = (torch.einsum("ijkl,jr,ip->prkl", t[f"hada_t{n}"], t[f"hada_w{n}_b"], t[f"hada_w{n}_a"]) for n in (1, 2))
    close(read_one(sd, tmp_path, CONV, t), 0.5 * w1 * w2)


@pytest.mark.parametrize(
    ("kind", "scale"),
    [("whole", 1.0), ("w2 low", 1.5), ("both low", 1.5), ("conv", 1.0), ("conv low", 1.5), ("cp", 1.5)],
)
def test_lokr(sd, tmp_path, kind, scale):
    """alpha / r kron(w1, w2); where neither is decomposed the scale is 1 whatever alpha says, as in LyCORIS, ComfyUI
    and A1111."""
    path = CONV if kind in ("conv", "conv low", "cp") else LINEAR
    shape = sd.unet.get_submodule(path).weight.shape
    out, inside, kernel = shape[0] // 4, shape[1] // 4, tuple(shape[2:])
    t = {"lokr_w1": rand(4, 4) * 5, "lokr_w2": rand(out, inside, *kernel), "alpha": torch.tensor(3.0)}
    if kind == "both low":
        t |= {"lokr_w1_a": rand(4, 2) * 5, "lokr_w1_b": rand(2, 4) * 5}
        t["lokr_w1_full"] = t["lokr_w1_a"] @ t["lokr_w1_b"]
        del t["lokr_w1"]
    if "low" in kind:
        t |= {"lokr_w2_a": rand(out, 2), "lokr_w2_b": rand(2, inside * torch.Size(kernel).numel())}
        t["lokr_w2"] = (t["lokr_w2_a"] @ t["lokr_w2_b"]).reshape(out, inside, *kernel)
    if kind == "cp":
        t |= {"lokr_t2": rand(2, 2, *kernel) * 5, "lokr_w2_a": rand(2, out), "lokr_w2_b": rand(2, inside)}
        t["lokr_w2"] = torch.einsum("ijkl,jr,ip->prkl", t["lokr_t2"], t["lokr_w2_b"], t["lokr_w2_a"])
    w1, w2 = t.pop("lokr_w1_full", None), t["lokr_w2"]
    w1 = t["lokr_w1"] if w1 is None else w1
    if "lokr_w2_a" in t:
        del t["lokr_w2"]
    expected = torch.stack([torch.cat([w1[i, j] * w2 for j in range(4)], dim=1) for i in range(4)]).flatten(
        0, 1
    )  # kron, block by block
    close(read_one(sd, tmp_path, path, t), scale * expected)


@pytest.mark.parametrize("path", [LINEAR, CONV])
@pytest.mark.parametrize("axis", [0, 1])
def test_dora_scale(sd, tmp_path, path, axis):
    """LyCORIS' dora_scale [out,1,..] over each output's weights, [1,in,..] over each input's: m (W + dW) / |W + dW|."""
    weight = sd.unet.get_submodule(path).weight.detach()
    out, inside, *kernel = weight.shape
    shape = [1] * weight.ndim
    shape[axis] = weight.shape[axis]
    t = {
        "lora_down.weight": rand(4, inside, *kernel),
        "lora_up.weight": rand(out, 4, *[1] * len(kernel)),
        "alpha": torch.tensor(2.0),
    }
    t["dora_scale"] = 1 + rand(*shape).abs()
    changed = weight + 0.5 * torch.einsum("or,r...->o...", t["lora_up.weight"].flatten(1), t["lora_down.weight"])
    others = [dim for dim in range(weight.ndim) if dim != axis]
    expected = t["dora_scale"] * changed / changed.square().sum(others, keepdim=True).sqrt() - weight
    close(read_one(sd, tmp_path, path, t), expected)


def test_dora_on_loha(sd, tmp_path):
    """LyCORIS decomposes LoHa and LoKr by DoRA too."""
    weight = sd.unet.get_submodule(LINEAR).weight.detach()
    t = {
        "hada_w1_a": rand(32, 4),
        "hada_w1_b": rand(4, 32),
        "hada_w2_a": rand(32, 4),
        "hada_w2_b": rand(4, 32),
        "dora_scale": 1 + rand(32, 1).abs(),
    }
    changed = weight + (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])
    close(read_one(sd, tmp_path, LINEAR, t), t["dora_scale"] * changed / changed.norm(dim=1, keepdim=True) - weight)


def test_locon_with_cp(sd, tmp_path):
    """LoCon's lora_mid: up (mid (down)), each rank and alpha of its own; alpha as bf16, as [1] and as a whole
    number."""
    out, inside, *kernel = sd.unet.get_submodule(CONV).weight.shape
    for alpha in (torch.tensor(2.0, dtype=torch.bfloat16), torch.tensor([2.0]), torch.tensor(2, dtype=torch.int64)):
        t = {
            "lora_down.weight": rand(4, inside, 1, 1),
            "lora_mid.weight": rand(4, 4, *kernel),
            "lora_up.weight": rand(out, 4, 1, 1),
            "alpha": alpha,
        }
        expected = 0.5 * torch.einsum(
            "op,pjkl,ji->oikl", t["lora_up.weight"][:, :, 0, 0], t["lora_mid.weight"], t["lora_down.weight"][:, :, 0, 0]
        )
        close(read_one(sd, tmp_path, CONV, t), expected)


# --- names -----------------------------------------------------------------------------------------------------------

def kohya(sd, tmp_path):
    """A kohya file on attention, 3x3 convolutions, time embeddings and the text encoder: LoCon; and its tensors."""
    tensors = {}
    for network, prefix in ((sd.unet, "lora_unet_"), (sd.text_encoder, "lora_te_")):
        for path, module in network.named_modules():
            if path.endswith(
                (
                    "attn1.to_q",
                    "to_out.0",
                    "resnets.0.conv1",
                    "downsamplers.0.conv",
                    "time_emb_proj",
                    "proj_out",
                    "fc1",
                    "q_proj",
                )
            ):
                out, inside, *kernel = module.weight.shape
                key = prefix + path.replace(".", "_")
                tensors |= {
                    f"{key}.lora_down.weight": rand(3, inside, *kernel),
                    f"{key}.lora_up.weight": rand(out, 3, *[1] * len(kernel)),
                    f"{key}.alpha": torch.tensor(1.5),
                }
    save_file(tensors, tmp_path / "kohya.safetensors")
    return tensors


def rename(sd, tensors, spell):
    """The same tensors with every module's name spelt by spell(network, path, LDM path)."""
    paths = [path for path, module in sd.unet.named_modules() if hasattr(module, "weight")]
    ldm = {
        key.removesuffix(".weight"): value.removeprefix(names.UNET).removesuffix(".weight")
        for key, value in names.ldm_unet_keys([f"{path}.weight" for path in paths], sd.unet.config).items()
    }
    renamed = {}
    for network, prefix, module in (("unet", "lora_unet_", sd.unet), ("text", "lora_te_", sd.text_encoder)):
        for path, _ in module.named_modules():
            for ending in ("lora_down.weight", "lora_up.weight", "alpha"):
                key = f"{prefix}{path.replace('.', '_')}.{ending}"
                if key in tensors:
                    renamed[f"{spell(network, path, ldm.get(path, ''))}.{ending}"] = tensors[key]
    assert len(renamed) == len(tensors)
    return renamed


SPELLINGS = {
    "LDM under kohya's prefix": lambda network, path, ldm: ("lora_unet_" if ldm else "lora_te_") + (ldm or path).replace(".", "_"),
    "ComfyUI": lambda network, path, ldm: f"diffusion_model.{ldm}" if ldm else f"text_encoders.clip_l.transformer.{path}",
    "LyCORIS' wrapper": lambda network, path, ldm: f"lycoris_{path.replace('.', '_')}",
    "dotted diffusers with alpha": lambda network, path, ldm: f"{'unet' if ldm else 'text_encoder'}.{path}",
    "bare": lambda network, path, ldm: path, "checkpoint's": lambda network, path, ldm: f"model.diffusion_model.{ldm}" if ldm else path,
}  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_names_resolve(tiny, sd, tmp_path, spelling):
    """LDM's, ComfyUI's and the other spellings of one LoRA's modules draw what kohya's draw, alpha included."""
    tensors = kohya(sd, tmp_path)
    expected = predict(tiny, tmp_path / "kohya.safetensors")
    save_file(rename(sd, tensors, SPELLINGS[spelling]), tmp_path / "other.safetensors")
    assert torch.equal(predict(tiny, tmp_path / "other.safetensors"), expected)
    with torch.no_grad():
        assert (expected - sd.unet(*inputs())).abs().max() > 0.05


def test_locon_equals_diffusers(tiny, sd, tmp_path):
    """diffusers' own loader draws the same from the LoCon file: convolutions, time embeddings, text encoder."""
    from diffusers import StableDiffusionPipeline
    kohya(sd, tmp_path)
    pipe = StableDiffusionPipeline.from_pretrained(tiny / "folder", safety_checker=None)
    pipe.load_lora_weights(tmp_path, weight_name="kohya.safetensors")
    with torch.no_grad():
        x, t, context = inputs()
        expected = pipe.unet(x, t, context).sample
    torch.testing.assert_close(predict(tiny, tmp_path / "kohya.safetensors"), expected, rtol=0, atol=5e-5)
