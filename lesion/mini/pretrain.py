"""`python -m lesion pretrain`: how the built-in base model `mini` was made.

Stage vae: the autoencoder of arXiv:2112.10752 on benign training tiles, with a loss that asks for exact colour and for the
right amount of texture. Stage unet (lesion/mini/unet.py): tokenizer, text encoder and U-Net on its latents.
Both are resumable to the bit: every random number is keyed by (seed, step). Proven by tests/mini/test_pretrain.py.
"""
import json
import sys
import time
from pathlib import Path

from lesion.run import cli, files, folders, lock, sums

FREE = ("data", "out", "resume", "change_flags", "stop_at", "stop_after_minutes", "checkpoint_every", "features", "samples")
VAE_WIDTHS, GROUPS = (16, 48, 80, 96), 8
CHECK_TILES = 256  # training tiles held back to watch the loss; `val` is never opened here


def parse(argv: list[str]):
    parser = cli.Parser(prog="lesion pretrain", description="Train the built-in base model from the benign training tiles of a "
                        "prepared data set (split `train` only).")
    group = parser.add_argument_group("what")
    group.add_argument("--data", type=Path, required=True, help="prepared data set")
    group.add_argument("--out", type=Path, required=True, help="folder of the model: SD 1.5's layout, checkpoints, logs, samples")
    group.add_argument("--stage", choices=("vae", "unet", "check"), required=True, help="vae, then unet (reads OUT/vae); check measures")
    group.add_argument("--resume", action="store_true", help="go on from OUT's newest checkpoint")
    group.add_argument("--change-flags", action="store_true", help="with --resume: the recipe may differ from the checkpoint's")
    group = parser.add_argument_group("recipe")
    group.add_argument(
        "--steps", type=cli.number(int, low=1), default=10000, help="optimizer steps; the learning rate falls to 0 at the last"
    )
    group.add_argument("--batch-size", type=cli.number(int, low=1), default=8, help="tiles (vae: crops) a step")
    group.add_argument("--lr", type=cli.number(float, above=0), default=1e-3, help="peak learning rate of AdamW")
    group.add_argument("--warmup-steps", type=cli.number(int, low=0), default=200, help="steps of linear warm-up")
    group.add_argument("--ema", type=cli.number(float, low=0, high=0.99999), default=0.999, help="decay of the weights' moving average")
    group.add_argument("--crop", type=int, choices=(64, 128), default=64, help="vae: side of the random crops in pixels")
    group.add_argument("--kl-weight", type=cli.number(float, low=0), default=5e-4, help="vae: weight of the KL term per latent value")
    group.add_argument("--chroma-weight", type=cli.number(float, low=0), default=3.0, help="vae: of colour errors over brightness errors")
    group.add_argument("--chroma-field", type=cli.number(float, low=0), default=0.1, help="vae: spread of random local colour, of 2")
    group.add_argument("--square-weight", type=cli.number(float, low=0), default=5.0, help="vae: of squared over absolute colour errors")
    group.add_argument("--texture-weight", type=cli.number(float, low=0), default=0.5, help="vae: weight of the texture-energy term")
    group.add_argument("--caption-dropout", type=cli.number(float, low=0, high=1), default=0.1, help="unet: share of empty captions")
    group.add_argument("--seed", type=cli.number(int, low=0), default=0, help="of everything random")
    group.add_argument("--features", type=Path, help="check: baseline classifier (model.safetensors) to compare tiles by")
    group.add_argument("--samples", type=Path, nargs="+", metavar="DIR", help="check: judge these folders of generate.py")
    group = parser.add_argument_group("while it runs")
    group.add_argument("--checkpoint-every", type=cli.number(int, low=1), default=500, help="steps between checkpoints and checks")
    group.add_argument("--stop-at", type=cli.number(int, low=1), default=None, help="checkpoint and stop after this step, to change a flag")
    group.add_argument("--stop-after-minutes", type=cli.number(float, above=0), default=None, help="checkpoint and stop after so long")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    args = parse(argv)
    from lesion.run import devices
    devices.keep_freed_memory()
    if args.stage == "check":
        from lesion.mini import check, samples
        for row in samples.check(args) if args.samples else [check.check(args)]:
            print(json.dumps(row))
        return
    with lock.owner(args.out), sums.over(args.out):
        if args.stage == "vae":
            train_vae(args)
        else:
            from lesion.mini import unet
            unet.train(args)


