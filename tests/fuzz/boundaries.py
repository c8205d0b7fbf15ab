"""Every place where the package reads what others wrote: `READERS`, one line each; and what each is given and asked to do.

A reader has `start` (a folder, or the servers, made once a test), `cases` (a strategy of {file: bytes}, or of requests) and
`read`. tests/fuzz/test_fuzz.py says what must hold. A new reader is one more line.
"""

import argparse
import contextlib
import functools
import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import h5py
import layouts
import numpy as np
import study_sets
import torch
from fuzz import hostile
from hypothesis import strategies as st
from PIL import PngImagePlugin
from safetensors.torch import save
from sd.test_configs import V1
from torch import nn

import generate
import train_lora
from lesion import prepare
from lesion.classify import defaults, predictions
from lesion.describe.prompts import VOCABULARY
from lesion.lora import formats, layers
from lesion.mini import samples
from lesion.report import classification, drop, request, sets, verify
from lesion.run import devices, files, folders, state, sums
from lesion.run.optim import optimizer_tensors
from lesion.sd import checkpoint, ldm_yaml, vocabulary, weights
from lesion.sd.clip import Tokenizer
from lesion.tiles import decode, isic, seen, split, tables
from lesion.tiles.source import metadata
from lesion.train import checkpoint as training
from lesion.train import watch
from lesion.web import label_adjudicate, label_desk, label_export, label_folder, label_pages, study, study_folder
from lesion.web.journal import Journal

ORIGIN = {"Origin": "http://localhost"}
TILE = layouts.jpeg(1, 20)


@dataclass(frozen=True)
class Reader:
    """`cases(kept)` and `read(kept, place, case)`; `kept` is what `start(place)` gave. apart: in a process of its own, since the
    library beneath is C and may not come back."""

    name: str
    cases: Callable
    read: Callable
    start: Callable = lambda place: place
    apart: bool = False


def each(*calls) -> None:
    """All calls, also where one refuses; then the first refusal."""
    refusals = []
    for call in calls:
        try:
            call()
        except (ValueError, OSError) as error:
            refusals.append(error)
    if refusals:
        raise refusals[0]


def only(name, strategy):
    """Cases of one file."""
    return strategy.map(lambda data: {name: data})


# --- tiles -----------------------------------------------------------------------------------------------------------

ROWS = [
    {
        "file_name": f"t/{k}.jpg",
        "label": ("benign", "malignant")[k % 2],
        "text": "a mole",
        "patient_id": f"P{k}",
        "isic_id": f"I{k}",
        "split": ("train", "val", "test", "train")[k],
        "attributes": {"color": "red"},
        "lesion_id": k,
        "metadata": {"age_approx": 45, "sex": "male"},
        "sha256": files.sha256_bytes(TILE),
        "source": "ISIC",
        "license": "CC-BY",
    }
    for k in range(4)
]


def tile_folder(place):
    (place / "t").mkdir(exist_ok=True)
    for row in ROWS:
        (place / row["file_name"]).write_bytes(TILE)
    return place


def manifest(kept, place, case):
    """Rows that pass are of known types, and can be written again."""
    rows = files.read_manifest(place)
    for row in rows:
        assert isinstance(row["file_name"], str)
        assert ".." not in row["file_name"].split("/")
    must(lambda: "".join(json.dumps(row, ensure_ascii=False) for row in rows).encode())
    each(
        lambda: label_folder.select(place),
        lambda: generate.listed_in(place / files.MANIFEST),
        lambda: decode.load_tiles(place, rows, 16),
    )


def must(call):
    """A call that must not refuse any more."""
    try:
        return call()
    except (ValueError, OSError) as error:
        raise AssertionError(f"taken, and then {error!r}") from error


def prepared(kept, place, case):
    """A prepared set of a hostile listing: what is written can be read, and lies in the folder."""
    out = place.parent / "out" / "set"
    shutil.rmtree(out.parent, ignore_errors=True)
    prepare.main(["--source", str(place), "--out", str(out), "--prompts", "fixed", "--workers", "1"])
    rows = must(lambda: files.read_manifest(out))
    assert {row["file_name"] for row in rows} == {f"images/{path.name}" for path in (out / "images").iterdir()}


def read_source(kept, place, case):
    """All that prepare asks of a source."""
    path = place / next(iter(case)) if case.keys() & {"a.zip", "train-image.hdf5"} else place
    source = isic.open_source(path)
    source.account()
    for isic_id in source.where:
        source.stamp(isic_id), source.origin(isic_id), source.suffix(isic_id)
    for _, data in source.read(list(source.where)):
        assert isinstance(data, bytes | ValueError)
    each(lambda: metadata(source, source.where))


