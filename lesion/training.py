"""The parts of `train_lora.py` around its loop: inputs, LoRA set-up, texts, validation, samples.

Proven by tests/test_train_lora.py, tests/parity/test_lora_step.py and tests/test_distributed.py.
"""
import contextlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from lesion import cli, files, pictures, runs, runtime
from lesion.data.tiles import Tiles, load_tiles, recorded_norm
from lesion.lora import files as lora_files
from lesion.lora import layers
from lesion.sd import pipeline, schedule
from lesion.sd.checkpoint import StableDiffusion
from lesion.sd.vae import to_images_u8, to_pixels
from lesion.train_state import quartiles


class Denoiser(nn.Module):
    """U-Net and text encoder as one module, so that DistributedDataParallel sees one forward: text is context or token_ids."""

    def __init__(self, unet: nn.Module, text_encoder: nn.Module):
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, noisy_latents: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        context = text if text.is_floating_point() else self.text_encoder(text)
        return self.unet(noisy_latents, timesteps, context)


def process(device_name: str) -> tuple[int, int, torch.device]:
    """(rank, number of processes, device); joins torchrun's process group where there is one."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = runtime.device(device_name)
    if device.type == "cpu":
        runtime.keep_freed_memory()
    if world == 1:
        return 0, 1, device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return torch.distributed.get_rank(), world, device


def distributed(model: nn.Module, world: int, device: torch.device) -> nn.Module:
    """`model`, averaged over processes if there are several and anything is left to train."""
    if world == 1:
        return model
    return nn.parallel.DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


def no_sync(model: nn.Module, wanted: bool) -> contextlib.AbstractContextManager:
    """Skip the gradients' averaging while they accumulate."""
    return model.no_sync() if wanted and hasattr(model, "no_sync") else contextlib.nullcontext()


def bar(text: str, unit: str, shown: bool) -> Callable:
    return lambda items, **settings: cli.progress(items, **{**settings, "desc": text, "unit": unit, "disable": not shown})


# ---------------------------------------------------------------------------------------------------------- inputs

def tiles_of_class(args, say: Callable | None) -> tuple[Tiles, Tiles]:
    """(training tiles, held-out tiles) of args.label: split `train` less the held-back patients; split `val` plus those."""
    rows = files.read_manifest(args.data)
    mine = [row for row in rows if row.get("label") == args.label]
    train = [row for row in mine if row.get("split", "train") == "train"]
    if not train:
        raise ValueError(f"{args.data} has no training tile labelled {args.label!r}; its labels: "
                         f"{dict(Counter(row.get('label') for row in rows if row.get('split', 'train') == 'train'))}")
    without = [row["file_name"] for row in mine if row.get("split", "train") in ("train", "val") and not row.get("text")]
    if without:
        raise ValueError(f"{args.data}: {len(without)} tiles have no text, first {without[0]}; run python -m lesion prepare or label")
    groups = sorted({row.get("patient_id") or row["file_name"] for row in train})
    back = set(np.random.default_rng([args.seed, 2]).permutation(groups)[:round(args.holdout * len(groups))])
    held = [row for row in train if (row.get("patient_id") or row["file_name"]) in back]
    train = [row for row in train if row not in held]
    held = (held + [row for row in mine if row.get("split") == "val"])[:args.val_tiles]
    tiles = load_tiles(args.data, train, args.resolution, bar("tiles", "tile", bool(say)))
    held_out = load_tiles(args.data, held, args.resolution) if held else Tiles(tiles.images_u8[:0], [], [])
    for problem in tiles.unreadable + held_out.unreadable:
        say and say(f"skipped {problem}")
    if say and not held:
        say("no held-out tiles of this class (split `val`, or --holdout): no validation loss")
    return tiles, held_out


def train_files(data: Path, rows: list[dict]) -> list[dict]:
    """What the LoRA is about to see: {file_name, sha256, patient_id} a tile; the leak check of the experiments compares these."""
    return [{"file_name": row["file_name"], "sha256": files.sha256_file(Path(data) / row["file_name"]), "patient_id": row.get("patient_id")}
            for row in rows]


