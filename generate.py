"""Draw synthetic tiles: Stable Diffusion 1.5 with LoRA, one PNG and one manifest row an image.

    python generate.py                                    # from the newest run of train_lora.py
    python generate.py --lora runs/malignant-phase2/lora.safetensors --prompts-from data/isic2024 --count 314 --out samples/malignant

Image i is drawn from seed SEED + i alone: the same picture at any batch size and device. An interrupted call goes on where it stopped.
Many GPUs: torchrun --nproc-per-node N generate.py ...
"""
import argparse
import json
import math
import os
import re
from pathlib import Path

from lesion.run import cli, cores, drawn, files, folders, lock, sums
from lesion.sd.samplers import SAMPLERS

GIF_TILES, GIF_FRAMES = 4, 25


def weighted_file(text: str) -> tuple[Path, float]:
    """FILE or FILE:WEIGHT."""
    path, _, weight = text.rpartition(":")
    try:
        value = float(weight) if path else 1.0
    except ValueError:
        return Path(text), 1.0
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"weight {weight} of {path}: allowed is a finite number")
    return Path(path or text), value


def parse(argv=None):
    parser = cli.Parser(prog="generate.py", description=__doc__.splitlines()[0])
    group = parser.add_argument_group("model")
    group.add_argument("--base", help="folder, .safetensors file or hub id; default: what the LoRA was trained on")
    group.add_argument("--tokenizer", type=Path, help="folder with vocab.json and merges.txt, for a single-file base")
    group.add_argument("--vae", metavar="PATH", help="folder, .safetensors file or hub id of another VAE, or for a base without one")
    group.add_argument(
        "--lora",
        type=weighted_file,
        nargs="+",
        metavar="FILE[:WEIGHT]",
        help="LoRA files; default: the newest run's, if no --base is given",
    )
    group.add_argument("--lora-alpha", type=cli.number(float), metavar="N", help="alpha of LoRA files that do not say their own")
    group = parser.add_argument_group("what to draw")
    what = group.add_mutually_exclusive_group()
    what.add_argument("--prompt", help="one prompt for all")
    what.add_argument("--prompts-from", type=Path, metavar="DATA", help="draw prompts from this data set's training tiles of --label")
    group.add_argument("--draw", choices=("texts", "attributes", "balanced"), default="texts",
                       help="with --prompts-from: whole texts, attribute combinations, or those with every skin tone equally often")
    group.add_argument("--label", help="class written to the manifest; default: the LoRA's, else malignant")
    group.add_argument("--negative-prompt", default="", help="what guidance leads away from")
    group.add_argument("--count", type=cli.number(int, low=1), default=16, help="images in all")
    group.add_argument("--out", type=Path, help="folder; default: samples/<name of the LoRA's run>")
    group = parser.add_argument_group("how")
    group.add_argument("--sampler", choices=tuple(SAMPLERS), default="ddim", help="dpmpp is good at 20 steps")
    group.add_argument("--steps", type=cli.number(int, low=1, high=1000), default=50, help="sampling steps")
    group.add_argument("--guidance-scale", type=cli.number(float, low=0), help="1: no guidance; default: 7.5, for mini 2")
    group.add_argument("--eta", type=cli.number(float, low=0, high=1), default=0.0, help="DDIM's share of fresh noise")
    group.add_argument("--seed", type=cli.number(int, low=0, high=2**32 - 1), default=0, help="of the first image; image i has SEED + i")
    group.add_argument("--batch-size", type=cli.number(int, low=1), default=8, help="images at a time")
    group.add_argument("--resolution", type=cli.resolution, help="side in pixels; default: the LoRA's, else 128")
    group.add_argument(
        "--precision", choices=("fp16", "bf16", "fp32"), help="default: fp16 on CUDA; on a CPU bf16 if it is quick with it, else fp32"
    )
    group.add_argument("--plain", action="store_true", help="on a CPU: the plain layers, not the faster ones of lesion/sd/fast.py")
    group.add_argument("--gif", action="store_true", help=f"also DIR/denoising.gif, the first {GIF_TILES} images step by step")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    args = parser.parse_args(argv)
    if args.draw != "texts" and not args.prompts_from:
        parser.error(f"--draw {args.draw} needs --prompts-from DATA")
    if args.eta and args.sampler != "ddim":
        parser.error(f"--eta is ddim's share of fresh noise, and {args.sampler} has none: leave it out")
    return args