def learning_rate(args, step: int) -> float:
    """Linear warm-up, then a half cosine to 0 at the last step."""
    from lesion.run.optim import warmup_cosine
    return warmup_cosine(args.lr, step, args.steps, args.warmup_steps)


def ema_update(ema: dict, model, decay: float, step: int) -> None:
    """ema <- d ema + (1 - d) weights, with d = min(decay, (1 + step) / (10 + step)) so that early averages forget the start."""
    import torch
    d = min(decay, (1 + step) / (10 + step))
    with torch.no_grad():
        torch._foreach_lerp_(list(ema.values()), list(model.state_dict().values()), 1 - d)


def benign_training_tiles(data: Path, resolution: int):
    """Tiles of the benign training rows: (uint8 [N,R,R,3], rows), the last CHECK_TILES held back by the caller."""
    from lesion.tiles.decode import load_tiles
    rows = [row for row in files.read_manifest(data) if row.get("split") == "train" and row.get("label") == "benign"]
    if len(rows) < 2 * CHECK_TILES:
        raise ValueError(f"{data} has {len(rows)} benign training tiles; at least {2 * CHECK_TILES} are needed")
    tiles = load_tiles(data, rows, resolution, progress=cli.progress)
    return tiles.images_u8, tiles.rows


def augmented_crops(images_u8, args, step: int):
    """pixels [B,3,crop,crop] of step `step`: random tiles, crops, dihedral views, and for half of them a colour gain.

    The gain (per channel, +-30 % overall, +-10 % between channels) shows the autoencoder more skin tones than the archive has.
    `--chroma-field` adds a smooth random field of Cb and Cr to half of the crops. In skin, hue follows brightness nearly everywhere,
    so an autoencoder need not encode it, and a grey lesion comes out red-brown; with the field it must.
    """
    import torch

    from lesion.run import devices
    from lesion.sd.vae import to_pixels
    from lesion.tiles.views import dihedral
    g = devices.generator(args.seed, step)
    chosen = torch.randint(len(images_u8) - CHECK_TILES, (args.batch_size,), generator=g)
    corners = torch.randint(images_u8.shape[1] - args.crop + 1, (args.batch_size, 2), generator=g).tolist()
    views = torch.randint(8, (args.batch_size,), generator=g).tolist()
    gain = torch.exp(torch.empty(args.batch_size, 1, 1, 1).uniform_(-0.5, 0.2, generator=g)
                     + torch.empty(args.batch_size, 3, 1, 1).uniform_(-0.1, 0.1, generator=g))
    gain[torch.rand(args.batch_size, generator=g) < 0.5] = 1.0
    pixels = torch.cat([
        dihedral(to_pixels(images_u8[i:i + 1, top:top + args.crop, left:left + args.crop]), view)
        for i, (top, left), view in zip(chosen.tolist(), corners, views)])
    pixels = (pixels + 1) * gain - 1
    if args.chroma_field:
        field = torch.randn(args.batch_size, 2, 4, 4, generator=g) * args.chroma_field
        field = torch.nn.functional.interpolate(field, size=args.crop, mode="bicubic")
        field[torch.rand(args.batch_size, generator=g) < 0.5] = 0.0
        pixels = pixels + torch.einsum("oc,bchw->bohw", pixels.new_tensor([[0, 1.402], [-0.344, -0.714], [1.772, 0]]), field)
    return pixels.clamp(-1, 1)


