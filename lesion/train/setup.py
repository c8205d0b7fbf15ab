"""What `train_lora.py` sets up before its loop: the recipe, tiles of a class, LoRA, texts.

Proven by tests/train/test_train_lora.py and tests/train/test_setup.py.
"""
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lesion.lora import formats, layers
from lesion.run import devices, files, folders, sums
from lesion.run.state import files_sha256, provenance
from lesion.sd import fast
from lesion.sd.checkpoint import StableDiffusion
from lesion.tiles.decode import Tiles, load_tiles, recorded_norm


@dataclass(frozen=True)
class Recipe:
    """Everything that a run was told: the flags of train_lora.py (see its --help for units and ranges), resolved."""
    phase: int
    base: str
    tokenizer: Path | None
    vae: str | None
    data: Path
    label: str
    init_lora: str | None
    rank: int
    alpha: float
    lora_targets: str
    lora_format: str
    steps: int
    batch_size: int
    accumulate: int
    lr: float
    text_encoder_lr: float | None
    text_encoder_steps: int | None
    schedule: str
    warmup_steps: int
    weight_decay: float
    clip: float
    min_snr_gamma: float | None
    noise_offset: float
    caption_dropout: float
    resolution: int
    views: int
    precision: str
    seed: int
    holdout: float
    checkpoint_every: int
    val_every: int
    val_tiles: int
    sample_every: int
    sample_count: int
    sample_steps: int
    device: str
    plain: bool
    memory_gib: float | None

    @classmethod
    def of_flags(cls, flags: dict, device: torch.device) -> "Recipe":
        """The recipe of parsed flags: where one was not given, the base's default (steps, lr) or the device's (precision)."""
        known = {field.name: flags[field.name] for field in fields(cls)}
        known |= {name: value for name, value in folders.recipe_for(flags["base"]).items() if known.get(name, 0) is None}
        known["precision"] = known["precision"] or fast.default_precision(device)
        return cls(**known)

    def flags(self) -> dict:
        """The fields as JSON can hold them."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in vars(self).items()}

    def rates(self) -> dict[str, float]:
        """Peak learning rate of each network that this phase trains."""
        return {"unet": self.lr} | ({"text_encoder": self.text_encoder_lr or self.lr} if self.phase == 2 else {})


def record_of(recipe: Recipe, sd: StableDiffusion, seen: list[dict], resumed: dict | None = None) -> dict:
    """args.json: the recipe, hashes of base, data (`seen`: tiles.seen.train_files) and starting LoRA, versions.

    `resumed`: args.json of the run that goes on, whose starting LoRA stands.
    """
    known = recipe.flags()
    texts = {row["file_name"]: row["text"] for row in files.read_manifest(recipe.data)}
    known["base_sha256"] = files_sha256(sd.files)
    known["base_settings_sha256"] = sd.settings_sha256
    known["data_sha256"] = files.sha256_json([[row["sha256"], texts[row["file_name"]]] for row in seen])
    known["color_norm"] = recorded_norm(recipe.data)[0]
    known["tiles"] = len(seen)
    known["tag_frequency"] = tag_frequency([texts[row["file_name"]] for row in seen])
    start = resumed.get("init_lora") if resumed else _starting_lora(recipe, known)
    known["init_lora"] = str(start) if start else None
    known["init_lora_sha256"] = files.sha256_file(formats.find(Path(start))) if start else None
    return known | {"provenance": provenance()}


def tag_frequency(texts: list[str]) -> dict[str, int]:
    """How many texts hold each phrase between commas, the commonest first: what user interfaces show of a LoRA."""
    counts = Counter(phrase for text in texts for phrase in dict.fromkeys(part.strip() for part in text.split(",")) if phrase)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _starting_lora(recipe: Recipe, known: dict) -> str | Path | None:
    """--init-lora; for phase 2 without it the newest phase 1 run on the same base, class and colour normalisation."""
    if recipe.init_lora or recipe.phase == 1:
        return None if recipe.init_lora in (None, "none") else recipe.init_lora
    same = ("base_sha256", "data_sha256", "color_norm", "rank", "lora_targets")
    for folder in folders.finished(f"{recipe.label}-phase1*"):
        old = files.read_json(folder / "args.json")
        if all(old.get(key) == known[key] for key in same):
            return folder / "lora.safetensors"
    return None


# ---------------------------------------------------------------------------------------------------------------- tiles

def tiles_of_class(recipe: Recipe, say: Callable[[str], None], progress: Callable[[Iterable], Iterable] | None = None
                   ) -> tuple[Tiles, Tiles]:
    """(training tiles, held-out tiles) of the class: split `train` less the held-back patients; split `val` plus those."""
    data, label = recipe.data, recipe.label
    rows = files.read_manifest(data)
    mine = [row for row in rows if row.get("label") == label]
    train = [row for row in mine if row.get("split", "train") == "train"]
    if not train:
        labels = dict(Counter(row.get("label") for row in rows if row.get("split", "train") == "train"))
        raise ValueError(f"{data} has no training tile labelled {label!r}; its labels: {labels}")
    used = [row for row in mine if row.get("split", "train") in ("train", "val")]
    without = [row["file_name"] for row in used if not row.get("text")]
    if without:
        raise ValueError(f"{data}: {len(without)} tiles have no text, first {without[0]}; run python -m lesion prepare or label")
    train, held = hold_out(train, recipe.holdout, recipe.seed)
    held = (held + [row for row in mine if row.get("split") == "val"])[:recipe.val_tiles]
    sums.require(data, [files.MANIFEST, files.DATASET, *(row["file_name"] for row in train + held)])
    tiles = load_tiles(data, train, recipe.resolution, progress)
    held_out = load_tiles(data, held, recipe.resolution) if held else Tiles(tiles.images_u8[:0], [], [])
    for problem in tiles.unreadable + held_out.unreadable:
        say(f"skipped {problem}")
    if not held:
        say("no held-out tiles of this class (split `val`, or --holdout): no validation loss")
    return tiles, held_out


def hold_out(rows: list[dict], share: float, seed: int) -> tuple[list[dict], list[dict]]:
    """(rows to train on, rows held out): about `share` of the patients, whole patients, the same for the same seed."""
    owner = [row.get("patient_id") or row["file_name"] for row in rows]
    owners = sorted(set(owner))
    back = set(np.random.default_rng([seed, 2]).permutation(owners)[:round(share * len(owners))])
    return ([row for row, who in zip(rows, owner) if who not in back], [row for row, who in zip(rows, owner) if who in back])


# ----------------------------------------------------------------------------------------------------------------- LoRA

def add_lora(recipe: Recipe, sd: StableDiffusion, start: str | None) -> dict[str, nn.Module]:
    """Inject LoRA into the networks that this phase trains, load the starting LoRA if any; {name: network}."""
    networks = {name: getattr(sd, name) for name in recipe.rates()}
    for number, network in enumerate(networks.values(), 1):
        paths = layers.target_paths(network, recipe.lora_targets)
        layers.inject(network, paths, recipe.rank, recipe.alpha, devices.generator(recipe.seed, 0, number))
    if start:
        for part in formats.files(Path(start)):
            sums.require_file(part)
        factors, _ = formats.read(Path(start), {"unet": sd.unet, "text_encoder": sd.text_encoder})
        if recipe.phase == 1 and layers.of_network(factors, "text_encoder"):
            raise ValueError(f"{start} holds a text-encoder LoRA, which phase 1 would neither train nor save: use --phase 2")
        for name, part in factors.items():  # its scale moves into `up`, so that --alpha stays true of what is saved
            ratio = (part.alpha / len(part.down)) / (recipe.alpha / recipe.rank)
            factors[name] = layers.Factors(part.down, part.up * ratio, recipe.alpha)
        for name, network in networks.items():
            layers.set_factors(network, layers.of_network(factors, name))
    return networks


def parameter_groups(recipe: Recipe, networks: dict[str, nn.Module]) -> list[dict]:
    """AdamW's parameter groups, one a network: its LoRA factors under its own peak learning rate."""
    rates = recipe.rates()
    return [{"params": layers.lora_parameters(network), "peak_lr": rates[name]} for name, network in networks.items()]