def main(argv=None) -> None:
    args = parse(argv)
    fill_from_newest_run(args)
    folders.fill_recipe(args)
    with lock.owner(args.out, wanted=int(os.environ.get("RANK", 0)) == 0):
        generate(args)


def generate(args) -> None:
    """Load, merge, draw, write: in this order."""
    import torch

    from lesion.lora import formats, layers
    from lesion.run import devices, sheets
    from lesion.run.state import files_sha256
    from lesion.sd import checkpoint, fast, pipeline
    from lesion.sd.vae import to_images_u8
    from lesion.tiles import seen
    rank, world, device = devices.process(args.device)
    known = args.out / "provenance.json"
    threads = cores.use_free(files.read_json(known).get("threads") if known.is_file() else None) if device.type == "cpu" else None
    args.precision = args.precision or fast.default_precision(device)

    # --- base and LoRA: read, checked, summed, merged ---
    sd = checkpoint.load(args.base, device, devices.DTYPES[args.precision], args.tokenizer, args.vae)
    networks = {"unet": sd.unet, "text_encoder": sd.text_encoder}
    for path, _ in args.lora:
        for part in formats.files(path):
            sums.require_file(part)
    notes = list(sd.notes)
    loras = [(path, weight, *formats.read(path, networks, args.lora_alpha, notes)) for path, weight in args.lora]
    if rank == 0 and notes:
        print("\n".join(f"note: {note}" for note in notes))
    combined = layers.combine([(factors, weight) for _, weight, factors, _ in loras])
    for name, network in networks.items():
        layers.set_factors(network, layers.of_network(combined, name))
        layers.merge(network)
    if device.type == "cpu" and not args.plain:
        fast.use(sd.unet, sd.text_encoder, sd.vae)
    base_sha256 = files_sha256(sd.files)
    trained = [metadata for *_, metadata in loras if {"lesion_resolution", "lesion_label", "lesion_base_sha256"} <= metadata.keys()]
    sizes = [resolution_of(metadata) for metadata in trained]
    args.resolution = args.resolution or (sizes[-1] if sizes else 128)
    args.label = args.label or (trained[-1]["lesion_label"] if trained else "malignant")
    if not re.fullmatch(r"\w[\w .-]*", args.label):
        raise ValueError(f"label {args.label!r} cannot name files: allowed are letters, digits, '_', '-', '.' and spaces; give --label")
    if rank == 0:
        warn_of_other_training(args.resolution, base_sha256, sizes, [metadata["lesion_base_sha256"] for metadata in trained])

    # --- what to draw: every image's prompt and seed, before the first is drawn ---
    prompts = choose_prompts(args)
    _, cut = sd.tokenizer(sorted(set(prompts)))
    lost = next((end for end in cut if end), None)
    if lost and rank == 0:
        print(f"warning: a prompt is longer than 75 tokens; the model does not see its end: {lost!r}")
    settings = {
        "label": args.label,
        "negative_prompt": args.negative_prompt,
        "sampler": args.sampler,
        "steps": args.steps,
        "guidance_scale": args.guidance_scale,
        "eta": args.eta,
        "resolution": args.resolution,
        "precision": args.precision,
        "plain": args.plain,
        "batch_size": args.batch_size,
        "first_seed": args.seed,
        "draw": args.draw,
        "prompt": args.prompt,
        "prompts_sha256": files.sha256_json(sorted(set(prompts))) if args.prompt is not None else training_texts_sha256(args),
    }
    used = []
    for path, weight, *_ in loras:
        parts = formats.files(path)
        used.append({"file": str(parts[0] if len(parts) == 1 else path), "sha256": files_sha256(parts), "weight": weight,
                     "train_files": seen.files_of_lora(parts[0])})
    if args.lora_alpha is not None:
        settings["lora_alpha"] = args.lora_alpha
    common = {key: settings[key] for key in ("negative_prompt", "sampler", "steps", "guidance_scale", "eta", "resolution")}
    named = drawn.named_loras(loras)
    hashes = [lora["sha256"] for lora in used]
    common |= {"base_sha256": base_sha256, "lora_sha256": hashes[0] if len(hashes) == 1 else hashes or None}
    rows = [row_of(args.label, i, prompt, args.seed + i, common) for i, prompt in enumerate(prompts)]
    batches = [rows[start:start + args.batch_size] for start in range(0, len(rows), args.batch_size)]
    if rank == 0:
        drawn.open_folder(args.out, {"base": args.base, "base_sha256": base_sha256, "base_settings_sha256": sd.settings_sha256,
                                     "loras": used, "settings": settings, "threads": threads})
        sums.begin(args.out)
        for name, what in drawn.keep_whole(args.out, batches):
            print(f"{args.out / name} {what}: taken out, and drawn again where it is asked for")
        print(f"{args.count} tiles of {args.resolution} px into {args.out}; base {args.base}, "
              f"LoRA {', '.join(lora['file'] for lora in used) or 'none'}; {device}, {args.precision}", flush=True)

    if world > 1:
        torch.distributed.barrier()  # nothing is drawn before the folder is known to be ours

    def context_of(texts: list[str]) -> torch.Tensor:
        with torch.no_grad():
            return pipeline.encode_prompts(sd, texts)

    def draw(some: list[dict], **more) -> torch.Tensor:
        negative = context_of([args.negative_prompt]).expand(len(some), -1, -1)
        return pipeline.draw(sd, context_of([row["prompt"] for row in some]), negative, [row["seed"] for row in some], args.resolution,
                             args.sampler, args.steps, args.guidance_scale, args.eta, **more)

    # --- draw: batches are fixed by number, so that a resumed call computes what the first would have ---
    todo = [some for some in batches[rank::world] if not all((args.out / row["file_name"]).is_file() for row in some)]
    bar = cli.progress(total=sum(map(len, todo)), desc="draw", unit="tile", disable=rank != 0)
    for some in todo:
        images_u8 = to_images_u8(pipeline.decode(sd, draw(some)))
        for row, image in zip(some, images_u8):
            sheets.save_png(args.out / row["file_name"], image, {"parameters": drawn.as_parameters(row, named), "lesion": json.dumps(row)})
        if rank == 0:
            drawn.write_rows(args.out, rows, final=False)
        bar.update(len(some))
    bar.close()
    if world > 1:
        torch.distributed.barrier()
    if rank == 0:
        drawn.write_rows(args.out, rows, final=True)
        sheets.save_png(
            args.out / "grid.png", sheets.contact_sheet(sheets.open_images([args.out / row["file_name"] for row in rows[:64]]))
        )
        print(f"contact sheet: {args.out / 'grid.png'}")
    if args.gif and rank == 0:
        frames, every = [], max(1, args.steps // GIF_FRAMES)

        def keep(i: int, timestep: int, latents: torch.Tensor, x0_pred: torch.Tensor) -> None:
            if i % every == 0 or i + 1 == args.steps:
                frames.append(sheets.as_array(sheets.contact_sheet(to_images_u8(pipeline.decode(sd, latents)))))
        draw(rows[:GIF_TILES], on_step=keep)
        sheets.save_gif(args.out / "denoising.gif", frames)
        print(f"denoising steps: {args.out / 'denoising.gif'}")
    if rank == 0:
        sums.write(args.out)


def resolution_of(metadata: dict[str, str]) -> int:
    """The side in pixels that a LoRA says it was trained at, checked as --resolution is. ValueError."""
    try:
        return cli.resolution(metadata["lesion_resolution"])
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"the LoRA's metadata has a lesion_resolution that cannot be drawn: {error}; is it damaged?") from None