LABELS = [
    ["isic_id", "target", "patient_id", "lesion_id", "text", "age"],
    *([f"ISIC_{k}", k % 2, f"IP_{k}", f"IL_{k}", "a mole", 45] for k in range(6)),
]
DIAGNOSES = [["image", "MEL", "NV", "BCC"], *([f"ISIC_{k}", k % 2, 1 - k % 2, 0] for k in range(6))]
SPLIT = [
    ["isic_id", "split", "patient_id"],
    *([f"ISIC_{k}", ("train", "val", "test")[k % 3], f"IP_{k}"] for k in range(6)),
]
LISTING = [
    ["file_name", "label", "text", "attributes", "patient_id"],
    *([f"t/{k}.jpg", k % 2, "a mole", '"{""color"": ""red""}"', k] for k in range(4)),
]


def label_table(kept, place, case):
    table = tables.file_table(place / "t.csv")
    source = isic.Source("test", {f"ISIC_{k}": 0 for k in range(6)}, None, None, None, tables=[table])
    each(
        lambda: isic.read_labels(table, source, {"melanoma": "malignant"}),
        lambda: isic.read_groups(table, source),
        lambda: metadata(source, source.where),
    )
    assert set(source.labels.values()) <= {"benign", "malignant"}


MEMBERS = {
    "benign/a.jpg": TILE,
    "benign/a.txt": b"a mole",
    "malignant/b.jpg": TILE,
    "malignant/c.png": hostile.picture("PNG"),
    "x_GroundTruth.csv": b"isic_id,malignant\na,0\nb,1\nc,1\n",
    "metadata.csv": b"isic_id,patient_id\na,1\n",
}


def hdf5_start(place):
    layouts.write_csv(place / "train-metadata.csv", ["isic_id", "target"], [[f"I{k}", k % 2] for k in range(4)])
    (place.parent / "beside" / "secret").write_bytes(TILE)
    with h5py.File(place.parent / "beside" / "secret.h5", "w") as file:
        file["x"] = np.frombuffer(TILE, np.uint8)
    return place


@functools.cache
def plain_hdf5():
    with h5py.File("plain.h5", "w", driver="core", backing_store=False) as file:
        for k in range(4):
            file[f"I{k}"] = np.void(TILE)
        file.flush()
        return file.id.get_file_image()


def picture(kept, place, case):
    """Pixels of a known form, or a refusal; what is read can be remarked on, filled and resized."""
    data = case["x"]
    image = decode.decode(data)
    assert image.dtype == np.uint8
    assert image.ndim == 3
    must(lambda: decode.remark(data))
    if 16 <= min(image.shape[:2]) <= 2000:
        must(lambda: decode.tile(data, 16))


DATASET = {
    "format": 1,
    "color_norm": "skin-locus",
    "color_norm_reference": {"mean": [0.1, -0.1], "direction": [0.6, -0.8]},
    "key": "x",
}


def dataset(kept, place, case):
    norm = decode.recorded_norm(place)
    each(lambda: decode.tile(TILE, 16, *norm))


# --- weights ---------------------------------------------------------------------------------------------------------


@functools.cache
def networks():
    sd = checkpoint._from_folder(folders.MINI, True)
    return {"unet": sd.unet, "text_encoder": sd.text_encoder}


MODULES = (
    "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
    "unet.down_blocks.0.resnets.0.conv1",
    "unet.mid_block.attentions.0.proj_in",
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
)
METADATA = formats.kohya_metadata(2, 2.0, seed=1, clip_skip="1") | {"lesion_step": "1"}
CONFIG = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 2,
    "bias": "none",
    "use_dora": False,
    "use_rslora": True,
    "target_modules": ["to_q"],
    "rank_pattern": {"to_q": 2},
    "alpha_pattern": {"mid_block.*to_q": 1.0},
    "init_lora_weights": True,
    "fan_in_fan_out": False,
}


