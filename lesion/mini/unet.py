"""Stage `unet` of `python -m lesion pretrain`: a small vocabulary, the text encoder and the U-Net of `mini`, trained together.

Reads OUT/vae (stage one) and the sentences of the prepared data set; writes the rest of an SD 1.5 folder. The loss is noise
prediction (arXiv:2006.11239, eq. 14) with min-SNR weights (arXiv:2303.09556). Proven by tests/mini/test_unet.py and
tests/mini/test_pretrain.py.
"""
import re
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lesion.describe import prompts
from lesion.mini import loop
from lesion.mini import vae as autoencoder
from lesion.mini.loop import Recipe, Sitting
from lesion.run import cli, devices, files, sheets
from lesion.sd import checkpoint, fast, pipeline, schedule
from lesion.sd.clip import CLIPTextConfig, CLIPTextEncoder, Tokenizer
from lesion.sd.unet import UNet, UNetConfig
from lesion.sd.vae import to_images_u8
from lesion.train.latents import encode, plan
from lesion.train.setup import Texts
from lesion.train.step import Denoiser, draw_step, noise_error, posterior_sample

WIDTHS, HEADS, GROUPS = (48, 80, 96, 80), 4, 8
TEXT_WIDTH, TEXT_MLP, TEXT_LAYERS = 128, 384, 3
VIEWS = (0, 4)  # as it is, and mirrored: fourteen thousand pictures to encode
MIN_SNR_GAMMA = 5.0
BEGIN, END = "<|startoftext|>", "<|endoftext|>"


def byte_symbols() -> list[str]:
    """The 256 printable stand-ins for bytes, in the order of CLIP's vocabulary (GPT-2's byte-level scheme)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + n) for n in range(len(rest))]


def vocabulary_words() -> list[str]:
    """Every word, digit and sign that a sentence of the prompt grammar can hold, as CLIP's tokenizer splits text."""
    phrases = [v.phrase for a in prompts.VOCABULARY.values() for v in a.values] + [a.none_phrase for a in prompts.VOCABULARY.values()]
    text = " ".join([*prompts.FIXED_PROMPT.values(), *phrases, "with and throughout", ",."]).lower()
    return re.findall(r"[a-z]+|[0-9]|[^\sa-z0-9]+", text)


def byte_pairs(words: list[str]) -> list[tuple[str, str]]:
    """Merges that make every word one token: always the most frequent neighbouring pair next (arXiv:1508.07909, algorithm 1)."""
    spelt = {word: [*word[:-1], word[-1] + "</w>"] for word in words}
    count, merges = Counter(words), []
    while True:
        pairs: Counter = Counter()
        for word, symbols in spelt.items():
            for pair in zip(symbols, symbols[1:]):
                pairs[pair] += count[word]
        if not pairs:
            return merges
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for symbols in spelt.values():
            i = 0
            while i < len(symbols) - 1:
                if (symbols[i], symbols[i + 1]) == best:
                    symbols[i:i + 2] = ["".join(best)]
                i += 1