def warn_of_other_training(resolution: int, base_sha256: str, sizes: list[int], bases: list[str]) -> None:
    """Say where a LoRA was trained at another size or on another base than it is drawn with."""
    for size, base in zip(sizes, bases):
        if size != resolution:
            print(f"warning: the LoRA was trained at {size} px, drawing at {resolution} px: expect several lesions a picture when larger")
        if base != base_sha256:
            print(f"warning: the LoRA was trained on another base model: SHA-256 {base[:12]}, this one {base_sha256[:12]}")


def row_of(label: str, number: int, prompt: str, seed: int, common: dict) -> dict:
    """The manifest row of one image; `common` is what all of a call's images share."""
    return {"file_name": f"{label}-{number:05d}.png", "text": prompt, "label": label, "prompt": prompt, "seed": seed, **common,
            "attributes": attributes_of(prompt), "source": "synthetic"}


def fill_from_newest_run(args) -> None:
    """Without --base and --lora: the newest run's LoRA, base, data set and class. With a LoRA of ours: its base."""
    if args.lora is None:
        folder = None if args.base else folders.newest("*")
        if folder is None and not args.base:
            raise ValueError("no finished run in runs/: run train_lora.py first, or give --base (and --lora)")
        args.lora = [(folder / "lora.safetensors", 1.0)] if folder else []
    first = args.lora[0][0] if args.lora else None
    beside = (first if first.is_dir() else first.parent) / "args.json" if first else None
    run = folders.read_args(beside.parent) if beside else {}
    if args.base is None and not run.get("base"):
        raise ValueError(f"which base model? {args.lora[0][0]} does not stand in a run folder: give --base")
    args.base = folders.named(args.base) or run["base"]
    args.tokenizer = args.tokenizer or (Path(run["tokenizer"]) if run.get("tokenizer") else None)
    args.vae = args.vae or run.get("vae")
    if args.prompt is None and not args.prompts_from:
        if not run.get("data"):
            raise ValueError("what to draw? give --prompt TEXT or --prompts-from DATA")
        args.prompts_from = Path(run["data"])
    args.label = args.label or run.get("label")
    args.out = args.out or Path("samples") / (beside.parent.name if run else "base")


