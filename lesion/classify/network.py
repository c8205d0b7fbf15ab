"""The classifier of the experiments: a torchvision ResNet, trained and evaluated from uint8 tiles in memory.

He et al. 2016 (arXiv:1512.03385) with one logit for "malignant"; AdamW (arXiv:1711.05101), linear warm-up and cosine
decay, checkpoint by validation AUPRC, optional class-weighted loss. Everything random is keyed by (seed, step), so a
run that is stopped and goes on gives the same bytes on a CPU. Proven by tests/classify/test_network.py.
"""
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from lesion.classify import weights as starting
from lesion.classify.augment import augment, normalise
from lesion.run import devices
from lesion.run.optim import load_optimizer_tensors, optimizer_tensors, warmup_cosine
from lesion.run.state import fitting, grouped, load_newest, load_state, of_group, save_state
from lesion.stats import classification

ARCHITECTURES = ("resnet18", "resnet34", "resnet50")


@dataclass(frozen=True)
class Recipe:
    """What decides a training run beside its tiles and its seed."""
    steps: int                # optimiser steps, the same in every arm
    steps_per_epoch: int      # validate and save every so many steps
    batch_size: int = 64
    lr: float = 1e-3          # peak
    weight_decay: float = 0.05
    warmup: float = 0.1       # share of the steps
    weight_power: float = 1.0  # of the class weights where the loss is weighted: 1 = balanced, 0 = not at all
    augmentation: str = "traditional"
    precision: str = "fp32"


@dataclass(frozen=True)
class Pool:
    """Tiles to learn from: images_u8 [N,R,R,3] uint8, labels [N] 0/1, `order` [M] which of them an epoch holds (on the
    CPU; an index may stand several times: oversampling without a copy)."""
    images_u8: Tensor
    labels: Tensor
    order: Tensor


def build(arch: str, weights: str, seed: int) -> nn.Module:
    """A ResNet with one output, channels-last. weights: "imagenet" (torchvision's, downloaded), "none" (He's
    initialisation by `seed`) or a path to a state dict (lesion.classify.weights; its classification head is left out).

    Raises ValueError for an unknown architecture, weights that cannot be had or are damaged, or a file that does not fit.
    """
    if arch not in ARCHITECTURES:
        raise ValueError(f"no architecture {arch!r}: allowed are {', '.join(ARCHITECTURES)}")
    with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
        torch.manual_seed(seed)
        model = getattr(torchvision.models, arch)(num_classes=1)
    if weights != "none":
        starting.load(model, _imagenet(arch) if weights == "imagenet" else starting.read(Path(weights)), weights)
    return model.to(memory_format=torch.channels_last)


def _imagenet(arch):
    import urllib.error
    weights = torchvision.models.get_model_weights(arch).DEFAULT
    path = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rpartition("/")[2]
    if path.is_file():
        return starting.from_hub(path)
    try:
        return weights.get_state_dict(progress=False, check_hash=True)
    except (urllib.error.URLError, OSError, RuntimeError) as error:
        raise ValueError(f"torchvision's ImageNet weights of {arch} cannot be downloaded ({error}); train from scratch "
                         "with --weights none, or give a file with --weights PATH") from None


def class_weights(labels: Tensor, power: float) -> Tensor:
    """Weights [benign, malignant] = (n / (2 n_class)) ** power; power 1: both classes weigh the same in the loss."""
    counts = torch.bincount(labels.long(), minlength=2).double()
    return ((counts.sum() / (2 * counts)) ** power).float()


def lr_at(step: int, recipe: Recipe) -> float:
    """Learning rate of `step` (0-based): linear to the peak over the warm-up, then half a cosine to 0."""
    return warmup_cosine(recipe.lr, step, recipe.steps, max(1, round(recipe.steps * recipe.warmup)))