def vae_loss(decoded, pixels, mean, logvar, args):
    """L1 + L1 and squares at 1/4 size in Y, Cb, Cr (exact colour) + L1 of gradients (edges) + texture energy + KL to N(0, I).

    Skin varies far more in brightness than in hue, and an autoencoder left alone spends its four channels on brightness: tones
    come out right and colours do not. So errors of Cb and Cr (ITU-R BT.601) count `chroma_weight` times.
    Absolute errors alone leave the small, dark lesion too pale, for it is rare; squares (`square_weight`) count large errors more.
    Texture energy compares the local root mean square of the high-pass image (pixels minus 3x3 mean) in 8x8 windows: how much
    fine texture there is, not where each grain lies, which eight-fold compression cannot keep.
    """
    import torch
    import torch.nn.functional as F
    error = decoded - pixels
    weights = error.new_tensor([[0.299, 0.587, 0.114], [-0.169, -0.331, 0.5], [0.5, -0.419, -0.081]])
    weights = weights * error.new_tensor([[1.0], [args.chroma_weight], [args.chroma_weight]])
    coarse = torch.einsum("oc,bchw->bohw", weights, F.avg_pool2d(error, 4))
    color = (coarse.abs() + args.square_weight * coarse.square()).sum(1).mean() / 2
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()

    def energy(x):
        high = x - F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        return (F.avg_pool2d(high.square(), 8, stride=4) + 1e-6).sqrt()
    texture = (energy(decoded) - energy(pixels)).abs().mean()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    parts = {"l1": error.abs().mean(), "color": color, "edges": edges, "texture": texture, "kl": kl}
    loss = parts["l1"] + color + 0.5 * edges + args.texture_weight * texture + args.kl_weight * kl
    return loss, parts


def train_vae(args) -> None:
    import torch

    from lesion.run import devices
    from lesion.sd.vae import VAE, VAEConfig
    images_u8, rows = benign_training_tiles(args.data, 128)
    args.out.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng():
        torch.manual_seed(args.seed)
        vae = VAE(VAEConfig(VAE_WIDTHS, norm_num_groups=GROUPS)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    ema = {key: value.clone() for key, value in vae.state_dict().items()}
    first = resume(args, "vae", vae, ema, optimizer)
    began, last = time.monotonic(), first
    bar = cli.progress(range(first, args.steps), initial=first, total=args.steps, desc="vae", unit="step")
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args, step)
        pixels = augmented_crops(images_u8, args, step).to(memory_format=torch.channels_last)
        mean, logvar = vae.encode(pixels)
        noise = torch.randn(mean.shape, generator=devices.generator(args.seed, step, 1))
        loss, parts = vae_loss(vae.decode(mean + (0.5 * logvar).exp() * noise), pixels, mean, logvar, args)
        if not torch.isfinite(loss):
            raise ValueError(f"loss is {loss.item()} at step {step}: lower --lr; the last checkpoint is kept")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        ema_update(ema, vae, args.ema, step)
        if step % 50 == 0:
            bar.set_postfix_str(f"loss {loss.item():.4f}")
        stop = step + 1 == args.stop_at or (args.stop_after_minutes and (time.monotonic() - began) / 60 > args.stop_after_minutes)
        if (step + 1) % args.checkpoint_every == 0 or step + 1 == args.steps or stop:
            last = step + 1
            quality = check_vae(vae, ema, images_u8[-CHECK_TILES:], args.out / "samples" / f"vae-{last:06d}.png")
            files.append_jsonl(args.out / "vae.jsonl", {"step": last, "lr": learning_rate(args, step), "loss": loss.item(),
                                                        **{k: v.item() for k, v in parts.items()}, **quality})
            save_checkpoint(args, "vae", vae, ema, optimizer, last)
            bar.write(f"step {last}: " + " ".join(f"{key} {value:.3f}" for key, value in quality.items()))
        if stop:
            break
    if last == args.steps:
        export_vae(args, vae, ema, images_u8[:-CHECK_TILES], rows)