# ---------------------------------------------------------------------------------------------------------------- texts

class Texts:
    """Text of a batch of tiles as the denoiser takes it: `context` computed once, or `token_ids` if the text encoder is trained."""

    def __init__(self, sd: StableDiffusion, texts: list[str], trained: bool, say: Callable[[str], None] | None = None):
        unique = list(dict.fromkeys(["", *texts]))
        device = sd.unet.conv_in.weight.device
        token_ids, cut = sd.tokenizer(unique)
        too_long = [text for text in cut if text]
        if too_long and say:
            say(f"{len(too_long)} prompts are longer than 75 tokens; the model does not see their ends, e.g. {too_long[0]!r}")
        number = {text: i for i, text in enumerate(unique)}
        self.row = torch.tensor([number[text] for text in texts])
        self.trained = trained
        if trained:
            self.values = token_ids.to(device)
        else:
            with torch.no_grad():
                self.values = torch.cat([sd.text_encoder(some.to(device)) for some in token_ids.split(16)])

    def __call__(self, tile: np.ndarray, dropped: Tensor | None = None) -> dict[str, Tensor | None]:
        """{"context": [B,77,C] or None, "token_ids": [B,77] or None} of tile [B] numbers; dropped [B] bool get the empty prompt."""
        rows = self.row[torch.as_tensor(tile)]
        if dropped is not None:
            rows = rows.masked_fill(dropped, 0)
        values = self.values[rows.to(self.values.device)]
        return {"context": None, "token_ids": values} if self.trained else {"context": values, "token_ids": None}