def adapters(name):
    """{kind: {role: shape}} of every kind of adapter for a module, rank 2, all as they should be."""
    out, inside, *kernel = networks()[name.split(".")[0]].get_submodule(name.split(".", 1)[1]).weight.shape
    ones, flat = [1] * len(kernel), inside * int(np.prod(kernel))
    loha = {f"hada_w{i}_a": [out, 2] for i in (1, 2)} | {f"hada_w{i}_b": [2, flat] for i in (1, 2)}
    found = {
        "lora": {"lora_down.weight": [2, inside, *kernel], "lora_up.weight": [out, 2, *ones]},
        "loha": loha,
        "lokr": {"lokr_w1": [4, 4], "lokr_w2": [out // 4, inside // 4, *kernel]},
        "lokr parts": {
            "lokr_w1_a": [4, 2],
            "lokr_w1_b": [2, 4],
            "lokr_w2_a": [out // 4, 2],
            "lokr_w2_b": [2, inside // 4],
        },
        "dora": {
            "lora_down.weight": [2, inside, *kernel],
            "lora_up.weight": [out, 2, *ones],
            "dora_scale": [out, 1, *ones],
        },
    }
    if kernel:
        found["cp"] = {
            "lora_down.weight": [2, inside, 1, 1],
            "lora_mid.weight": [2, 2, *kernel],
            "lora_up.weight": [out, 2, 1, 1],
        }
        found["loha cp"] = (
            {f"hada_w{i}_a": [2, out] for i in (1, 2)}
            | {f"hada_w{i}_b": [2, inside] for i in (1, 2)}
            | {f"hada_t{i}": [2, 2, *kernel] for i in (1, 2)}
        )
        found["lokr cp"] = {
            "lokr_w1": [1, 1],
            "lokr_w2_a": [2, out],
            "lokr_w2_b": [2, inside],
            "lokr_t2": [2, 2, *kernel],
        }
    return found


def of_module(name, roles):
    """{key: (type, shape)} of one adapter in kohya's spelling."""
    key = ("lora_te_" if name.startswith("text") else "lora_unet_") + name.split(".", 1)[1].replace(".", "_")
    return {f"{key}.{role}": ("F32", shape) for role, shape in roles.items()} | {f"{key}.alpha": ("F32", [])}


def lora_cases(kept):
    good = hostile.tensors_file(of_module(MODULES[0], adapters(MODULES[0])["lora"]), METADATA)
    odd = [
        hostile.edited_tensors(one, METADATA)
        for name in MODULES
        for one in (of_module(name, roles) for roles in adapters(name).values())
    ]
    return only("lora.safetensors", hostile.as_safetensors(good, *odd, *odd[:3]))


def lora(kept, place, case):
    factors, said = formats.read(place / "lora.safetensors", networks(), notes=[])
    for name, (down, up, alpha) in factors.items():
        assert down.isfinite().all()
        assert up.isfinite().all()
        assert np.isfinite(alpha), name
    each(lambda: "lesion_resolution" in said and generate.resolution_of(said))


def adapter_cases(kept):
    peft = hostile.tensors_file(
        {
            f"base_model.model.{MODULES[0].split('.', 1)[1]}.{role}.weight": ("F32", shape)
            for role, shape in zip(("lora_A", "lora_B"), adapters(MODULES[0])["lora"].values())
        }
    )
    inside = {
        f"{MODULES[0]}.{role}.weight": ("F32", shape)
        for role, shape in zip(("lora_A", "lora_B"), adapters(MODULES[0])["lora"].values())
    }
    flat = {f"unet.{key}": value for key, value in CONFIG.items()}
    return st.one_of(
        hostile.as_json(CONFIG).map(lambda data: {"adapter_model.safetensors": peft, "adapter_config.json": data}),
        hostile.edited(flat).map(
            lambda found: {
                "adapter_model.safetensors": hostile.tensors_file(
                    inside, {"lora_adapter_metadata": hostile.dumps(found)}
                )
            }
        ),
    )


def adapter(kept, place, case):
    for _, alpha in ((part, part.alpha) for part in formats.read(place, networks())[0].values()):
        assert np.isfinite(alpha)


def base_start(place):
    """A copy of the built-in base: its JSON to be spoilt, its weights by links."""
    for path in folders.MINI.rglob("*"):
        target = place / path.relative_to(folders.MINI)
        if path.is_dir():
            target.mkdir(exist_ok=True)
        elif path.suffix == ".json" or path.name == "merges.txt":
            target.write_bytes(path.read_bytes())
        else:
            target.symlink_to(path)
    return place


def base_cases(kept):
    names = (
        "unet/config.json",
        "vae/config.json",
        "text_encoder/config.json",
        "scheduler/scheduler_config.json",
        "model_index.json",
    )
    return st.one_of([only(name, hostile.as_json(json.loads((folders.MINI / name).read_bytes()))) for name in names])


def base(kept, place, case):
    checkpoint._from_folder(place, True)


INDEX = {
    "metadata": {"total_size": 8},
    "weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"},
}


def index_start(place):
    for number, name in ((1, "a"), (2, "b")):
        (place / f"model-{number}-of-2.safetensors").write_bytes(hostile.tensors_file({name: ("F32", [1])}))
    return place


def tokenizer_cases(kept):
    known = folders.MINI / "tokenizer"
    tokens, merges = json.loads((known / "vocab.json").read_bytes()), (known / "merges.txt").read_bytes()
    config, added = (
        json.loads((known / "tokenizer_config.json").read_bytes()),
        {"content": "<|endoftext|>", "special": False, "lstrip": False},
    )
    whole = json.loads((kept / "whole.json").read_bytes())
    return st.one_of(
        only("tokenizer/vocab.json", hostile.as_json(tokens)),
        only("tokenizer/merges.txt", hostile.damaged(merges)),
        only(
            "tokenizer/tokenizer_config.json",
            hostile.as_json(config | {"added_tokens_decoder": {"667": added}, "errors": "replace"}),
        ),
        only("tokenizer/tokenizer.json", hostile.as_json(whole)),
        only("tokenizer/added_tokens.json", hostile.as_json({"<|endoftext|>": 667})),
        only("tokenizer/special_tokens_map.json", hostile.as_json({"pad_token": added, "unk_token": "<|endoftext|>"})),
    )


def tokenizer_start(place):
    shutil.copytree(folders.MINI / "tokenizer", place / "tokenizer")
    Tokenizer(place / "tokenizer").clip.backend_tokenizer.save(str(place / "whole.json"))
    return place


def tokenizer(kept, place, case):
    """Ids of a prompt that are the embedding's rows, or a refusal."""
    vocabulary.check_vocabulary(place / "tokenizer", 668)
    ids, _ = Tokenizer(place / "tokenizer")(["a clinical photograph, <x> é \0", "word " * 99, ""])
    assert ids.shape == (3, 77)
    assert 0 <= int(ids.min()) <= int(ids.max()) < 668


META = {"step": 3, "skipped": 0, "in_a_row": 0, "scaler": {}, "alpha": {"unet.0": 2.0}}


def small_network():
    network = nn.Sequential(nn.Linear(4, 4))
    layers.inject(network, ["0"], 2, 2.0, devices.generator(0, 1))
    return network


def state_start(place):
    network = small_network()
    optimizer = torch.optim.AdamW(layers.lora_parameters(network))
    for parameter in layers.lora_parameters(network):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    factors = layers.all_factors({"unet": network})
    lora = {f"{name}.{kind}": getattr(part, kind) for name, part in factors.items() for kind in ("down", "up")}
    return state.grouped(lora=lora, optimizer=optimizer_tensors(optimizer))


def sealed_state(tensors, text):
    """A saved state with the hash that belongs to what is in it."""
    text = text.encode("utf-8", "replace").decode()
    return save(tensors, {state.STATE: f"{state._sha256_state(tensors, text)} {text}"})


def state_cases(tensors):
    plain = sealed_state(tensors, json.dumps(META))

    def changed(found, name, value):
        return sealed_state({**tensors, name: value}, json.dumps(META))

    odd = st.builds(
        changed,
        st.none(),
        st.sampled_from([*tensors, "optimizer.9.step", "optimizer.x", "lora.unet.0.down.x", "optimizer.0.x", "\n"]),
        st.sampled_from(
            [
                torch.zeros(0),
                torch.zeros(4, 4),
                torch.tensor(1),
                torch.full((2, 4), torch.nan),
                torch.zeros(2, 4, 1),
                torch.zeros(2, dtype=torch.bool),
                torch.zeros(2, 4, dtype=torch.complex64),
            ]
        ),
    )
    sealed = hostile.edited(META).map(lambda found: sealed_state(tensors, hostile.dumps(found)))
    return only(training.STATE, hostile.as_safetensors(plain, sealed, sealed, odd))


def saved_state(kept, place, case):
    network = small_network()
    optimizer = torch.optim.AdamW(layers.lora_parameters(network))
    try:
        at = training.load_checkpoint(place, {"unet": network}, optimizer, torch.amp.GradScaler("cpu", enabled=False))
        assert all(type(value) is int for value in vars(at).values())
    finally:
        for path in place.glob("*.damaged.*"):
            path.unlink()


def beside_yaml(kept, place, case):
    assert 0 < ldm_yaml.latent_scale(place / "model.yaml") < 1000


RECIPE = {
    "phase": 1,
    "lr": 3e-5,
    "steps": 10,
    "rank": 4,
    "alpha": 4.0,
    "data": "data/x",
    "base": "x/y",
    "plain": False,
    "text_encoder_lr": None,
    "provenance": {"torch": "2"},
    "tag_frequency": {"a mole": 3},
}


def recipe_cases(kept):
    text = "".join(f"{name}: {json.dumps(value)}\n" for name, value in RECIPE.items())
    return only("recipe", st.one_of(hostile.as_json(RECIPE), hostile.as_yaml(text)))


def recipe(kept, place, case):
    train_lora.parse(["--recipe", str(place / "recipe")])


# --- what commands leave for the next one ----------------------------------------------------------------------------

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
        lambda: generate.open_folder(place, PROVENANCE),
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
    def drawn(text):
        info = PngImagePlugin.PngInfo()
        info.add_itxt("lesion", text)
        data = hostile.picture("PNG", pnginfo=info)
        row = {"file_name": "x.png", "source": "synthetic", "sha256": files.sha256_bytes(data), **DRAWN}
        return {"x.png": data, files.MANIFEST: json.dumps(row).encode()}

    texts = hostile.as_json(DRAWN).map(lambda data: drawn(data.decode("utf-8", "replace")))
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


# --- people ----------------------------------------------------------------------------------------------------------


def label_data(place):
    """A data set with three tiles, and Anna's, Ben's and the adjudicator's desks at one server."""
    data = place / "data"
    (data / "images").mkdir(parents=True)
    rows = []
    for number in range(3):
        (data / "images" / f"{number}.jpg").write_bytes(TILE)
        rows.append(
            {
                "file_name": f"images/{number}.jpg",
                "isic_id": f"I{number}",
                "label": "malignant",
                "text": "",
                "split": "train",
                "attributes": {"color": "red", "size": "4 to 6 mm"},
                "confidence": {"color": 0.3},
            }
        )
    files.write_manifest(data, rows)
    return data


def label_site(place):
    data = label_data(place)
    rows = label_folder.select(data)[0]
    desks = {
        name: label_desk.Desk(data, rows, name, Journal(label_folder.journal_path(data, name), label_folder.check_row))
        for name in ("anna", "ben", "adjudicator")
    }
    bench = label_adjudicate.Bench(desks["adjudicator"], {name: desks[name].labels for name in ("anna", "ben")})
    for name, color in (("anna", "red"), ("ben", "white")):
        desks[name].write(
            {
                "event": "answer",
                "id": f"first-{name}",
                "tile": rows[0]["file_name"],
                "answers": {"color": color},
                "was": {},
            }
        )
    app = label_pages.create_app(data, {"": desks["anna"]}, bench=bench)
    app.config["PROPAGATE_EXCEPTIONS"] = True
    return SimpleNamespace(client=app.test_client(), desks=desks, folder=data)


FORM = {
    "id": "12345678",
    "tile": 0,
    "revision": 111_111,
    "filter": "all",
    "answers": {"color": "red", "other_colors": ["white"]},
    "seconds": 1.5,
    "by": "key",
    "stay": False,
    "change": True,
    "active": "color",
}
FORMS = {
    "answer": FORM,
    "answer/": FORM | {"text": "a clinical photograph of a malignant skin lesion, oval shape"},
    "undo": FORM | {"undo": "x"},
    "flag": FORM | {"flagged": True},
    "comment": FORM | {"comment": "x"},
    "adjudicate/decide": {"id": "12345678", "tile": 0, "attribute": "color", "value": "red", "revision": 111_111},
    "adjudicate/undo": {"id": "12345678", "undo": "x"},
}
QUERIES = [
    "/?filter={}",
    "/?tile={}",
    "/state?tile={}",
    "/state?find={}&after={}",
    "/state?filter={}",
    "/picture/{}/original.png",
    "/centre/{}",
    "/adjudicate/state?at={}",
    "/adjudicate/picture/{}/original.png",
    "/labels.csv",
]
ASKED = st.one_of(
    hostile.texts,
    hostile.numbers.map(str),
    st.sampled_from(["I1", "0", "-1", "-99", "9" * 30, "color=red", "flagged", "unsure"]),
)


def label_requests(kept):
    posts = [
        st.tuples(st.just("POST"), st.just("/" + action.rstrip("/")), hostile.as_json(form))
        for action, form in FORMS.items()
    ]
    asked = st.builds(
        lambda path, a, b: ("GET", path.replace("{}", quoted(a), 1).replace("{}", quoted(b), 1), b""),
        st.sampled_from(QUERIES),
        ASKED,
        ASKED,
    )
    return st.lists(st.one_of(*posts, *posts, asked), min_size=1, max_size=3)


def quoted(text):
    from urllib.parse import quote

    return quote(text[:3000].encode("utf-8", "replace"))


def ask(client, method, path, data, **more):
    """A reply that is no failure of the server: an error is one line."""
    reply = client.open(
        path, method=method, data=data, headers=ORIGIN, **({"content_type": "application/json"} if data else {}) | more
    )
    assert reply.status_code < 500, (reply.status_code, reply.text)
    if reply.status_code >= 400 and reply.is_json and "error" in reply.json:
        assert reply.json["error"]
        assert len(reply.json["error"].splitlines()) == 1, reply.json["error"]
    return reply


NUMBER = itertools.count()


def label_asked(site, place, case):
    for method, path, data in case:
        desk = site.desks["adjudicator" if "adjudicate" in path else "anna"]
        data = data.replace(b"111111", str(desk.tile(0).revision).encode()).replace(
            b"12345678", b"%016d" % next(NUMBER)
        )
        ask(site.client, method, path, data)
    must(lambda: ask(site.client, "GET", "/state?tile=0", b""))
    must(lambda: label_export.labels_csv(site.desks["anna"].rows, {"anna": site.desks["anna"].labels}))


JOURNAL = [
    {
        "event": "answer",
        "id": f"row-{k}",
        "time": "2026-01-01T00:00:00.000+00:00",
        "tile": f"images/{k % 3}.jpg",
        "answers": {
            name: attribute.values[0].name if not attribute.many else [] for name, attribute in VOCABULARY.items()
        },
        "was": {"color": "given"},
        "by": "key",
        "seconds": 1.0,
    }
    for k in range(4)
] + [
    {"event": "undo", "id": "row-5", "undoes": "row-3", "time": "x"},
    {"event": "flag", "id": "row-6", "tile": "images/1.jpg", "flagged": True},
    {"event": "comment", "id": "row-7", "tile": "images/1.jpg", "text": "x"},
]


def label_journal(data, place, case):
    rows = label_folder.select(data)[0]
    with contextlib.ExitStack() as opened:
        desks = {
            name: label_desk.Desk(
                data,
                rows,
                name,
                opened.enter_context(Journal(label_folder.journal_path(data, name), label_folder.check_row)),
            )
            for name in ("anna", "ben")
        }
        bench = label_adjudicate.Bench(desks["ben"], {"anna": desks["anna"].labels, "ben": desks["ben"].labels})
        app = label_pages.create_app(data, {"a" * 22: desks["anna"], "b" * 22: desks["ben"]}, "x" * 20, bench=bench)
        app.config["PROPAGATE_EXCEPTIONS"] = True
        client = app.test_client()
        for path in (
            f"/p/{'a' * 22}/",
            f"/p/{'a' * 22}/state",
            f"/p/{'a' * 22}/labels.csv",
            "/progress?token=" + "x" * 20,
            "/progress",
            "/adjudicate",
            "/progress/labels.csv",
        ):
            must(lambda path=path: ask(client, "GET", path, b""))
        from lesion.web import label_compare

        each(lambda: label_folder.sync(data), lambda: label_compare.agreement(data))


LINKS = {"secret": "s" * 32, "links": {"anna": "a" * 22, "ben": "b" * 22}}


def label_settings(data, place, case):
    def people():
        secret, links = label_folder.people(data, ["anna", "ben"])
        desks = dict.fromkeys(links.values())
        must(lambda: label_pages.create_app(data, desks, secret, secret=secret))

    each(people, lambda: label_folder.primary(data), lambda: label_folder.sync(data))


IMPORTED = [
    ["file_name", "isic_id", "label", "annotator", *VOCABULARY, "flagged", "comment"],
    *(
        [
            f"images/{k}.jpg",
            f"I{k}",
            "malignant",
            "anna",
            *("none" if a.many else a.values[0].name for a in VOCABULARY.values()),
            "no",
            "x",
        ]
        for k in range(3)
    ),
]


def label_import(data, place, case):
    rows = label_folder.select(data)[0]
    for event in label_export.read_labels_csv(place / "labels.csv", rows, "anna", label_folder.Labels()):
        must(lambda event=event: label_folder.check_row(event))


def study_data(place):
    real, synthetic = study_sets.real_set(place / "real", 4), study_sets.synthetic_set(place / "synthetic", 4)
    made = study_folder.create(place / "study", real, synthetic, count=2, seed=1, readers=2, allow_back=True)
    return SimpleNamespace(folder=place / "study", study=made)


def study_site(place):
    kept = study_data(place)
    kept.readers = [study._open_reader(kept.folder, kept.study, number) for number in range(2)]
    kept.app = study.create_app(kept.folder, kept.study, kept.readers)
    kept.app.config["PROPAGATE_EXCEPTIONS"] = True
    kept.client, kept.link = kept.app.test_client(), f"/r/{kept.study['readers'][0]['link']}"
    kept.client.post(kept.link + "/consent", data={"agree": "yes"}, headers=ORIGIN)
    return kept


ANSWER = {
    "position": 0,
    "rating": 3,
    "revision": 111_111,
    "client_s": 1.5,
    "side_px": 400,
    "pixel_ratio": 2,
    "by": "key",
    "malignant": None,
}


def study_requests(kept):
    post = st.tuples(st.just("/answer"), hostile.as_json(ANSWER), st.just("application/json"))
    form = st.tuples(
        st.just("/answer"),
        hostile.spoilt(st.just(b"position=0&rating=3&revision=111111"), b"position=0&rating=3&client_s=1"),
        st.sampled_from(
            ["application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/json; charset=x"]
        ),
    )
    asked = st.builds(lambda path, a: (path + quoted(a), b"", ""), st.sampled_from(["?at=", "/tile/", "x", "/"]), ASKED)
    return st.lists(st.one_of(post, post, form, asked), min_size=1, max_size=3)


def study_asked(kept, place, case):
    for path, data, kind in case:
        data = data.replace(b"111111", str(kept.readers[0].revision(0)).encode())
        ask(kept.client, "POST" if data else "GET", kept.link + path, data, **({"content_type": kind} if data else {}))
    must(lambda: study_folder.read_answers(kept.folder, kept.study))


def study_rows(kept):
    tiles = [tile["id"] for tile in kept.study["tiles"]]
    return [{"event": "consent", "time": "x"}] + [
        {
            "event": "answer",
            "time": "2026-01-01T00:00:00.000+00:00",
            "position": k + 1,
            "tile": tile,
            "rating": 1 + k,
            "malignant": None,
            "client_s": 1.5,
            "server_s": 1.0,
            "by": "key",
            "side_px": 400.0,
            "pixel_ratio": 2.0,
        }
        for k, tile in enumerate(tiles)
    ]


def study_journal(kept, place, case):
    opened = [study._open_reader(kept.folder, kept.study, number) for number in range(2)]
    try:
        client = study.create_app(kept.folder, kept.study, opened, "x" * 20).test_client()
        client.application.config["PROPAGATE_EXCEPTIONS"] = True
        link = f"/r/{kept.study['readers'][0]['link']}"
        for path in (link, link + "?at=1", "/organiser?token=" + "x" * 20, "/organiser", "/organiser/answers.csv"):
            must(lambda path=path: ask(client, "GET", path, b""))
        ask(client, "POST", link + "/answer", json.dumps(ANSWER | {"revision": opened[0].revision(0)}).encode())
    finally:
        for reader in opened:
            reader.journal.close()
    table = must(lambda: study_folder.read_answers(kept.folder, kept.study))[1]
    must(lambda: study_folder.as_arrays(kept.study, table))


def study_cases(kept):
    def sealed(found):
        """With the seal that belongs to it, where it can have one."""
        text = hostile.dumps(found)
        try:
            again = json.loads(text)
            return json.dumps(again | {"seal": study_folder._seal(again)}).encode()
        except (ValueError, RecursionError, TypeError, AttributeError):
            return text.encode("utf-8", "replace")

    made = json.loads((kept.folder / "study.json").read_bytes())
    return only(
        "study/study.json",
        st.one_of(hostile.edited(made).map(sealed), hostile.edited(made).map(sealed), hostile.as_json(made)),
    )


def study_opened(kept, place, case):
    made = study_folder.load(kept.folder)
    readers = [
        must(lambda number=number: study._open_reader(kept.folder, made, number))
        for number in range(len(made["readers"]))
    ]
    try:
        must(lambda: study.create_app(kept.folder, made, readers, "x" * 20))
    finally:
        for reader in readers:
            reader.journal.close()
    table = must(lambda: study_folder.read_answers(kept.folder, made))[1]
    must(lambda: study_folder.as_arrays(made, table))


READERS = [
    Reader("metadata.jsonl", lambda kept: only("metadata.jsonl", hostile.as_lines(ROWS)), manifest, tile_folder),
    Reader("prepare", lambda kept: only("metadata.jsonl", hostile.as_lines(ROWS)), prepared, tile_folder),
    Reader(
        "label table",
        lambda kept: only("t.csv", st.one_of(hostile.as_table(LABELS), hostile.as_table(DIAGNOSES))),
        label_table,
    ),
    Reader(
        "split table",
        lambda kept: only("t.csv", hostile.as_table(SPLIT)),
        lambda kept, place, case: split.by_file(tables.file_table(place / "t.csv")),
    ),
    Reader("metadata.csv", lambda kept: only("metadata.csv", hostile.as_table(LISTING)), read_source, tile_folder),
    Reader(
        "zip",
        lambda kept: only(
            "a.zip", hostile.edited_zip(MEMBERS).flatmap(lambda data: st.one_of(st.just(data), hostile.damaged(data)))
        ),
        read_source,
    ),
    Reader(
        "HDF5",
        lambda kept: only("train-image.hdf5", st.one_of(
            hostile.edited_hdf5({f"I{k}": TILE for k in range(4)}),
            hostile.spoilt(hostile.edited_hdf5({f"I{k}": TILE for k in range(4)}), plain_hdf5()))),
        read_source,
        hdf5_start,
        apart=True,
    ),
    Reader("picture", lambda kept: only("x", hostile.pictures()), picture),
    Reader("dataset.json", lambda kept: only("dataset.json", hostile.as_json(DATASET)), dataset),
    Reader("LoRA file", lora_cases, lora),
    Reader("adapter_config.json", adapter_cases, adapter),
    Reader("checkpoint configs", base_cases, base, base_start),
    Reader(
        "weight index",
        lambda kept: only("model.safetensors.index.json", hostile.as_json(INDEX)),
        lambda kept, place, case: weights.read_all(weights.find(place, "model")),
        index_start,
    ),
    Reader("checkpoint yaml", lambda kept: only("model.yaml", hostile.as_yaml(V1)), beside_yaml),
    Reader("recipe", recipe_cases, recipe),
    Reader("tokenizer", tokenizer_cases, tokenizer, tokenizer_start),
    Reader("saved state", state_cases, saved_state, state_start),
    Reader("metrics.jsonl", lambda kept: only("metrics.jsonl", hostile.as_lines(METRICS)), metrics),
    Reader("predictions.csv", lambda kept: only("W1/seed0/predictions.csv", hostile.as_table(PREDICTIONS)), predicted),
    Reader("SHA256SUMS", sums_cases, hashes, tile_folder),
    Reader("provenance.json", lambda kept: only("provenance.json", hostile.as_json(PROVENANCE)), provenance),
    Reader("args.json", lambda kept: only("runs/a/args.json", hostile.as_json(ARGS)), arguments, run_start),
    Reader("train_files.json", lambda kept: only("train_files.json", hostile.as_json(TRAIN_FILES)), trained_on),
    Reader("report manifest", report_cases, report, report_start),
    Reader("drawn pictures", drawn_cases, drawn_again),
    Reader("labelling requests", label_requests, label_asked, label_site),
    Reader(
        "labelling journal",
        lambda kept: only("data/labels/anna.jsonl", hostile.as_lines(JOURNAL)),
        label_journal,
        label_data,
    ),
    Reader(
        "labelling settings",
        lambda kept: st.one_of(
            only("data/labels/links.json", hostile.as_json(LINKS)),
            only("data/labels/primary.json", hostile.as_json({"primary": "anna"})),
        ),
        label_settings,
        label_data,
    ),
    Reader("labels as csv", lambda kept: only("labels.csv", hostile.as_table(IMPORTED)), label_import, label_data),
    Reader("study requests", study_requests, study_asked, study_site),
    Reader(
        "study journal",
        lambda kept: only("study/answers/reader-1.jsonl", hostile.as_lines(study_rows(kept))),
        study_journal,
        study_data,
    ),
    Reader("study.json", study_cases, study_opened, study_data),
]


def _json(name, value):
    return {name: hostile.dumps(value).encode()}


F4 = {
    f"{key}.{role}": ("F4" if role == "lora_up.weight" else "F32", shape)
    for key in ("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q",)
    for role, shape in (("lora_down.weight", [2, 80]), ("lora_up.weight", [80, 2]))
}
KRON = {
    f"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.lokr_{name}": ("F32", [160, 160])
    for name in ("w1", "w2")
}
EXAMPLES = {  # what was once a traceback, a hang or a memory full
    "prepare": [
        {
            "metadata.jsonl": b"".join(
                json.dumps(row | ({"license": -1} if row["isic_id"] == "I0" else {})).encode() + b"\n" for row in ROWS
            )
        }
    ],
    "LoRA file": [{"lora.safetensors": hostile.tensors_file(F4)}, {"lora.safetensors": hostile.tensors_file(KRON)}],
    "adapter_config.json": [
        {
            "adapter_model.safetensors": hostile.tensors_file(
                {f"base_model.model.{MODULES[0].split('.', 1)[1]}.lora_A.weight": ("F32", [2, 80])}
            ),
            **_json("adapter_config.json", CONFIG | {"lora_alpha": 10**400}),
        }
    ],
    "checkpoint configs": [_json("scheduler/scheduler_config.json", {"beta_start": 10**400})],
    "checkpoint yaml": [{"model.yaml": text} for text in (b"a: !!timestamp x", b"a: !!bool maybe", b"a: !!int ''")],
    "recipe": [{"recipe": text} for text in (b"a: !!timestamp x", b"1: 2", hostile.BOMB.encode())],
    "tokenizer": [_json("tokenizer/special_tokens_map.json", {"x_token": {"content": "<x>"}})],
    "metrics.jsonl": [{"metrics.jsonl": text} for text in (b'{"val_loss": 1}\n', b'{"step": "x", "val_loss": 1}\n')],
    "predictions.csv": [
        {"W1/seed0/predictions.csv": text}
        for text in (
            b"label,score,split,patient,id\nbenign,0.1,test,P\nmalignant,0.2,test,P,x\nbenign,0,val,P,a\nmalignant,1,val,P,b\n",
            b"id,label,score,split,patient\n" + b"x" * 200_000,
        )
    ],
    "provenance.json": [_json("provenance.json", {"loras": [1]}), _json("provenance.json", {"base": [1]})],
    "args.json": [_json("runs/a/args.json", ARGS | {"data": value}) for value in (None, [1])],
    "report manifest": [_json("dropped.json", {"from": ["x"]})],
    "labelling requests": [[("GET", f"/state?find=nothing&after={after}", b"")] for after in (-99, 10**30)]
    + [[("POST", "/answer", hostile.dumps(FORM | {"seconds": 10**400}).encode())]],
    "labelling settings": [_json("data/labels/links.json", {"secret": "s" * 32, "links": {"anna": [1]}})],
    "labels as csv": [{"labels.csv": b"file_name,comment\n" + b"x" * 200_000}],
    "study.json": [{"study/study.json": b"[" * 100_000}],
}