def write_tokenizer(folder: Path) -> int:
    """Write vocab.json, merges.txt and tokenizer_config.json in CLIP's format; the size of the vocabulary."""
    merges = byte_pairs(vocabulary_words())
    symbols = byte_symbols()
    tokens = [*symbols, *(s + "</w>" for s in symbols), *("".join(pair) for pair in merges), BEGIN, END]
    files.write_json(folder / "vocab.json", {token: number for number, token in enumerate(tokens)})
    files.write_bytes(folder / "merges.txt", ("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges)).encode())
    files.write_json(folder / "tokenizer_config.json", {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": END,
                                                        "bos_token": BEGIN, "eos_token": END, "unk_token": END})
    return len(tokens)


def build(vocabulary: int, seed: int) -> Denoiser:
    """Randomly initialised U-Net and text encoder; the text encoder's weights at CLIP's scale (normal, 0.02)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = UNet(UNetConfig(WIDTHS, cross_attention_dim=TEXT_WIDTH, heads=HEADS, norm_num_groups=GROUPS))
        text_encoder = CLIPTextEncoder(CLIPTextConfig(vocabulary, TEXT_WIDTH, TEXT_MLP, TEXT_LAYERS, 4))
        for parameter in text_encoder.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)
        nn.init.zeros_(unet.conv_out.weight)
    return Denoiser(unet.to(memory_format=torch.channels_last), text_encoder)


# ------------------------------------------------------------------------------------------------------------ training

def train(recipe: Recipe, sitting: Sitting) -> None:
    """Stage unet, from its checkpoint if there is one; whenever a sitting ends, the averaged weights are written.

    With --start the networks begin with that model's weights: its latents must be those of OUT/vae. ValueError otherwise.
    """
    images_u8, rows = loop.benign_training_tiles(sitting.data, 128)
    vae = autoencoder.load(sitting.out)
    count = len(rows) - loop.CHECK_TILES
    tile_of_step, views = schedule_of_tiles(rows[:count], recipe)
    held = np.array([(i, 0) for i in range(count, len(rows))])
    pairs = np.concatenate([np.unique(np.stack([tile_of_step.ravel(), views.ravel()], 1), axis=0), held])
    with devices.first_rank_first(sitting.rank, sitting.world):
        mean, logvar = encode(vae, images_u8, pairs, sitting.data / ".cache", torch.device("cpu"),
                              lambda items: cli.progress(items, desc="latents", unit="tile"))
        vocabulary = write_tokenizer(sitting.out / "tokenizer")
    model = build(vocabulary, recipe.seed)
    if sitting.start:
        begin_with(model, sitting.start, vae)
    fast.use(model.unet, model.text_encoder)
    shared, part = devices.distributed(model, sitting.world, torch.device("cpu")), slice(sitting.rank, None, sitting.world)
    sd = checkpoint.StableDiffusion(model.unet, vae, model.text_encoder, Tokenizer(sitting.out / "tokenizer"), str(sitting.out))
    texts = Texts(sd, [row["text"] for row in rows], trained=True)

    def losses(step: int) -> dict[str, Tensor]:
        tile, view = tile_of_step[step], views[step]
        draws = draw_step(recipe.seed, step, (recipe.batch_size, *mean.shape[2:]), caption_dropout=recipe.caption_dropout)
        latents = posterior_sample(mean[tile, view], logvar[tile, view], draws.posterior, sd.latent_scale)[part]
        with devices.autocast(torch.device("cpu"), recipe.precision):
            error = noise_error(shared, latents.to(memory_format=torch.channels_last), draws.noise[part], draws.timesteps[part],
                                **texts(tile[part], draws.dropped[part]))
        return {"loss": (schedule.min_snr_weight(draws.timesteps[part], MIN_SNR_GAMMA) * error).mean()}

    def check(step: int, ema: dict[str, Tensor]) -> dict[str, float]:
        with loop.averaged(model, ema):
            sample_sheet(sd, rows, sitting.out / "samples" / f"unet-{step:06d}.png")
            return {"check_error": check_error(sd, model, mean[count:, 0], texts(np.arange(count, len(rows))), recipe.seed)}

    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    ema, sittings, _ = loop.train(loop.Stage("unet", model, optimizer, losses, check, {}), recipe, sitting)
    if sitting.rank == 0:
        export(sitting.out, model, ema, loop.origin(rows, sittings))


def schedule_of_tiles(rows: list[dict], recipe: Recipe) -> tuple[np.ndarray, np.ndarray]:
    """(tile, view) of every step, int64 [steps, B]: equally often, or with rare_power tiles of rare words more often."""
    shape = (recipe.steps, recipe.batch_size)
    tile, number = plan(len(rows), recipe.batch_size, recipe.steps, recipe.seed, len(VIEWS))
    if recipe.rare_power:
        weights = loop.rare_weights(rows, recipe.rare_power)
        tile = np.random.default_rng([recipe.seed, 6]).choice(len(rows), shape, p=weights / weights.sum())
    return tile, np.array(VIEWS)[number]


def begin_with(model: Denoiser, folder: Path, vae: nn.Module) -> None:
    """Load the U-Net and text encoder of another model of this kind. ValueError if its encoder makes other latents."""
    other = checkpoint.load(str(folder))
    own, theirs = vae.state_dict(), other.vae.state_dict()
    if any(not torch.equal(own[key], theirs[key]) for key in own if key.startswith(("encoder.", "quant_conv."))):
        raise ValueError(f"--start {folder} was trained on latents of another autoencoder than OUT/vae: train from scratch")
    model.unet.load_state_dict(other.unet.state_dict())
    model.text_encoder.load_state_dict(other.text_encoder.state_dict())


@torch.no_grad()
def check_error(sd: checkpoint.StableDiffusion, model: Denoiser, mean: Tensor, texts: dict, seed: int) -> float:
    """Unweighted noise prediction error on latent means [N,4,h,w] with their texts, at fixed timesteps and noise."""
    t = torch.arange(len(mean)) * schedule.STEPS // len(mean)
    latents = sd.latent_scale * mean
    noise = torch.randn(latents.shape, generator=devices.generator(seed, 0, 8))
    return noise_error(model, latents, noise, t, **texts).mean().item()


@torch.no_grad()
def sample_sheet(sd: checkpoint.StableDiffusion, rows: list[dict], path: Path, count: int = 24, guidance_scale: float = 3.0) -> None:
    """A contact sheet of tiles drawn from the held-back tiles' sentences, fixed seeds."""
    some = [row["text"] for row in rows[-count:]]
    context, negative = pipeline.encode_prompts(sd, some), pipeline.encode_prompts(sd, [""] * count)
    latents = pipeline.draw(sd, context, negative, list(range(count)), 128, steps=30, guidance_scale=guidance_scale)
    sheets.save_png(path, sheets.contact_sheet(to_images_u8(pipeline.decode(sd, latents))))


def export(out: Path, model: Denoiser, ema: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write OUT/unet, OUT/text_encoder, OUT/scheduler and OUT/model_index.json from the averaged weights, float16."""
    cross = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
    files.write_json(out / "unet" / "config.json", {
        "_class_name": "UNet2DConditionModel", "in_channels": 4, "out_channels": 4, "sample_size": 16, "layers_per_block": 2,
        "block_out_channels": list(WIDTHS), "cross_attention_dim": TEXT_WIDTH, "attention_head_dim": HEADS, "norm_num_groups": GROUPS,
        "down_block_types": cross, "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3})
    vocabulary = model.text_encoder.config.vocab_size
    files.write_json(out / "text_encoder" / "config.json", {
        "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "vocab_size": vocabulary, "hidden_size": TEXT_WIDTH,
        "intermediate_size": TEXT_MLP, "num_hidden_layers": TEXT_LAYERS, "num_attention_heads": 4, "max_position_embeddings": 77,
        "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 1, "projection_dim": TEXT_WIDTH})
    files.write_json(out / "scheduler" / "scheduler_config.json", {
        "_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False,
        "num_train_timesteps": 1000, "set_alpha_to_one": False, "steps_offset": 1, "prediction_type": "epsilon"})
    files.write_json(out / "model_index.json", {
        "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.6.0", "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"], "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"], "scheduler": ["diffusers", "DDIMScheduler"], "safety_checker": [None, None],
        "feature_extractor": [None, None], "requires_safety_checker": False})
    for name, stem in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        state = {key.removeprefix(name + "."): value for key, value in ema.items() if key.startswith(name + ".")}
        loop.write_weights(out / name / f"{stem}.safetensors", state, metadata)
