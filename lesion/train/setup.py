"""What `train_lora.py` sets up before its loop: tiles of a class, the recipe, LoRA, texts.

Proven by tests/train/test_train_lora.py and tests/train/test_setup.py.
"""
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lesion.lora import formats, layers
from lesion.run import cli, devices, files, folders
from lesion.run.state import files_sha256, provenance
from lesion.sd.checkpoint import StableDiffusion
from lesion.tiles.decode import Tiles, load_tiles, recorded_norm


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


def recipe(args, sd: StableDiffusion, seen: list[dict]) -> dict:
    """Everything that decides the result: flags, hashes of base, data and starting LoRA, versions."""
    known = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items() if key not in ("out", "resume")}
    texts = {row["file_name"]: row["text"] for row in files.read_manifest(args.data)}
    known["base_sha256"] = files_sha256(sd.files)
    known["data_sha256"] = files.sha256_json([[row["sha256"], texts[row["file_name"]]] for row in seen])
    known["color_norm"] = recorded_norm(args.data)[0]
    known["tiles"] = len(seen)
    start = _starting_lora(args, known)
    known["init_lora"] = str(start) if start else None
    known["init_lora_sha256"] = files.sha256_file(formats.find(start)) if start else None
    return known | {"provenance": provenance()}


def _starting_lora(args, known: dict) -> Path | None:
    """--init-lora; for phase 2 without it the newest phase 1 run on the same base, class and colour normalisation."""
    if args.resume and args.out and (args.out / "args.json").is_file():
        start = files.read_json(args.out / "args.json").get("init_lora")
        return Path(start) if start else None
    if args.init_lora or args.phase == 1:
        return None if args.init_lora in (None, "none") else Path(args.init_lora)
    same = ("base_sha256", "data_sha256", "color_norm", "rank", "lora_targets")
    for folder in folders.finished(f"{args.label}-phase1*"):
        old = files.read_json(folder / "args.json")
        if all(old.get(key) == known[key] for key in same):
            return folder / "lora.safetensors"
    return None


# ------------------------------------------------------------------------------------------------------------ LoRA

def add_lora(args, sd: StableDiffusion, start: str | None) -> dict[str, nn.Module]:
    """Inject LoRA into the networks that this phase trains, load the starting LoRA if any; {name: network}."""
    networks = {"unet": sd.unet} | ({"text_encoder": sd.text_encoder} if args.phase == 2 else {})
    for number, network in enumerate(networks.values(), 1):
        layers.inject(
            network, layers.target_paths(network, args.lora_targets), args.rank, args.alpha, devices.generator(args.seed, 0, number)
        )
    if start:
        factors, _ = formats.read(Path(start), {"unet": sd.unet, "text_encoder": sd.text_encoder})
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
