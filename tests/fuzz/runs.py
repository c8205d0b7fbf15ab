"""What a command leaves for the next one."""

import argparse
import contextlib
import json
from pathlib import Path
from types import SimpleNamespace

from fuzz import hostile
from fuzz.reader import TILE, Reader, as_file, each, must, only
from fuzz.tiles import ROWS, tile_folder
from hypothesis import strategies as st
from PIL import PngImagePlugin

import generate
from lesion.classify import defaults, predictions
from lesion.mini import samples
from lesion.report import classification, drop, request, sets, verify
from lesion.run import drawn, files, folders, sums
from lesion.tiles import seen
from lesion.train import checkpoint as training
from lesion.train import watch

METRICS = [
    {"step": 0, "val_loss": 0.5, "val_loss_q1": 0.1, "val_loss_q2": 0.2, "val_loss_q3": 0.3, "val_loss_q4": 0.4},
    *(
        {"step": k, "loss": 0.5, "loss_q1": None, "loss_q2": 0.1, "grad_norm": 1.0, "lr": 1e-4, "skipped_steps": 0}
        for k in (1, 2, 3)
    ),
    {"step": 3, "val_loss": 0.4, "val_loss_q1": 0.1, "val_loss_q2": None},
]


def metrics(kept, place, case):
    path = place / "metrics.jsonl"
    each(
        lambda: sets.judge_training([place], SimpleNamespace(synthetic=[]), None),
        lambda: training.load_checkpoint(place, {}, None, None),
        lambda: watch.loss_curve(path, place.parent / "out" / "loss.png"),
        lambda: folders.cut_metrics(path, 2),
    )