def save_checkpoint(args, stage: str, model, ema: dict, optimizer, step: int) -> None:
    from lesion.run.optim import optimizer_tensors
    from lesion.run.state import grouped, save_state
    tensors = grouped(model=model.state_dict(), ema=ema, optimizer=optimizer_tensors(optimizer))
    save_state(args.out / f"{stage}.checkpoint.safetensors", tensors, {"step": step, "recipe": recipe_of(args)}, keep_last=True)


def recipe_of(args) -> dict[str, str]:
    """The flags that decide the weights."""
    return {name: str(value) for name, value in sorted(vars(args).items()) if name not in FREE}


def resume(args, stage: str, model, ema: dict, optimizer) -> int:
    """Step to go on from: 0, or the newest whole checkpoint's; the log is cut to it. Refuses to overwrite a checkpoint unless
    --resume is given, and other flags than it was made with unless --change-flags is."""
    from lesion.run.optim import load_optimizer_tensors
    from lesion.run.state import fitting, load_newest, of_group, previous_of
    path = args.out / f"{stage}.checkpoint.safetensors"
    if not args.resume and (path.exists() or previous_of(path).exists()):
        raise ValueError(f"{path} exists: give --resume to go on, or another --out")
    found = load_newest(path) if args.resume else None
    folders.cut_metrics(args.out / f"{stage}.jsonl", found[1]["step"] if found else 0)
    if found is None:
        return 0
    tensors, meta, notes = found
    with fitting(path):
        changed = [f"{name} was {meta['recipe'].get(name)}, now {value}" for name, value in recipe_of(args).items()
                   if meta["recipe"].get(name) != value]
        model.load_state_dict(of_group(tensors, "model"))
        averages = of_group(tensors, "ema")
        for key, value in ema.items():
            value.copy_(averages[key])
        load_optimizer_tensors(optimizer, of_group(tensors, "optimizer"))
    if changed and not args.change_flags:
        raise ValueError(f"{path} was made with other flags: {', '.join(changed)}; give the same ones, or --change-flags")
    for note in [*notes, *(f"from step {meta['step']} on: {change}" for change in changed)]:
        print(note, file=sys.stderr)
    return meta["step"]


def check_vae(vae, ema: dict, images_u8, picture: Path) -> dict:
    """PSNR and texture of the averaged weights on held-back tiles, and a sheet of pairs (tile above its reconstruction)."""
    import copy

    import numpy as np
    import torch

    from lesion.run import sheets
    from lesion.sd.vae import to_images_u8, to_pixels
    averaged = copy.deepcopy(vae).eval()
    averaged.load_state_dict(ema)
    with torch.no_grad():
        latents = [averaged.encode(to_pixels(batch)) for batch in np.array_split(images_u8[:64], 8)]
        rebuilt = np.concatenate([to_images_u8(averaged.decode(mean)) for mean, _ in latents])
    mean = torch.cat([mean for mean, _ in latents])
    sheets.save_png(
        picture, sheets.contact_sheet(np.concatenate([np.concatenate([images_u8[i : i + 8], rebuilt[i : i + 8]]) for i in (0, 8)]))
    )
    real = images_u8[:64]
    return {"psnr": psnr(real, rebuilt), "psnr_color": psnr(chroma(real), chroma(rebuilt)),
            "high_frequency": high_frequency_ratio(real, rebuilt),
            **{f"latent_std_{c}": mean[:, c].std().item() for c in range(4)},
            "posterior_std": torch.cat([(0.5 * logvar).exp() for _, logvar in latents]).mean().item()}


def chroma(images_u8):
    """Cb and Cr (ITU-R BT.601) of uint8 RGB, as floats."""
    import numpy as np
    return images_u8 @ np.array([[-0.169, 0.5], [-0.331, -0.419], [0.5, -0.081]])