def recipe(args, sd: StableDiffusion, seen: list[dict]) -> dict:
    """Everything that decides the result: flags, hashes of base, data and starting LoRA, versions."""
    known = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items() if key not in ("out", "resume")}
    texts = {row["file_name"]: row["text"] for row in files.read_manifest(args.data)}
    known["base_sha256"] = runtime.files_sha256(sd.files)
    known["data_sha256"] = files.sha256_json([[row["sha256"], texts[row["file_name"]]] for row in seen])
    known["color_norm"] = recorded_norm(args.data)[0]
    known["tiles"] = len(seen)
    start = _starting_lora(args, known)
    known["init_lora"] = str(start) if start else None
    known["init_lora_sha256"] = files.sha256_file(lora_files.find(start)) if start else None
    return known | {"provenance": runtime.provenance()}


def _starting_lora(args, known: dict) -> Path | None:
    """--init-lora; for phase 2 without it the newest phase 1 run on the same base, class and colour normalisation."""
    if args.resume and args.out and (args.out / "args.json").is_file():
        start = files.read_json(args.out / "args.json").get("init_lora")
        return Path(start) if start else None
    if args.init_lora or args.phase == 1:
        return None if args.init_lora in (None, "none") else Path(args.init_lora)
    same = ("base_sha256", "data_sha256", "color_norm", "rank", "lora_targets")
    for folder in runs.finished(f"{args.label}-phase1*"):
        old = files.read_json(folder / "args.json")
        if all(old.get(key) == known[key] for key in same):
            return folder / "lora.safetensors"
    return None


def files_seen(seen: list[dict], start: str | None) -> list[dict] | None:
    """`seen` and what the starting LoRA saw before; None if that is not known."""
    if start is None:
        return seen
    before = files_of_lora(lora_files.find(Path(start)))
    if before is None:
        return None
    return seen + [row for row in before if row not in seen]


def files_of_lora(lora: Path) -> list[dict] | None:
    """The tiles that a LoRA file of a run folder (or of its checkpoints/) has seen; None if the file stands elsewhere."""
    for folder in (lora.parent, lora.parent.parent):
        if (folder / "train_files.json").is_file():
            return json.loads((folder / "train_files.json").read_text())
    return None


# ------------------------------------------------------------------------------------------------------------ LoRA

def add_lora(args, sd: StableDiffusion, start: str | None) -> dict[str, nn.Module]:
    """Inject LoRA into the networks that this phase trains, load the starting LoRA if any; {name: network}."""
    networks = {"unet": sd.unet} | ({"text_encoder": sd.text_encoder} if args.phase == 2 else {})
    for number, network in enumerate(networks.values(), 1):
        layers.inject(
            network, layers.target_paths(network, args.lora_targets), args.rank, args.alpha, runtime.generator(args.seed, 0, number)
        )
    if start:
        factors, _ = lora_files.read(Path(start), {"unet": sd.unet, "text_encoder": sd.text_encoder})
        if args.phase == 1 and layers.of_network(factors, "text_encoder"):
            raise ValueError(f"{start} holds a text-encoder LoRA, which phase 1 would neither train nor save: use --phase 2")
        for name, part in factors.items():  # its scale moves into `up`, so that --alpha stays true of what is saved
            ratio = (part.alpha / len(part.down)) / (args.alpha / args.rank)
            factors[name] = layers.Factors(part.down, part.up * ratio, args.alpha)
        for name, network in networks.items():
            layers.set_factors(network, layers.of_network(factors, name))
    return networks


def parameter_groups(args, networks: dict[str, nn.Module]) -> list[dict]:
    rates = {"unet": args.lr, "text_encoder": args.text_encoder_lr or args.lr}
    return [{"params": layers.lora_parameters(network), "peak_lr": rates[name]} for name, network in networks.items()]


def lr_factor(args, step: int) -> float:
    """Share of the peak learning rate at `step`: linear warm-up, then constant, or half a cosine to 0 at the last step."""
    if step < args.warmup_steps:
        return (step + 1) / args.warmup_steps
    if args.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - args.warmup_steps) / max(1, args.steps - args.warmup_steps)))


# ----------------------------------------------------------------------------------- texts, validation, sample sheets

