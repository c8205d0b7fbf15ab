"""What lists, holds or is a tile: tables, folders, archives, pictures."""

import functools
import json
import shutil

import h5py
import layouts
import numpy as np
from fuzz import hostile
from fuzz.reader import TILE, Reader, as_file, each, must, only
from hypothesis import strategies as st

from lesion import prepare
from lesion.run import drawn, files
from lesion.tiles import decode, isic, split, tables
from lesion.tiles.source import metadata
from lesion.web import label_folder

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
        lambda: drawn.listed_in(place / files.MANIFEST),
        lambda: decode.load_tiles(place, rows, 16),
    )


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
]

EXAMPLES = {  # what was once a traceback, a hang or a memory full
    "dataset.json": [as_file("dataset.json", DATASET | {"color_norm_reference": {"mean": [0.1, -0.1], "direction": [0.6, value]}})
                     for value in ("1_0", 10**400)],
    "prepare": [
        {
            "metadata.jsonl": b"".join(
                json.dumps(row | ({"license": -1} if row["isic_id"] == "I0" else {})).encode() + b"\n" for row in ROWS
            )
        }
    ],
}
