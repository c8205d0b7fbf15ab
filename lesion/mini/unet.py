"""Second stage of `python -m lesion pretrain`: a small vocabulary, the text encoder and the U-Net of `mini`, trained together.

Reads OUT/vae (stage one) and the sentences of the prepared data set; writes the rest of an SD 1.5 folder. The loss is noise
prediction (arXiv:2006.11239, eq. 14) with min-SNR weights (arXiv:2303.09556). Proven by tests/mini/test_pretrain.py.
"""
import re
import time
from collections import Counter

import numpy as np
import torch
from torch import nn

from lesion.describe import prompts
from lesion.mini import pretrain
from lesion.run import cli, devices, files, sheets
from lesion.sd import checkpoint, pipeline, schedule
from lesion.sd.clip import CLIPTextConfig, CLIPTextEncoder, Tokenizer
from lesion.sd.unet import UNet, UNetConfig
from lesion.sd.vae import to_images_u8
from lesion.train.latents import encode, plan
from lesion.train.setup import Texts
from lesion.train.step import Denoiser, posterior_sample

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


def write_tokenizer(folder) -> int:
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


def train(args) -> None:
    images_u8, rows = pretrain.benign_training_tiles(args.data, 128)
    vae = load_vae(args.out)
    count = len(rows) - pretrain.CHECK_TILES
    chosen, view_number = plan(count, args.batch_size, args.steps, args.seed, len(VIEWS))
    views = np.array(VIEWS)[view_number]
    check = [(i, 0) for i in range(count, len(rows))]
    pairs = np.concatenate([np.unique(np.stack([chosen.ravel(), views.ravel()], 1), axis=0), check])
    mean, logvar = encode(vae, images_u8, pairs, args.data / ".cache", torch.device("cpu"),
                                lambda items: cli.progress(items, desc="latents", unit="tile"))
    tokenizer_folder = args.out / "tokenizer"
    model = build(write_tokenizer(tokenizer_folder), args.seed)
    tokenizer = Tokenizer(tokenizer_folder)
    sd = checkpoint.StableDiffusion(model.unet, vae, model.text_encoder, tokenizer, str(args.out))
    texts = Texts(sd, [row["text"] for row in rows], trained=True, say=print)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    ema = {key: value.clone() for key, value in model.state_dict().items()}
    first = pretrain.resume(args, "unet", model, ema, optimizer)
    began, last = time.monotonic(), first
    bar = cli.progress(range(first, args.steps), initial=first, total=args.steps, desc="unet", unit="step")
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = pretrain.learning_rate(args, step)
        g = devices.generator(args.seed, step)
        tile, view = chosen[step], views[step]
        shape = (args.batch_size, *mean.shape[2:])
        timesteps = torch.randint(schedule.STEPS, (args.batch_size,), generator=g)
        noise, posterior = torch.randn(shape, generator=g), torch.randn(shape, generator=g)
        dropped = torch.rand(args.batch_size, generator=g) < args.caption_dropout
        latents = posterior_sample(mean[tile, view], logvar[tile, view], posterior, sd.latent_scale)
        noisy = schedule.add_noise(latents, noise, timesteps).to(memory_format=torch.channels_last)
        error = (model(noisy, timesteps, texts(tile, dropped)) - noise).square().mean(dim=(1, 2, 3))
        loss = (schedule.min_snr_weight(timesteps, MIN_SNR_GAMMA) * error).mean()
        if not torch.isfinite(loss):
            raise ValueError(f"loss is {loss.item()} at step {step}: lower --lr; the last checkpoint is kept")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        pretrain.ema_update(ema, model, args.ema, step)
        if step % 50 == 0:
            bar.set_postfix_str(f"loss {loss.item():.4f}")
        stop = step + 1 == args.stop_at or (args.stop_after_minutes and (time.monotonic() - began) / 60 > args.stop_after_minutes)
        if (step + 1) % args.checkpoint_every == 0 or step + 1 == args.steps or stop:
            last = step + 1
            held = {"check_error": check_error(sd, model, ema, mean, texts, check, args)}
            files.append_jsonl(
                args.out / "unet.jsonl", {"step": last, "lr": pretrain.learning_rate(args, step), "loss": loss.item(), **held}
            )
            pretrain.save_checkpoint(args, "unet", model, ema, optimizer, last)
            with averaged(model, ema):
                sample_sheet(sd, rows, args, args.out / "samples" / f"unet-{last:06d}.png")
            bar.write(f"step {last}: error on held-back training tiles {held['check_error']:.4f}")
        if stop:
            break
    export(args, model, ema, rows, tokenizer_folder)


