"""U-Net, VAE and text encoder equal diffusers' and transformers' outputs, from either checkpoint layout; token ids equal transformers'."""
import pytest
import torch
from safetensors.torch import load_file

from lesion.sd import checkpoint

TOLERANCE = 1e-5
PROMPTS = [
    "a clinical photograph of a malignant skin lesion on light skin, dark brown with red, 6 to 9 mm across",
    "",
    "  Two   spaces\tand CAPS ",
    "naïve café, 日本語 🙂 µm²",
    "it's 12.5% - \"quoted\"; don't",
    "lesion " * 120,
    "<|endoftext|> in the middle <|startoftext|>",
]


@pytest.fixture(scope="module", params=["folder", "single.safetensors"])
def loaded(request, tiny, shared):
    return checkpoint.load(tiny / request.param, tokenizer=shared / "clip_tokenizer"), load_file(tiny / "reference.safetensors")


def difference(ours, reference):
    return (ours - reference).abs().max().item()


@torch.no_grad()
def test_unet(loaded):
    """The U-Net's noise prediction is the reference's: wrong eps, norm, skip order, GEGLU halves or time embedding all show."""
    sd, ref = loaded
    assert difference(sd.unet(ref["unet.sample"], ref["unet.timesteps"], ref["unet.context"]), ref["unet.noise_pred"]) < TOLERANCE


@torch.no_grad()
def test_vae(loaded):
    """Mean, log-variance and reconstruction are the reference's: symmetric padding or eps 1e-5 in a norm show."""
    sd, ref = loaded
    mean, logvar = sd.vae.encode(ref["vae.pixels"])
    assert difference(mean, ref["vae.mean"]) < TOLERANCE
    assert difference(logvar, ref["vae.logvar"]) < TOLERANCE
    assert difference(sd.vae.decode(ref["vae.latents"]), ref["vae.decoded"]) < TOLERANCE


@torch.no_grad()
def test_text_encoder(loaded):
    """The last hidden state is the reference's: a missing causal mask, exact GELU or missing final norm show."""
    sd, ref = loaded
    assert difference(sd.text_encoder(ref["text.token_ids"]), ref["text.context"]) < TOLERANCE


@pytest.mark.parametrize("break_it", ["vae norm eps", "vae padding", "unet transformer eps", "geglu halves", "causal mask"])
@torch.no_grad()
def test_classic_mistakes_are_seen(break_it, tiny, shared, monkeypatch):
    """The tolerance is tight enough: each mistake of well-known ports moves the output by more."""
    sd, ref = checkpoint.load(tiny / "folder"), load_file(tiny / "reference.safetensors")
    if break_it == "vae norm eps":
        for module in sd.vae.modules():
            if isinstance(module, torch.nn.GroupNorm):
                module.eps = 1e-5
        error = difference(sd.vae.encode(ref["vae.pixels"])[0], ref["vae.mean"])
    elif break_it == "vae padding":
        monkeypatch.setattr("lesion.sd.vae.Downsample2D.forward", lambda self, x: torch.nn.functional.conv2d(
            x, self.conv.weight, self.conv.bias, stride=2, padding=1))
        error = difference(sd.vae.encode(ref["vae.pixels"])[0], ref["vae.mean"])
    elif break_it == "unet transformer eps":
        for name, module in sd.unet.named_modules():
            if name.endswith(".norm") and isinstance(module, torch.nn.GroupNorm):
                module.eps = 1e-5
        error = difference(sd.unet(ref["unet.sample"], ref["unet.timesteps"], ref["unet.context"]), ref["unet.noise_pred"])
    elif break_it == "geglu halves":
        monkeypatch.setattr("lesion.sd.unet.GEGLU.forward", lambda self, x: self.proj(x).chunk(2, -1)[1] * torch.nn.functional.gelu(
            self.proj(x).chunk(2, -1)[0]))
        error = difference(sd.unet(ref["unet.sample"], ref["unet.timesteps"], ref["unet.context"]), ref["unet.noise_pred"])
    else:
        from lesion.sd import blocks
        monkeypatch.setattr("lesion.sd.clip.attention", lambda q, k, v, heads, causal: blocks.attention(q, k, v, heads))
        error = difference(sd.text_encoder(ref["text.token_ids"]), ref["text.context"])
    assert error > TOLERANCE


def test_token_ids(loaded, shared):
    """Ids are transformers' own with padding to 77 and truncation, for plain, long, unicode and empty prompts."""
    from transformers import CLIPTokenizer
    sd, _ = loaded
    reference = CLIPTokenizer.from_pretrained(shared / "clip_tokenizer")(
        PROMPTS, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    token_ids, cut = sd.tokenizer(PROMPTS)
    assert torch.equal(token_ids, reference)
    assert (token_ids[:, 0] == 49406).all()
    assert (token_ids[:, -1] == 49407).all()
    assert [bool(text) for text in cut] == [False] * 5 + [True, False]