def batch_of(order: Tensor, step: int, batch_size: int, seed: int) -> Tensor:
    """Indices [batch_size] of a step: the stream of epoch-wise shuffles of `order`, cut into full batches."""
    start, count = step * batch_size, len(order)
    epochs = range(start // count, (start + batch_size - 1) // count + 1)
    stream = torch.cat([order[torch.randperm(count, generator=devices.generator(seed, 1, epoch))] for epoch in epochs])
    offset = start - epochs[0] * count
    return stream[offset:offset + batch_size]


def fit(model: nn.Module, train: Pool, validation: Pool, recipe: Recipe, seed: int, weighted: bool, state_path: Path,
        on_epoch: Callable[[dict], None] = lambda row: None, say: Callable[[str], None] = lambda text: None) -> list[dict]:
    """Train `model` in place; it ends with the weights of its best epoch by validation AUPRC (of equals, the first).

    Saves its state in `state_path` after every epoch, the last one staying as its predecessor, and goes on from the
    newest whole one; `say` hears of a damaged or missing one. Returns one row an epoch: step, epoch, loss, lr, val_auprc,
    val_auroc. Raises ValueError if the loss or a score is not finite, or a class is missing.
    """
    where = next(model.parameters()).device
    images, labels, order = train.images_u8, train.labels.to(where), train.order
    if labels[order].unique().numel() < 2:
        raise ValueError("the training tiles are of one class only: both benign and malignant tiles are needed")
    weights = class_weights(labels[order].cpu(), recipe.weight_power if weighted else 0.0).to(where)
    optimizer = torch.optim.AdamW(_groups(model, recipe.weight_decay), lr=recipe.lr)
    scaler = torch.amp.GradScaler(where.type, enabled=recipe.precision == "fp16")
    step, rows, best = _resume(model, optimizer, scaler, state_path, say)
    while step < recipe.steps:
        model.train()
        total = torch.zeros((), dtype=torch.float64, device=where)
        start, end = step, min(step + recipe.steps_per_epoch, recipe.steps)
        for step in range(start, end):
            index = batch_of(order, step, recipe.batch_size, seed).to(images.device)
            target = labels[index.to(where)]
            pixels = augment(images[index].to(where), recipe.augmentation, devices.generator(seed, 2, step))
            for group in optimizer.param_groups:
                group["lr"] = lr_at(step, recipe)
            with devices.autocast(where, recipe.precision):
                logits = model(pixels)[:, 0].float()
            weight = weights[target.long()]
            losses = F.binary_cross_entropy_with_logits(logits, target.float(), reduction="none")
            loss = (losses * weight).sum() / weight.sum()
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            total += loss.detach()
        step = end
        if not torch.isfinite(total):
            raise ValueError(f"the loss is not finite at step {step}: lower --lr, or use --precision fp32")
        scores = predict(model, validation.images_u8, validation.order, recipe.precision)
        value = classification.evaluate(validation.labels[validation.order].cpu().numpy(), scores, 0.5)
        rows.append({"step": step, "epoch": len(rows) + 1, "loss": float(total) / (end - start),
                     "lr": lr_at(step - 1, recipe), "val_auprc": float(value["auprc"][0]),
                     "val_auroc": float(value["auroc"][0])})
        if rows[-1]["val_auprc"] > max((row["val_auprc"] for row in rows[:-1]), default=-1.0):
            best = {key: tensor.detach().to("cpu", copy=True) for key, tensor in model.state_dict().items()}
        _save(model, optimizer, scaler, best, state_path, step, rows)
        on_epoch(rows[-1])
    model.load_state_dict(best)
    return rows


def _groups(model, weight_decay):
    """Weight decay for matrices and kernels, none for biases and normalisation."""
    parameters = list(model.parameters())
    return [{"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}]


def _save(model, optimizer, scaler, best, path, step, rows):
    save_state(path, grouped(model=model.state_dict(), best=best, optimizer=optimizer_tensors(optimizer)),
               {"step": step, "rows": rows, "scaler": scaler.state_dict()}, keep_last=True)


def _resume(model, optimizer, scaler, path, say):
    """(step, rows, best) of the newest saved state, loaded into the three; (0, [], None) without one."""
    found = load_newest(path)
    if found is None:
        return 0, [], None
    tensors, meta, notes = found
    for note in notes:
        say(note)
    with fitting(path):
        best = of_group(tensors, "best")
        model.load_state_dict(best)  # both must fit
        model.load_state_dict(of_group(tensors, "model"))
        load_optimizer_tensors(optimizer, of_group(tensors, "optimizer"))
        scaler.load_state_dict(meta["scaler"])
        return meta["step"], meta["rows"], best


def save(path: Path, model: nn.Module, arch: str, image_size: int) -> None:
    """Write the weights for `load`, atomically; the file says which network and which tile size they are for."""
    save_state(path, model.state_dict(), {"arch": arch, "image_size": image_size})


def load(path: Path) -> tuple[nn.Module, int]:
    """(model on the CPU, tile side in pixels) of a file of `save`. ValueError for any other file."""
    tensors, meta = load_state(path)
    if "arch" not in meta:
        raise ValueError(f"{path} is not a classifier saved by classify.py")
    with fitting(path):
        model = build(meta["arch"], "none", 0)
        model.load_state_dict(tensors)
        return model, meta["image_size"]


@torch.inference_mode()
def predict(model: nn.Module, images_u8: Tensor, order: Tensor | None = None, precision: str = "fp32",
            batch_size: int = 256) -> np.ndarray:
    """Probability of "malignant" [M] float64 of `images_u8` [N,R,R,3] uint8 or those in `order`; ValueError on NaN."""
    where = next(model.parameters()).device
    order = torch.arange(len(images_u8)) if order is None else order
    model.eval()
    parts = []
    for index in order.split(batch_size):
        with devices.autocast(where, precision):
            parts.append(model(normalise(images_u8[index.to(images_u8.device)].to(where)))[:, 0].double().cpu())
    scores = torch.sigmoid(torch.cat(parts)).numpy()
    if not np.isfinite(scores).all():
        raise ValueError("the network's scores are not finite: it has diverged; lower --lr, or use --precision fp32")
    return scores


@torch.inference_mode()
def features(model: nn.Module, images_u8: Tensor, batch_size: int = 256) -> np.ndarray:
    """Penultimate activations (after global pooling) [N, 512 or 2048] float32 of `images_u8` [N,R,R,3] uint8."""
    where = next(model.parameters()).device
    model.eval()
    body = nn.Sequential(*list(model.children())[:-1])
    parts = [body(normalise(part.to(where))).flatten(1).float().cpu() for part in images_u8.split(batch_size)]
    return torch.cat(parts).numpy()