def load_vae(folder):
    """OUT/vae as the loader reads it. ValueError where stage one has not ended."""
    from lesion.sd import weights
    from lesion.sd.vae import VAE, VAEConfig
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    if not path.is_file():
        raise ValueError(f"{path} is missing: run --stage vae first")
    with torch.device("meta"):
        vae = VAE(VAEConfig(pretrain.VAE_WIDTHS, norm_num_groups=pretrain.GROUPS))
    weights.assign(vae, weights.read(path)[0], path, {})
    return vae.float().eval().requires_grad_(False)


class averaged:
    """A context in which the model has its averaged weights."""

    def __init__(self, model: nn.Module, ema: dict):
        self.model, self.ema = model, ema

    def __enter__(self) -> None:
        self.kept = {key: value.clone() for key, value in self.model.state_dict().items()}
        self.model.load_state_dict(self.ema)

    def __exit__(self, *_) -> None:
        self.model.load_state_dict(self.kept)


@torch.no_grad()
def check_error(sd, model, ema, mean, texts, check, args) -> float:
    """Unweighted noise prediction error of the averaged weights on the held-back training tiles, fixed timesteps and noise."""
    tile = np.array([i for i, _ in check])
    t = torch.arange(len(tile)) * schedule.STEPS // len(tile)
    latents = sd.latent_scale * mean[tile, 0]
    noise = torch.randn(latents.shape, generator=devices.generator(args.seed, 0, 8))
    with averaged(model, ema):
        noise_pred = model(schedule.add_noise(latents, noise, t), t, texts(tile, torch.zeros(len(tile), dtype=torch.bool)))
    return (noise_pred - noise).square().mean().item()


@torch.no_grad()
def sample_sheet(sd, rows, args, path, count: int = 24, guidance_scale: float = 3.0) -> None:
    """Tiles drawn from the held-back tiles' sentences, fixed seeds."""
    some = [row["text"] for row in rows[-count:]]
    context, negative = pipeline.encode_prompts(sd, some), pipeline.encode_prompts(sd, [""] * count)
    latents = pipeline.draw(sd, context, negative, list(range(count)), 128, steps=30, guidance_scale=guidance_scale)
    sheets.save_png(path, sheets.contact_sheet(to_images_u8(pipeline.decode(sd, latents))))


def export(args, model: Denoiser, ema: dict, rows: list[dict], tokenizer_folder) -> None:
    """Write OUT/unet, OUT/text_encoder, OUT/scheduler and OUT/model_index.json from the averaged weights, float16."""
    from safetensors.torch import save_file
    cross = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
    files.write_json(args.out / "unet" / "config.json", {
        "_class_name": "UNet2DConditionModel", "in_channels": 4, "out_channels": 4, "sample_size": 16, "layers_per_block": 2,
        "block_out_channels": list(WIDTHS), "cross_attention_dim": TEXT_WIDTH, "attention_head_dim": HEADS, "norm_num_groups": GROUPS,
        "down_block_types": cross, "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3})
    vocabulary = model.text_encoder.config.vocab_size
    files.write_json(args.out / "text_encoder" / "config.json", {
        "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "vocab_size": vocabulary, "hidden_size": TEXT_WIDTH,
        "intermediate_size": TEXT_MLP, "num_hidden_layers": TEXT_LAYERS, "num_attention_heads": 4, "max_position_embeddings": 77,
        "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 1, "projection_dim": TEXT_WIDTH})
    files.write_json(args.out / "scheduler" / "scheduler_config.json", {
        "_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False,
        "num_train_timesteps": 1000, "set_alpha_to_one": False, "steps_offset": 1, "prediction_type": "epsilon"})
    files.write_json(args.out / "model_index.json", {
        "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.6.0", "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"], "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"], "scheduler": ["diffusers", "DDIMScheduler"], "safety_checker": [None, None],
        "feature_extractor": [None, None], "requires_safety_checker": False})
    for name, stem in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        state = {key.removeprefix(name + "."): value.half().contiguous() for key, value in ema.items() if key.startswith(name + ".")}
        with files.atomic_path(args.out / name / f"{stem}.safetensors") as path:
            save_file(state, path, metadata=pretrain.origin(args, rows))
