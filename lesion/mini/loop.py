"""What the three stages of `python -m lesion pretrain` share: recipe, tiles, the loop with its checkpoints, written weights.

A stage gives the loop its losses of a step; rates, clipping, AdamW, moving average, log, checkpoint and resumption are here.
Every random number is keyed by (seed, step), so a stage that is cut off and goes on ends with the same bytes.
Proven by tests/mini/test_loop.py and tests/mini/test_pretrain.py.
"""
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

from lesion.run import cli, devices, files, folders
from lesion.run.optim import load_optimizer_tensors, optimizer_tensors, warmup_cosine
from lesion.run.state import fitting, grouped, in_order, load_newest, of_group, previous_of, provenance, save_state
from lesion.tiles.decode import load_tiles

FAVOURED = ("skin_tone", "size", "color", "other_colors")  # attributes whose rare words --rare-power draws more often
CHECK_TILES = 256  # training tiles held back to watch the loss; `val` is never opened here


@dataclass(frozen=True)
class Recipe:
    """What decides the weights of a stage, beside the tiles: the flags of `python -m lesion pretrain`, resolved (units and
    ranges in its --help). `start_sha256`: of the weight files of the model that the stage began with, or None;
    `data_sha256`: of the benign training tiles and their texts."""
    steps: int
    batch_size: int
    lr: float
    warmup_steps: int
    ema: float
    precision: str
    seed: int
    start_sha256: str | None
    data_sha256: str
    crop: int
    kl_weight: float
    chroma_weight: float
    chroma_field: float
    square_weight: float
    texture_weight: float
    adversarial_weight: float
    caption_dropout: float
    rare_power: float


@dataclass(frozen=True)
class Sitting:
    """Where a stage reads and writes, when it pauses, and which of how many processes this is (torchrun's: each takes its part of
    a step's batch, and rank 0 writes). Nothing here changes what the weights become but `world`, in the sums' last bits."""
    data: Path
    out: Path
    start: Path | None
    resume: bool
    change_flags: bool
    checkpoint_every: int
    stop_at: int | None
    stop_after_minutes: float | None
    rank: int = 0
    world: int = 1


@dataclass(frozen=True)
class Stage:
    """What the loop trains. losses(step) gives {"loss": what is minimised, other parts for the log}; check(step) measures the
    averaged weights for the log. `also`: further networks and optimizers that `losses` itself updates (the texture's critic)."""
    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: Callable[[int], dict[str, Tensor]]
    check: Callable[[int, dict[str, Tensor]], dict[str, float]]
    also: dict[str, tuple[nn.Module, torch.optim.Optimizer]]


def benign_training_rows(data: Path) -> list[dict]:
    """Of the manifest."""
    return [row for row in files.read_manifest(data) if row.get("split") == "train" and row.get("label") == "benign"]


def data_sha256(data: Path) -> str:
    """Identity of what the stages learn from: the benign training tiles by their bytes, and their texts."""
    return files.sha256_json([[files.sha256_file(data / row["file_name"]), row.get("text")] for row in benign_training_rows(data)])


def benign_training_tiles(data: Path, resolution: int) -> tuple[np.ndarray, list[dict]]:
    """Tiles of the benign training rows: (uint8 [N,R,R,3], rows), the last CHECK_TILES to be held back by the caller.

    ValueError if there are fewer than twice as many.
    """
    rows = benign_training_rows(data)
    if len(rows) < 2 * CHECK_TILES:
        raise ValueError(f"{data} has {len(rows)} benign training tiles; at least {2 * CHECK_TILES} are needed")
    tiles = load_tiles(data, rows, resolution, progress=cli.progress)
    return tiles.images_u8, tiles.rows


def rare_weights(rows: list[dict], power: float) -> np.ndarray:
    """[N]: (1 / frequency of the tile's rarest steered word) ** power, at most 10 times the smallest."""
    values = [{(name, value) for name in FAVOURED for value in np.atleast_1d((row.get("attributes") or {}).get(name) or [])}
              for row in rows]
    counts = Counter(value for some in values for value in some)
    rarest = np.array([min((counts[value] for value in some), default=len(rows)) for some in values])
    weights = (len(rows) / rarest) ** power
    return np.minimum(weights, 10 * weights.min())