class Texts:
    """Text of a batch of tiles as the denoiser takes it: contexts computed once, or token_ids where the text encoder is trained."""

    def __init__(self, sd: StableDiffusion, texts: list[str], trained: bool, say: Callable | None = None):
        unique = list(dict.fromkeys(["", *texts]))
        device = sd.unet.conv_in.weight.device
        token_ids, cut = sd.tokenizer(unique)
        too_long = [text for text in cut if text]
        if too_long and say:
            say(f"{len(too_long)} prompts are longer than 75 tokens; the model does not see their ends, e.g. {too_long[0]!r}")
        number = {text: i for i, text in enumerate(unique)}
        self.row = torch.tensor([number[text] for text in texts])
        with torch.no_grad():
            self.values = token_ids.to(device) if trained else torch.cat([sd.text_encoder(some.to(device)) for some in token_ids.split(16)])

    def __call__(self, tile: np.ndarray, dropped: Tensor) -> Tensor:
        """tile [B] numbers, dropped [B] bool (those get the empty prompt) -> context [B,77,C] or token_ids [B,77]."""
        rows = self.row[torch.as_tensor(tile)].masked_fill(dropped, 0)
        return self.values[rows.to(self.values.device)]


def validation(args, sd: StableDiffusion, held_out: Tiles, timesteps: tuple[int, ...], device: torch.device) -> Callable | None:
    """A function that gives {val_loss, val_loss_q1..4}: unweighted error on fixed (tile, timestep, noise) triples; None without tiles."""
    if not held_out.rows:
        return None
    with torch.no_grad():
        mean = torch.cat([sd.vae.encode(to_pixels(image[None]).to(device))[0] for image in held_out.images_u8])
    latents = (sd.latent_scale * mean).repeat_interleave(len(timesteps), 0)
    t = torch.tensor(timesteps, device=device).repeat(len(mean))
    noise = torch.randn(latents.shape, generator=runtime.generator(args.seed, 0, 8)).to(device)
    tile = np.repeat(np.arange(len(mean)), len(timesteps))
    texts = Texts(sd, [row["text"] for row in held_out.rows], trained=args.phase == 2)
    model = Denoiser(sd.unet, sd.text_encoder)

    @torch.no_grad()
    def validate() -> dict[str, float]:
        errors = []
        for some in torch.arange(len(t)).split(16):
            noisy = schedule.add_noise(latents[some], noise[some], t[some])
            with runtime.autocast(device, args.precision):
                noise_pred = model(noisy, t[some], texts(tile[some.numpy()], torch.zeros(len(some), dtype=torch.bool)))
            errors.append((noise_pred.float() - noise[some]).square().mean(dim=(1, 2, 3)))
        error = torch.cat(errors).double()
        return {"val_loss": error.mean().item(), **{f"val_loss_q{q}": value for q, value in quartiles(error, t).items()}}
    return validate


def sampling(args, sd: StableDiffusion, rows: list[dict], device: torch.device) -> Callable[[Path], None]:
    """A function that draws the sample sheet: fixed seeds, fixed prompts of the training set, the networks as they are now."""
    chosen = np.random.default_rng([args.seed, 3]).integers(len(rows), size=args.sample_count)
    prompts = [rows[i]["text"] for i in chosen]
    guidance_scale = runs.recipe_for(args.base)["guidance_scale"]

    def sample(path: Path) -> None:
        if not prompts:
            return
        images = []
        for start in range(0, len(prompts), args.batch_size):
            some = prompts[start:start + args.batch_size]
            with torch.no_grad(), runtime.autocast(device, args.precision):
                context, negative = pipeline.encode_prompts(sd, some), pipeline.encode_prompts(sd, [""] * len(some))
                latents = pipeline.draw(sd, context, negative, list(range(start, start + len(some))), args.resolution,
                                        steps=args.sample_steps, guidance_scale=guidance_scale)
            images.append(to_images_u8(pipeline.decode(sd, latents)))
        pictures.save_png(path, pictures.contact_sheet(np.concatenate(images)))
    return sample


def before_and_after(folder: Path, steps: int) -> None:
    """One picture of the first and the last sample sheet, one above the other."""
    sheets = [(folder / f"step-{step:06d}.png", f"step {step}") for step in (0, steps)]
    if all(path.is_file() for path, _ in sheets):
        pictures.save_png(
            folder / "before-after.png", pictures.stack([Image.open(path) for path, _ in sheets], [name for _, name in sheets])
        )