def psnr(images_u8, other_u8) -> float:
    """Mean over tiles of 10 log10(255^2 / mean squared error), in dB."""
    import numpy as np
    error = ((images_u8.astype(np.float64) - other_u8) ** 2).mean(axis=(1, 2, 3))
    return float((10 * np.log10(255**2 / np.maximum(error, 1e-9))).mean())


def high_frequency_ratio(images_u8, other_u8, low: float = 0.125) -> float:
    """Power above `low` cycles a pixel (finer than 8 px, about 1 mm) of `other_u8`'s luminance, over that of `images_u8`."""
    import numpy as np

    def power(images):
        grey = images.astype(np.float64) @ [0.299, 0.587, 0.114]
        window = np.hanning(grey.shape[1])[:, None] * np.hanning(grey.shape[2])
        spectrum = np.abs(np.fft.rfft2((grey - grey.mean((1, 2), keepdims=True)) * window)) ** 2
        radius = np.hypot(np.fft.fftfreq(grey.shape[1])[:, None], np.fft.rfftfreq(grey.shape[2]))
        return spectrum[:, radius > low].sum()
    return float(power(other_u8) / power(images_u8))


def export_vae(args, vae, ema: dict, images_u8, rows: list[dict]) -> None:
    """Write OUT/vae in SD 1.5's layout, float16, with each latent channel at mean 0 and one common unit, so that SD 1.5's
    scaling factor 0.18215 gives unit variance.

    The change of scale is exact: it is folded into the 1x1 convolutions quant_conv and post_quant_conv
    (mean' = (mean - m) / s, logvar' = logvar - 2 log s, and back).
    """
    import numpy as np
    import torch
    from safetensors.torch import save

    from lesion.run.state import in_order
    from lesion.sd.vae import LATENT_SCALE, to_pixels
    vae.load_state_dict(ema)
    vae.eval()
    with torch.no_grad():
        means = torch.cat([vae.encode(to_pixels(batch))[0] for batch in np.array_split(images_u8[:1024], 128)])
        center, unit = means.mean((0, 2, 3)), means.std((0, 2, 3)) * LATENT_SCALE
        encode, decode = vae.quant_conv, vae.post_quant_conv
        encode.weight[:4] /= unit[:, None, None, None]
        encode.bias[:4] = (encode.bias[:4] - center) / unit
        encode.bias[4:] -= 2 * unit.log()
        decode.bias += decode.weight[:, :, 0, 0] @ center
        decode.weight *= unit[None, :, None, None]
    files.write_json(args.out / "vae" / "config.json", {
        "_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3, "latent_channels": 4, "layers_per_block": 2,
        "block_out_channels": list(VAE_WIDTHS), "norm_num_groups": GROUPS, "scaling_factor": LATENT_SCALE, "sample_size": 128,
        "act_fn": "silu", "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4})
    weights = save({key: value.half().contiguous() for key, value in vae.state_dict().items()}, metadata=origin(args, rows))
    files.write_bytes(args.out / "vae" / "diffusion_pytorch_model.safetensors", in_order(weights))


def origin(args, rows: list[dict]) -> dict[str, str]:
    """What the weights' metadata says of their making: data and its licence, commit, seed, steps."""
    from lesion.run.state import provenance
    made = provenance()
    return {"format": "pt", "lesion_data_sha256": files.sha256_json(sorted(row["file_name"] for row in rows)),
            "lesion_data": f"{len(rows)} benign training tiles", "lesion_git_commit": str(made["git_commit"]),
            "lesion_recipe": str(recipe_of(args)),
            "lesion_torch": made["torch"], "license": "MIT; trained on images under CC-BY 4.0",
            "attribution": "International Skin Imaging Collaboration. SLICE-3D 2024 Permissive Challenge Dataset, "
                           "https://doi.org/10.34970/2024-slice-3d-permissive (2024), CC-BY 4.0. Images from Memorial Sloan Kettering "
                           "Cancer Center, FNQH Cairns, The University of Queensland, Melanoma Institute Australia and University of "
                           "Athens Medical School."}