# ---------------------------------------------------------------------------------------------------------------- loop

def train(stage: Stage, recipe: Recipe, sitting: Sitting) -> tuple[dict[str, Tensor], list[dict], bool]:
    """Train from the checkpoint, if there is one, to the last step or to where the sitting ends.

    Gives the averaged weights, the recipe's changes ("sittings", see `resume`) and whether the last step was reached. Writes
    OUT/<stage>.jsonl (with several processes, rank 0's losses) and OUT/<stage>.checkpoint.safetensors. ValueError if the loss is
    not finite.
    """
    ema = {key: value.clone() for key, value in stage.model.state_dict().items()}
    bar = cli.progress(total=recipe.steps, desc=stage.name, unit="step", disable=sitting.rank > 0)
    first, sittings = resume(stage, ema, recipe, sitting, bar.write)
    bar.initial = bar.n = first
    began, last = time.monotonic(), first
    for step in range(first, recipe.steps):
        set_rate(stage, recipe, step)
        losses = stage.losses(step)
        update(stage.optimizer, stage.model, losses["loss"], step, sitting.world)
        ema_update(ema, stage.model, recipe.ema, step)
        bar.update()
        if step % 50 == 0:
            bar.set_postfix_str(f"loss {losses['loss'].item():.4f}")
        last = step + 1
        minutes = (time.monotonic() - began) / 60
        late = sitting.stop_after_minutes is not None and minutes > sitting.stop_after_minutes
        stop = last == sitting.stop_at or bool(devices.agree(int(late), sitting.world))
        if sitting.rank == 0 and (last % sitting.checkpoint_every == 0 or last == recipe.steps or stop):
            quality = stage.check(last, ema)
            files.append_jsonl(sitting.out / f"{stage.name}.jsonl", {
                "step": last, "lr": learning_rate(recipe, step), **{key: value.item() for key, value in losses.items()}, **quality})
            save_checkpoint(stage, ema, sitting, last, sittings)
            bar.write(f"step {last}: " + " ".join(f"{key} {value:.3f}" for key, value in quality.items()))
        if stop:
            break
    bar.close()
    return ema, sittings, last == recipe.steps


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then a half cosine to 0 at the last step."""
    return warmup_cosine(recipe.lr, step, recipe.steps, recipe.warmup_steps)


def set_rate(stage: Stage, recipe: Recipe, step: int) -> None:
    """Give every optimizer of the stage the step's learning rate."""
    for optimizer in (stage.optimizer, *(optimizer for _, optimizer in stage.also.values())):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step)


def update(optimizer: torch.optim.Optimizer, model: nn.Module, loss: Tensor, step: int, world: int = 1) -> None:
    """One AdamW step down the loss, its gradient clipped to norm 1. ValueError, in all `world` processes, if one's loss is not finite."""
    if devices.agree(int(not torch.isfinite(loss)), world):
        raise ValueError(f"loss is {loss.item()} at step {step}: lower --lr; the last checkpoint is kept")
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def ema_update(ema: dict[str, Tensor], model: nn.Module, decay: float, step: int) -> None:
    """ema <- d ema + (1 - d) weights, with d = min(decay, (1 + step) / (10 + step)) so that early averages forget the start."""
    d = min(decay, (1 + step) / (10 + step))
    with torch.no_grad():
        torch._foreach_lerp_(list(ema.values()), list(model.state_dict().values()), 1 - d)