def training_rows(args) -> list[dict]:
    """The training tiles of --label that prompts are drawn from, each with a text. ValueError if there are none."""
    sums.require(args.prompts_from, [files.MANIFEST])
    rows = [
        row for row in files.read_manifest(args.prompts_from) if row.get("label") == args.label and row.get("split", "train") == "train"
    ]
    if not rows:
        raise ValueError(f"{args.prompts_from} has no training tile labelled {args.label!r} to take prompts from")
    without = [row["file_name"] for row in rows if not row.get("text") or not isinstance(row["text"], str)]
    if without:
        raise ValueError(
            f"{args.prompts_from}: {len(without)} tiles have no text, first {without[0]}; run python -m lesion prepare or label"
        )
    return rows


def training_texts_sha256(args) -> str:
    """What identifies the texts that prompts are drawn from."""
    return files.sha256_json([row["text"] for row in training_rows(args)])


def choose_prompts(args) -> list[str]:
    """One prompt an image; prompt i does not depend on the count, so that a call can be extended."""
    if args.prompt is not None:
        return [args.prompt] * args.count
    import numpy as np

    from lesion.describe import prompts
    rows = training_rows(args)
    if args.draw == "texts":
        return [rows[i]["text"] for i in np.random.default_rng([args.seed, 4]).integers(len(rows), size=args.count)]
    chosen = prompts.draw_attributes(rows, args.count, args.seed, balance="skin_tone" if args.draw == "balanced" else None)
    return [prompts.to_sentence(args.label, attributes) for attributes in chosen]


def attributes_of(prompt: str) -> dict:
    """What a structured prompt asks for; nothing for a free one."""
    from lesion.describe import prompts
    try:
        return prompts.from_sentence(prompt)[1]
    except ValueError:
        return {}


if __name__ == "__main__":
    cli.run(main, "generate.py")
