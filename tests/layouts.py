"""Twenty-four procedural tiles in every layout that tiles are published in, and a web server that drops connections."""
import collections
import contextlib
import csv
import http.server
import io
import json
import random
import re
import threading
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

FIXED = "a clinical photograph of a {} skin lesion"
IDS = [f"ISIC_{1000003 * k % 9999999:07d}" for k in range(1, 25)]
LABELS = {i: "malignant" if k % 3 == 0 else "benign" for k, i in enumerate(IDS)}
PATIENTS = {i: f"IP_{k // 2:07d}" for k, i in enumerate(IDS)}
SPLIT = {i: ("train", "val", "test")[k // 2 % 3] for k, i in enumerate(IDS)}
ATTRIBUTION = "Frazer Institute, The University of Queensland, Dermatology Research Centre"  # commas


def jpeg(seed: int, side: int = 40) -> bytes:
    """A skin-coloured tile with freckles, a spot and some noise, as JPEG bytes."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] / side
    image = np.full((side, side, 3), (214, 170, 146), float) + rng.normal(0, 3, (side, side, 3))
    for _ in range(12):
        cy, cx, radius = *rng.random(2), rng.uniform(0.03, 0.12)
        spot = np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / (2 * radius ** 2))
        image -= rng.uniform(15, 90) * spot[..., None] * (0.6, 1, 1.1)
    stream = io.BytesIO()
    Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=92)
    return stream.getvalue()


TILES = {isic_id: jpeg(number) for number, isic_id in enumerate(IDS)}


def write_csv(path: Path, header: list[str], rows: list[list]) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def split_file(folder: Path) -> Path:
    return write_csv(folder / "split.csv", ["isic_id", "split"], [[i, SPLIT[i]] for i in IDS])


def ground_truth(folder: Path, release: str = "ISIC_2024_Permissive") -> Path:
    rows = [[i, "1.0" if LABELS[i] == "malignant" else "0.0"] for i in IDS]
    return write_csv(folder / f"{release}_Training_GroundTruth.csv", ["isic_id", "malignant"], rows)


def official_zip(folder: Path, release: str = "ISIC_2024_Permissive", metadata: bool = False) -> Path:
    """The archive's zip with its GroundTruth beside it; with metadata.csv inside on demand, as some releases have."""
    ground_truth(folder, release)
    name = f"{release}_Training_Input"
    with zipfile.ZipFile(folder / f"{name}.zip", "w") as archive:
        for isic_id, data in TILES.items():
            archive.writestr(f"{name}/{isic_id}.jpg", data)
        if metadata:
            text = "isic_id,patient_id,age_approx,tbp_tile_type,attribution,copyright_license\n"
            text += "".join(f'{i},{PATIENTS[i]},{45 if k else ""},3D: XP,"{ATTRIBUTION}",CC-BY\n'
                            for k, i in enumerate(IDS))
            archive.writestr(f"{name}/metadata.csv", text)
    return folder / f"{name}.zip"


def unzipped(folder: Path, nested: int = 1) -> Path:
    ground_truth(folder)
    place = folder.joinpath(*["ISIC_2024_Permissive_Training_Input"] * nested)
    place.mkdir(parents=True)
    for isic_id, data in TILES.items():
        (place / f"{isic_id}.jpg").write_bytes(data)
    return folder


def kaggle(folder: Path, shared: Path, hdf5: bool) -> Path:
    """train-metadata.csv under Kaggle's exact 55-column header, values of Kaggle's own sample rows, and the tiles."""
    header = (shared / "isic2024" / "kaggle_train_metadata_header.csv").read_text(encoding="utf-8").strip().split(",")
    with open(shared / "isic2024" / "kaggle_test_metadata_sample.csv", newline="", encoding="utf-8") as file:
        samples = list(csv.DictReader(file))
    rows = []
    for number, isic_id in enumerate(IDS):
        row = {**dict.fromkeys(header, ""), **samples[number % 3], "isic_id": isic_id, "patient_id": PATIENTS[isic_id],
               "target": int(LABELS[isic_id] == "malignant"), "iddx_full": "Benign", "lesion_id": f"IL_{number:07d}"}
        rows.append([row[name] for name in header])
    write_csv(folder / "train-metadata.csv", header, rows)
    write_csv(folder / "sample_submission.csv", ["isic_id", "target"], [["ISIC_0015657", 0.3]])  # stands beside it
    if hdf5:
        import h5py
        with h5py.File(folder / "train-image.hdf5", "w") as file:
            for isic_id, data in TILES.items():
                file[isic_id] = np.void(data)
    else:
        (folder / "train-image" / "image").mkdir(parents=True)
        for isic_id, data in TILES.items():
            (folder / "train-image" / "image" / f"{isic_id}.jpg").write_bytes(data)
    return folder


def class_folders(folder: Path, prefix: str = "", captions: str = "") -> Path:
    """benign/ and malignant/; with `prefix` "10_" and `captions` ".txt" it is kohya's layout."""
    for isic_id, data in TILES.items():
        place = folder / f"{prefix}{LABELS[isic_id]}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{isic_id}.jpg").write_bytes(data)
        if captions:
            (place / f"{isic_id}{captions}").write_text(FIXED.format(LABELS[isic_id]) + "\n", encoding="utf-8")
    return folder


def imagefolder(folder: Path, table: str = "metadata.jsonl") -> Path:
    (folder / "tiles").mkdir(parents=True)
    rows = []
    for isic_id, data in TILES.items():
        (folder / "tiles" / f"{isic_id}.jpg").write_bytes(data)
        rows.append({"file_name": f"tiles/{isic_id}.jpg", "label": int(LABELS[isic_id] == "malignant"),
                     "text": FIXED.format(LABELS[isic_id])})
    if table.endswith(".csv"):
        write_csv(folder / table, list(rows[0]), [list(row.values()) for row in rows])
    else:
        (folder / table).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@contextlib.contextmanager
def serve(folder: Path, drop: float = 0.0, ranges: bool = True):
    """An http server of `folder` with range requests; each answer breaks off in the middle with probability `drop`,
    the same range three times at most.

    Yields an object with `url`, `sent` (bytes) and `dropped` (answers).
    """
    chance = random.Random(5)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            path = folder / self.path.lstrip("/")
            if not path.is_file():
                self.send_error(404)
                return
            data, size = path.read_bytes(), path.stat().st_size
            asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")) if ranges else None
            start, end = 0, size - 1
            if asked:
                start = int(asked[1]) if asked[1] else size - int(asked[2])
                end = min(int(asked[2]), end) if asked[1] and asked[2] else end
            self.send_response(206 if asked else 200)
            if asked:
                self.send_header("Content-Range", f"bytes {start}-{end}/{size}")
            self.send_header("Content-Length", str(end + 1 - start))
            self.end_headers()
            body = data[start:end + 1]
            if chance.random() < drop and server.breaks[self.path, end] < 3:
                server.breaks[self.path, end] += 1
                server.dropped += 1
                body = body[:len(body) // 2]
                self.close_connection = True
            server.sent += len(body)
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.sent, server.dropped, server.breaks = True, 0, 0, collections.Counter()
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