@contextmanager
def averaged(model: nn.Module, ema: dict[str, Tensor]) -> Iterator[nn.Module]:
    """A context in which the model has its averaged weights."""
    kept = {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(ema)
    try:
        yield model
    finally:
        model.load_state_dict(kept)


# --------------------------------------------------------------------------------------------------------- checkpoints

def save_checkpoint(stage: Stage, ema: dict[str, Tensor], sitting: Sitting, step: int, sittings: list[dict]) -> None:
    """Write OUT/<stage>.checkpoint.safetensors: weights, average, optimizers, and the recipe with its changes."""
    groups = {"model": stage.model.state_dict(), "ema": ema, "optimizer": optimizer_tensors(stage.optimizer)}
    for name, (network, optimizer) in stage.also.items():
        groups |= {f"{name}_model": network.state_dict(), f"{name}_optimizer": optimizer_tensors(optimizer)}
    save_state(sitting.out / f"{stage.name}.checkpoint.safetensors", grouped(**groups), {"step": step, "sittings": sittings},
               keep_last=True)


def resume(stage: Stage, ema: dict[str, Tensor], recipe: Recipe, sitting: Sitting, say: Callable[[str], None]) -> tuple[int, list[dict]]:
    """(step to go on from, [{"from_step", **recipe} of every stretch with a recipe of its own]), the newest whole checkpoint
    put back and the log cut at it.

    ValueError where a checkpoint stands unless --resume was given, and for flags that differ from the checkpoint's unless
    --change-flags was: then the change is recorded, here and in the weights' metadata.
    """
    path = sitting.out / f"{stage.name}.checkpoint.safetensors"
    known = json.loads(json.dumps(asdict(recipe)))
    if not sitting.resume and (path.exists() or previous_of(path).exists()):
        raise ValueError(f"{path} exists: give --resume to go on, or another --out")
    found = load_newest(path) if sitting.resume else None
    if sitting.rank == 0:
        folders.cut_metrics(sitting.out / f"{stage.name}.jsonl", found[1]["step"] if found else 0)
    if found is None:
        return 0, [{"from_step": 0, **known}]
    tensors, meta, notes = found
    for note in notes:
        say(note)
    with fitting(path):
        sittings, before = meta["sittings"], meta["sittings"][-1]
        put_back(stage, ema, tensors)
    changed = [f"{name} was {before.get(name)!r}, now {value!r}" for name, value in known.items() if before.get(name) != value]
    if changed and not sitting.change_flags:
        raise ValueError(f"{path} was made with other flags: {', '.join(changed)}; give the same ones, or --change-flags")
    return meta["step"], [*sittings, {"from_step": meta["step"], **known}] if changed else sittings


def put_back(stage: Stage, ema: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    """Load what `save_checkpoint` kept."""
    stage.model.load_state_dict(of_group(tensors, "model"))
    averages = of_group(tensors, "ema")
    for key, value in ema.items():
        value.copy_(averages[key])
    load_optimizer_tensors(stage.optimizer, of_group(tensors, "optimizer"))
    for name, (network, optimizer) in stage.also.items():
        network.load_state_dict(of_group(tensors, f"{name}_model"))
        load_optimizer_tensors(optimizer, of_group(tensors, f"{name}_optimizer"))


# ------------------------------------------------------------------------------------------------------------- weights

def write_weights(path: Path, state: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a network's weights as float16 safetensors, atomically; equal weights and metadata give equal bytes."""
    tensors = {key: value.detach().half().contiguous() for key, value in state.items()}
    files.write_bytes(path, in_order(save(tensors, metadata=metadata)))


def origin(rows: list[dict], sittings: list[dict]) -> dict[str, str]:
    """What the weights' metadata says of their making: data and its licence, commit, recipe and its changes."""
    made = provenance()
    return {"format": "pt", "lesion_data_sha256": files.sha256_json(sorted(row["file_name"] for row in rows)),
            "lesion_data": f"{len(rows)} benign training tiles", "lesion_git_commit": str(made["git_commit"]),
            "lesion_recipe": json.dumps(sittings, sort_keys=True),
            "lesion_torch": made["torch"], "license": "MIT; trained on images under CC-BY 4.0",
            "attribution": "International Skin Imaging Collaboration. SLICE-3D 2024 Permissive Challenge Dataset, "
                           "https://doi.org/10.34970/2024-slice-3d-permissive (2024), CC-BY 4.0. Images from Memorial Sloan Kettering "
                           "Cancer Center, FNQH Cairns, The University of Queensland, Melanoma Institute Australia and University of "
                           "Athens Medical School."}
