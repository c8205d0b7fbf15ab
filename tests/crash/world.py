"""The commands under attack: how each is begun, how it goes on, and what it leaves.

Everything is tiny (a 40 MB folder of SD 1.5's shape with 8 to 32 channels, 32 px tiles), so that a run takes a second or two once torch is
imported; harness.py imports once and forks.
"""
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"


def script(name: str):
    """One of the four scripts as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Command:
    """argv(out, again) of a call, `again` after one that was cut; `states`: what a flipped bit is tried on, relative to the folder of the
    output, or to the world with a leading slash; `cut`: the file after whose second writing a run is cut for that, else it is a finished
    one; prepare(out): what stands in the output folder before the first call."""
    name: str
    main: Callable[[list[str]], None]
    argv: Callable[[Path, bool], list]
    states: tuple[str, ...] = ()
    prepare: Callable[[Path], None] = lambda out: None
    cut: str = ""


def build(folder: Path) -> None:
    """The inputs of all commands in `folder`: base, data, a LoRA, a synthetic folder, a classifier run."""
    from layouts import split_file, unzipped
    from report.test_evaluate_script import write_run
    from study_sets import real_set, synthetic_set
    from tiny_tiles import write_set, write_synthetic

    from lesion.describe import prompts
    from lesion.run import files
    folder.mkdir(parents=True)
    subprocess.run([sys.executable, SHARED / "tools" / "make_sd15.py", "--size", "tiny", "--out", folder / "base"], check=True,
                   capture_output=True)
    (folder / "source").mkdir()
    unzipped(folder / "source")
    split_file(folder)
    rows = write_set(folder / "data", {"train": (16, 10), "val": (8, 6), "test": (8, 6)})
    for number, row in enumerate(rows):
        row["attributes"] = {"skin_tone": prompts.NAMES["skin_tone"][number % 6]}
        row["text"] = prompts.to_sentence(row["label"], row["attributes"])
    files.write_manifest(folder / "data", rows)
    write_synthetic(folder / "synthetic", 12, [row for row in rows if row["split"] == "train" and row["label"] == "malignant"])
    write_run(folder / "predictions", {"O1": 0.0, "S2": 0.5}, malignant=12, benign=24)
    real_set(folder / "real", 10)
    synthetic_set(folder / "drawn", 10)


def commands(world: Path) -> dict[str, Command]:
    """The commands on the inputs of `build`."""
    from lesion import prepare
    from lesion.mini import pretrain
    from lesion.web import label, study
    train_lora, generate, classify, evaluate = map(script, ("train_lora", "generate", "classify", "evaluate"))

    def train(out, again):
        return ["--phase", 2, "--init-lora", "none", "--base", world / "base" / "folder", "--data", world / "data", "--steps", 6,
                "--batch-size", 2, "--rank", 2, "--lr", "1e-2", "--sample-count", 1, "--sample-steps", 1, "--sample-every", 4,
                "--checkpoint-every", 2, "--val-every", 3, "--val-tiles", 2, "--resolution", 64, "--out", out,
                *(["--resume"] if again else [])]

    def draw(out, again):
        return ["--base", world / "base" / "folder", "--lora", world / "lora.safetensors", "--prompt", "a lesion", "--count", 5,
                "--batch-size", 2, "--steps", 1, "--resolution", 64, "--out", out]

    def classifier(out, again):
        return ["--data", world / "data", "--synthetic", world / "synthetic", "--experiments", "B0", "S2", "--seeds", 1, "--arch",
                "resnet18", "--weights", "none", "--image-size", 32, "--epochs", 3, "--batch-size", 8, "--out", out]

    def vae(out, again):
        return ["--stage", "vae", "--data", world / "data", "--out", out, "--batch-size", 2, "--steps", 4, "--warmup-steps", 1,
                "--checkpoint-every", 1, *(["--resume"] if again else [])]

    def labelled(out):
        shutil.copytree(world / "data", out, ignore=shutil.ignore_patterns(".cache"))
        rows = [json.loads(line) for line in (out / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
        (out / "labels").mkdir()
        answers = [{"event": "answer", "id": f"answer-{n:05d}", "time": "2026-01-01T00:00:00.000+00:00", "tile": row["file_name"],
                    "answers": {"skin_tone": "brown"}} for n, row in enumerate(rows[:20])]
        (out / "labels" / "first.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers), encoding="utf-8")
        (out / "labels" / "primary.json").write_text('{"primary": "first"}\n', encoding="utf-8")

    def prepared(out, again):
        return ["--source", world / "source", "--split-file", world / "split.csv", "--out", out, "--workers", 1]

    def asked(out, again):
        return [out, "--real", world / "real", "--synthetic", world / "drawn", "--count", 4, "--seed", 1, "--no-serve"]

    def overwritten(out, again):
        return [*prepared(out, again), "--overwrite", "--prompts", "fixed"]

    every = [
        Command("prepare", prepare.main, prepared),
        Command("overwrite", prepare.main, overwritten, prepare=lambda out: shutil.copytree(world / "older", out)),
        Command("train", train_lora.main, train,
                ("checkpoint.safetensors", "checkpoint.previous.safetensors", "/data/.cache/latents-*"), cut="/checkpoint.safetensors"),
        Command("generate", generate.main, draw, ("malignant-*.png", "metadata.jsonl", "provenance.json")),
        Command("classify", classify.main, classifier, ("S2/seed0/state.safetensors", "S2/seed0/state.previous.safetensors",
                                                        "B0/seed0/predictions.csv", "/data/.cache/tiles-*.npy"),
                cut="S2/seed0/state.safetensors"),
        Command("evaluate", evaluate.main, lambda out, again: ["--classify", world / "predictions", "--out", out.name]),
        Command("study", study.main, asked, ("study.json", "tiles/*.png")),
        Command("label", label.main, lambda out, again: [out, "--no-serve", "--label", "all"], prepare=labelled),
        Command("pretrain", pretrain.main, vae, ("vae.checkpoint.safetensors", "vae.checkpoint.previous.safetensors"),
                cut="/vae.checkpoint.safetensors"),
    ]
    return {command.name: command for command in every}


def preload() -> None:
    """Import whatever a command imports on its way, so that forks need not."""
    import importlib
    import pkgutil

    import lesion
    for module in pkgutil.walk_packages(lesion.__path__, "lesion."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for name in ("matplotlib.figure", "matplotlib.backends.backend_agg", "matplotlib.backends.backend_svg", "matplotlib.font_manager",
                 "PIL.PngImagePlugin", "PIL.JpegImagePlugin", "sklearn.model_selection", "transformers.models.clip.tokenization_clip",
                 "transformers", "torchvision", "torch.optim", "scipy.stats", "skimage.measure"):
        importlib.import_module(name)
    importlib.import_module("transformers").CLIPTokenizer  # noqa: B018 - transformers imports when asked


def small_network(num_classes: int):
    """In ResNet-18's place: its saved states of 180 MB would make this a test of the disk."""
    from collections import OrderedDict

    from torch import nn
    parts = [("conv1", nn.Conv2d(3, 8, 3, 2)), ("bn1", nn.BatchNorm2d(8)), ("relu", nn.ReLU()), ("avgpool", nn.AdaptiveAvgPool2d(1)),
             ("flat", nn.Flatten()), ("fc", nn.Linear(8, num_classes))]
    return nn.Sequential(OrderedDict(parts))


def calm() -> None:
    """In the process that runs a command: one thread, and what is secret or the time of day the same in every run."""
    import itertools
    import secrets

    import torch
    import torchvision

    from lesion.mini import loop
    from lesion.run import state
    from lesion.web import study_folder
    torch.set_num_threads(1)
    numbers = itertools.count()
    secrets.token_bytes = lambda count: bytes([7]) * count
    secrets.token_urlsafe = lambda count: f"secret-{next(numbers):016d}"
    study_folder.now = lambda: "2026-01-01T00:00:00.000+00:00"
    state._git_commit = lambda: "0" * 40
    torchvision.models.resnet18 = small_network
    loop.CHECK_TILES = 4
    np.seterr(all="ignore")