PREDICTIONS = [
    [*predictions.COLUMNS, "fold"],
    *([f"I{k}", ("benign", "malignant")[k % 2], 0.1 * (k % 8), ("val", "test")[k // 8], f"P{k}", 0] for k in range(16)),
]


def predicted(kept, place, case):
    run = predictions.read(place / "W1" / "seed0" / "predictions.csv")
    assert len(run.ids) == len(run.scores) == len(run.labels) == len(run.thresholds)
    must(lambda: predictions.read_runs(place))


def sums_cases(kept):
    digest = files.sha256_bytes(TILE)
    line = st.builds(
        lambda sha, gap, name: f"{sha}{gap}{name}\n",
        st.sampled_from([digest] * 4 + [digest[:9], digest.upper(), "g" * 64, ""]),
        st.sampled_from(["  ", "  ", "  ", " *", " ", ""]),
        st.one_of(hostile.texts, st.sampled_from(["t/0.jpg", "t", "./t/1.jpg"])),
    )
    lines = st.lists(line, max_size=4).map(lambda found: "".join(found).encode("utf-8", "replace"))
    return only(sums.NAME, hostile.spoilt(lines, f"{digest}  t/0.jpg\n".encode()))


def hashes(kept, place, case):
    each(
        lambda: sums.problems(place),
        lambda: sums.require(place),
        lambda: sums.require(place, ["t/0.jpg"]),
        lambda: list(verify.verify(place)),
    )


PROVENANCE = {
    "base": "x/y",
    "base_sha256": "ab" * 32,
    "settings": {"steps": 20},
    "loras": [
        {
            "file": "runs/a/lora.safetensors",
            "sha256": "cd" * 32,
            "weight": 1.0,
            "train_files": [
                {"file_name": "t/0.jpg", "sha256": "ef" * 32, "patient_id": "P0"},
                {"file_name": "t/1.jpg", "sha256": "00" * 32, "patient_id": None},
            ],
        }
    ],
}


def provenance(kept, place, case):
    path, rows = place / "provenance.json", [{**row, "lora_sha256": "cd" * 32} for row in ROWS]
    parts = seen.Parts(rows[:1], rows[1:2], rows[2:], False)
    each(
        lambda: seen.check_synthetic(place, rows, parts),
        lambda: request._runs_of(path),
        lambda: request._weights(place),
        lambda: defaults.base_of(place),
        lambda: defaults._runs_of(path),
        lambda: sets._refuse_leaks(place, rows[2:], []),
        lambda: samples.seen_by(place),
        lambda: drawn.open_folder(place, PROVENANCE),
    )


ARGS = {
    "data": "data/x",
    "base": "x/y",
    "label": "malignant",
    "tokenizer": None,
    "vae": None,
    "arch": "resnet18",
    "weights": "none",
    "image_size": 64,
    "epochs": 4,
    "batch_size": 8,
    "lr": 1e-4,
    "augmentation": "none",
    "folds": 0,
    "max_benign": None,
    "ratio": 1.0,
    "counts": [
        {
            "added": 2,
            "train": {"malignant": 3, "benign": 4},
            "val": {"malignant": 1, "benign": 1},
            "test": {"malignant": 1, "benign": 1},
        }
    ],
    "notes": ["x"],
    "checked": None,
    "data_sha256": "ab" * 32,
    "synthetic_sha256": None,
    "provenance": {"command": "x", "lesion": "1", "git_commit": None, "torch": "2"},
}


def arguments(kept, place, case):
    def flags(**given):
        names = (
            "data",
            "synthetic",
            "arch",
            "weights",
            "image_size",
            "epochs",
            "seeds",
            "ratio",
            "lora",
            "base",
            "tokenizer",
            "vae",
            "label",
            "prompt",
            "prompts_from",
            "out",
        )
        return argparse.Namespace(**dict.fromkeys(names) | {"experiments": ["O1"]} | given)

    run = place / "runs" / "a"
    with contextlib.chdir(place):
        each(
            lambda: request._data_of(run),
            lambda: defaults.fill(flags()),
            lambda: generate.fill_from_newest_run(flags()),
            lambda: defaults._runs_of(place / "provenance.json"),
            lambda: defaults.newest_tiles(Path("data/x")),
            lambda: classification.read_args(run),
            lambda: folders.open_run(run, {"data": "data/x"}, True),
        )


def run_start(place):
    (place / "runs" / "a").mkdir(parents=True)
    (place / "samples" / "a").mkdir(parents=True)
    (place / "runs" / "a" / "lora.safetensors").write_bytes(b"x")
    for name in ("provenance.json", "samples/a/provenance.json"):
        (place / name).write_text(json.dumps(PROVENANCE), encoding="utf-8")
    return place


TRAIN_FILES = PROVENANCE["loras"][0]["train_files"]


def trained_on(kept, place, case):
    tiles = seen.files_of_lora(place / "lora.safetensors")
    must(lambda: seen.overlap(tiles, ROWS))
    must(lambda: seen.files_seen(TRAIN_FILES, place / "lora.safetensors"))


REPORT = {
    "title": "x",
    "request": {"classify": None, "data": None, "synthetic": [], "runs": [], "study": None, "confusion": ["W1", "S2"]},
    "about": [["date", "x"]],
    "drop_copies": None,
    "written": {"report.md": "ab" * 32},
    "read": {"../beside/x": "ab" * 32},
}


def report_cases(kept):
    return st.one_of(
        only("manifest.json", hostile.as_json(REPORT)),
        only("results.json", hostile.as_json({"a": [1.0]})),
        only("dropped.json", hostile.as_json({"from": "x", "copies": ["y"]})),
    )


def report_start(place):
    (place / "manifest.json").write_text(json.dumps(REPORT), encoding="utf-8")
    (place / "report.md").write_text("x", encoding="utf-8")
    return place


def report(kept, place, case):
    each(lambda: list(verify.verify(place)), lambda: drop.refuse_foreign(place.parent / "beside", place))


DRAWN = {"prompt": "x", "seed": 1, "label": "malignant"}


def drawn_cases(kept):
    def written(text):
        info = PngImagePlugin.PngInfo()
        info.add_itxt("lesion", text)
        data = hostile.picture("PNG", pnginfo=info)
        row = {"file_name": "x.png", "source": "synthetic", "sha256": files.sha256_bytes(data), **DRAWN}
        return {"x.png": data, files.MANIFEST: json.dumps(row).encode()}

    texts = hostile.as_json(DRAWN).map(lambda data: written(data.decode("utf-8", "replace")))
    rows = hostile.pictures().map(
        lambda data: {
            "x.png": data,
            files.MANIFEST: json.dumps(
                {"file_name": "x.png", "source": "synthetic", "sha256": files.sha256_bytes(data)}
            ).encode(),
        }
    )
    return st.one_of(texts, rows)


def drawn_again(kept, place, case):
    from lesion.web import study_tiles

    each(
        lambda: list(verify.verify(place)),
        lambda: study_tiles.common_size(place, [{"file_name": "x.png"}]),
        lambda: study_tiles.what_changed(case["x.png"], 24),
    )


READERS = [
    Reader("metrics.jsonl", lambda kept: only("metrics.jsonl", hostile.as_lines(METRICS)), metrics),
    Reader("predictions.csv", lambda kept: only("W1/seed0/predictions.csv", hostile.as_table(PREDICTIONS)), predicted),
    Reader("SHA256SUMS", sums_cases, hashes, tile_folder),
    Reader("provenance.json", lambda kept: only("provenance.json", hostile.as_json(PROVENANCE)), provenance),
    Reader("args.json", lambda kept: only("runs/a/args.json", hostile.as_json(ARGS)), arguments, run_start),
    Reader("train_files.json", lambda kept: only("train_files.json", hostile.as_json(TRAIN_FILES)), trained_on),
    Reader("report manifest", report_cases, report, report_start),
    Reader("drawn pictures", drawn_cases, drawn_again),
]

EXAMPLES = {  # what was once a traceback, a hang or a memory full
    "metrics.jsonl": [{"metrics.jsonl": text} for text in (b'{"val_loss": 1}\n', b'{"step": "x", "val_loss": 1}\n')],
    "predictions.csv": [
        {"W1/seed0/predictions.csv": text}
        for text in (
            b"label,score,split,patient,id\nbenign,0.1,test,P\nmalignant,0.2,test,P,x\nbenign,0,val,P,a\nmalignant,1,val,P,b\n",
            b"id,label,score,split,patient\n" + b"x" * 200_000,
        )
    ],
    "provenance.json": [as_file("provenance.json", {"loras": [1]}), as_file("provenance.json", {"base": [1]})],
    "args.json": [as_file("runs/a/args.json", ARGS | {"data": value}) for value in (None, [1])],
    "report manifest": [as_file("dropped.json", {"from": ["x"]})],
}
