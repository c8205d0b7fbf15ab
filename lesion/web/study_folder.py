"""A reader study on disk: its tiles, its settings and secrets, its readers' answers.

    DIR/study.json              settings, seed, tiles with their class, readers' links, provenance; sealed by its hash
    DIR/tiles/<id>.png          the tiles as served; id = HMAC-SHA256 of the source under a random key of the study
    DIR/answers/reader-1.jsonl  that reader's journal (lesion.web.journal): consent, then every answer, in order
    DIR/answers.csv             the answers as a table, for other programs; rewritten from the journals

Nothing about a served tile may tell its class but what it shows. Both classes take the same road: decoded, normalised
in colour and resized by lesion.tiles.decode; saved once as JPEG at quality 75 with halved chroma, which is how ISIC's own
tiles come and hides that synthetic ones never were JPEG; then stored as PNG without compression or metadata, so that
every file has the same length and header (lesion.web.study_tiles). Proven by tests/web/test_study_folder.py.
"""
import hashlib
import hmac
import json
import math
import os
import re
import secrets
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from lesion import __version__
from lesion.run import files, sums
from lesion.web import study_tiles
from lesion.web.journal import read_journal
from lesion.web.tables import write_table

FORMAT = 1
TILE, READER, LINK = r"[0-9a-f]{16}", r"reader-[0-9]{1,4}", r"[A-Za-z0-9_-]{16,64}"  # ids that become paths and addresses
SPLITS = ("held-out", "test", "val", "train", "all")
SETTINGS = {"real": str, "synthetic": str, "count": int, "label": str, "split": str, "resolution": int, "seed": int,
            "allow_back": bool, "question_malignancy": bool}
COLUMNS = ("reader", "position", "tile", "class", "file_name", "rating", "malignant", "client_s", "server_s", "changes",
           "by", "time")


# -------------------------------------------------------------------------------------------- making one

def create(folder: Path, real: Path, synthetic: Path, count: int = 20, label: str = "malignant",
           split: str = "held-out", resolution: int | None = None, readers: int = 5, seed: int | None = None,
           allow_back: bool = False, question_malignancy: bool = False) -> dict:
    """Choose `count` tiles of each class and write a study folder; returns the study.

    split: of the real tiles; "held-out" is test and val. resolution: side of the tiles in pixels, None takes the
    synthetic tiles' own. seed decides which tiles and every reader's order; None draws one. ValueError where `folder`
    holds something else, a set has too few readable tiles, or the synthetic tiles differ in size and none is given.
    """
    folder, real, synthetic = Path(folder), Path(real), Path(synthetic)
    _check_unused(folder)
    seed = secrets.randbelow(2 ** 32) if seed is None else seed
    key = secrets.token_bytes(32)
    manifests = {"real": _manifest(real), "synthetic": _manifest(synthetic)}
    candidates = {"real": _spread(_real_rows(manifests["real"], real, label, split, count), seed),
                  "synthetic": _spread(_synthetic_rows(manifests["synthetic"], synthetic, label, count), seed)}
    if resolution is None:
        resolution = study_tiles.common_size(synthetic, candidates["synthetic"][:count])
    _sweep(folder)
    tiles, skipped = [], []
    for name, source in (("real", real), ("synthetic", synthetic)):
        chosen, unreadable = study_tiles.encode_rows(source, candidates[name], count, resolution)
        if len(chosen) < count:
            raise ValueError(f"{source}: only {len(chosen)} of the {count} {label} tiles asked for are readable "
                             f"({unreadable[0]}): give a smaller --count, or more tiles")
        sums.require(source, [files.MANIFEST, files.DATASET, *(row["file_name"] for row, _, _ in chosen)])
        skipped += unreadable
        for row, side, data in chosen:
            identity = hmac.new(key, f"{name}:{row['file_name']}".encode(), hashlib.sha256).hexdigest()[:16]
            tiles.append({"id": identity, "class": name, "file_name": row["file_name"], "source_side": side,
                          "source_sha256": files.sha256_file(source / row["file_name"]),
                          "sha256": hashlib.sha256(data).hexdigest()})
            files.write_bytes(folder / "tiles" / f"{identity}.png", data)
    study = {"format": FORMAT, "created": now(),
             "settings": {"real": str(real.resolve()), "synthetic": str(synthetic.resolve()), "count": count,
                          "label": label, "split": split, "resolution": resolution, "seed": seed,
                          "allow_back": allow_back, "question_malignancy": question_malignancy},
             "organiser_token": secrets.token_urlsafe(24),
             "readers": [_new_reader(number) for number in range(1, readers + 1)],
             "tiles": tiles, "skipped": skipped, "provenance": _provenance(real, synthetic, manifests["synthetic"])}
    _write(folder, study)
    return study


def _manifest(source: Path) -> list[dict]:
    """The rows of a source; ValueError for a picture that leads out of it, which readers would be shown."""
    rows, root = files.read_manifest(source), source.resolve()
    for row in rows:
        if not (source / row["file_name"]).resolve().is_relative_to(root):
            raise ValueError(f"{source / row['file_name']} leads out of {source}: a study takes pictures of that folder only")
    return rows


def _check_unused(folder: Path) -> None:
    if folder.exists() and any(path.name != "tiles" and path.name[0] != "." for path in folder.iterdir()):
        raise ValueError(f"{folder} holds other things and no study.json: give a new folder")
    pictures = (folder / "tiles").iterdir() if (folder / "tiles").is_dir() else ()
    if foreign := next((path for path in pictures if not re.fullmatch(TILE + r"\.png|\..*\.tmp", path.name)), None):
        raise ValueError(f"{foreign} is no tile of a study: give a new folder")


def _sweep(folder: Path) -> None:
    """Remove what a killed creation left: its tiles have ids under a key that is lost."""
    for path in [*folder.glob(".*.tmp"), *folder.glob("tiles/*")]:
        path.unlink()


def _new_reader(number: int) -> dict:
    return {"name": f"reader-{number}", "link": secrets.token_urlsafe(16)}


def _real_rows(rows, source, label, split, count):
    wanted = {"held-out": ("test", "val"), "all": None}.get(split, (split,))
    of_label = [row for row in rows if row.get("label") == label]
    found = [row for row in of_label if wanted is None or row.get("split") in wanted]
    if len(found) < count:
        splits = sorted({str(row.get("split")) for row in of_label})
        there = ", ".join(f"{name} {sum(str(r.get('split')) == name for r in of_label)}" for name in splits) or "none"
        raise ValueError(f"{source} has {len(found)} {label} tiles in --split {split}, not the {count} asked for "
                         f"(there are: {there}): give a smaller --count or another --split")
    return found


def _synthetic_rows(rows, source, label, count):
    found = [row for row in rows if row.get("label", label) == label]
    if len(found) < count:
        raise ValueError(f"{source} has {len(found)} {label} tiles, not the {count} asked for: "
                         "give a smaller --count, or draw more with generate.py")
    return found


def _spread(rows: list[dict], seed: int) -> list[dict]:
    """The rows in a seeded order, one tile of each patient before a second of any: tiles should be independent."""
    order = np.random.default_rng([seed, 0]).permutation(len(rows))
    turns, seen = [], {}
    for place, index in enumerate(order):
        patient = rows[index].get("patient_id")
        turn = seen.get(patient, 0) if patient is not None else 0
        seen[patient] = turn + 1
        turns.append((turn, place, index))
    return [rows[index] for _, _, index in sorted(turns)]


def _provenance(real, synthetic, synthetic_rows):
    def manifest(source):
        description = source / "dataset.json"
        return {"manifest_sha256": files.sha256_file(source / files.MANIFEST),
                "dataset": files.read_json(description) if description.is_file() else None}
    loras = {json.dumps(row.get("lora_sha256")) for row in synthetic_rows}
    bases = {json.dumps(row.get("base_sha256")) for row in synthetic_rows}
    return {"real": manifest(real), "synthetic": manifest(synthetic), "lora_sha256": sorted(loras),
            "base_sha256": sorted(bases), "lesion": __version__, "numpy": np.__version__}


# ------------------------------------------------------------------------------------------- opening one

def load(folder: Path) -> dict:
    """The study of `folder`, checked: ValueError naming what was edited, lost, swapped or resized by hand."""
    folder = Path(folder)
    path = folder / "study.json"
    if not path.is_file():
        raise ValueError(f"{folder} is not a study: it has no study.json; give --real and --synthetic to make one")
    try:
        study = files.parse_json(path.read_bytes())
        format_number, seal = study["format"], study["seal"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} was cut or edited: restore it from a copy") from None
    if format_number != FORMAT:
        raise ValueError(f"{path} has format {format_number!r}, this program reads {FORMAT}")
    if seal not in (_seal(study), _first_seal(study)):
        raise ValueError(f"{path} was edited: a study's settings, tiles and readers stay; restore it from a copy")
    if not _is_whole(study):
        raise ValueError(f"{path} was edited: its ids are not those of a study, or its settings; restore it from a copy")
    side = study["settings"]["resolution"]
    for tile in study["tiles"]:
        file = folder / "tiles" / f"{tile['id']}.png"
        if not file.is_file():
            raise ValueError(f"{file} is missing: restore it from a copy")
        data = file.read_bytes()
        if hashlib.sha256(data).hexdigest() != tile["sha256"]:
            raise ValueError(f"{file} {study_tiles.what_changed(data, side)}: restore it from a copy")
    return study


def _is_whole(study: dict) -> bool:
    """Whether every entry that is used has its type, and every id that becomes a path or an address its form."""
    try:
        settings, tiles, readers = study["settings"], study["tiles"], study["readers"]
        formed = [re.fullmatch(TILE, tile["id"]) and tile["class"] in ("real", "synthetic") for tile in tiles]
        formed += [re.fullmatch(READER, reader["name"]) and re.fullmatch(LINK, reader["link"]) for reader in readers]
        typed = [type(settings[name]) is kind for name, kind in SETTINGS.items()] + [settings["seed"] >= 0]
        typed += [type(tile["source_side"]) is int for tile in tiles]
        typed += [isinstance(text, str) for tile in tiles for text in (tile["file_name"], tile["sha256"])]
        typed += [isinstance(study["organiser_token"], str), isinstance(study.get("skipped", []), list)]
        lists = [(tiles, "id"), (readers, "name"), (readers, "link")]
        once = [0 < len(rows) == len({row[key] for row in rows}) for rows, key in lists]
        return all(formed) and all(typed) and all(once)
    except (KeyError, TypeError):
        return False


def _seal(study: dict) -> str:
    """SHA-256 of everything but the seal itself."""
    return files.sha256_json({name: value for name, value in study.items() if name != "seal"})


def _first_seal(study: dict) -> str:
    """The seal of studies made before it covered origin and token too."""
    return files.sha256_json([study.get(name) for name in ("settings", "tiles", "readers")])


def _write(folder: Path, study: dict) -> None:
    files.write_json(folder / "study.json", study | {"seal": _seal(study)})
    os.chmod(folder / "study.json", 0o600)  # it holds the answer key and the links


def add_readers(folder: Path, study: dict, readers: int) -> None:
    """Raise the number of readers; those there keep their links, orders and answers."""
    have = len(study["readers"])
    study["readers"] += [_new_reader(number) for number in range(have + 1, readers + 1)]
    _write(Path(folder), study)


def order_of(study: dict, number: int) -> list[str]:
    """Tile ids in the order of reader `number` (0, 1, ...): a permutation seeded by the study's seed and the reader."""
    order = np.random.default_rng([study["settings"]["seed"], number + 1]).permutation(len(study["tiles"]))
    return [study["tiles"][index]["id"] for index in order]


def journal_path(folder: Path, reader: dict) -> Path:
    """Where a reader (an entry of study["readers"]) has their journal."""
    return Path(folder) / "answers" / f"{reader['name']}.jsonl"


def row_check(study: dict):
    """A check for the journals: a row is a consent, or an answer that the study could have given."""
    known = {tile["id"] for tile in study["tiles"]}
    asks = study["settings"]["question_malignancy"]

    def check(row: dict) -> None:
        if row.get("event") == "consent":
            return
        if row.get("event") != "answer":
            raise ValueError(f"event {row.get('event')!r}: allowed are 'consent' and 'answer'")
        if not isinstance(row.get("tile"), str) or row["tile"] not in known:
            raise ValueError(f"tile {row.get('tile')!r} is not in this study")
        rating, malignant = row.get("rating"), row.get("malignant")
        if type(rating) is not int or not 1 <= rating <= 6:
            raise ValueError(f"rating {rating!r}: allowed are 1 to 6")
        if type(malignant) is not (bool if asks else type(None)):
            raise ValueError(f"malignant {malignant!r}: allowed is {'true or false' if asks else 'null'}")
        if not isinstance(row.get("time", ""), str):
            raise ValueError(f"time {row.get('time')!r}: allowed is text")
        for name in ("client_s", "server_s"):
            value = row.get(name)
            if value is not None and not (isinstance(value, int | float) and math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} {value!r}: allowed are seconds of at least 0, or null")
    return check


# ---------------------------------------------------------------------------------------------- answers

def latest(rows: list[dict]) -> dict[str, dict]:
    """Tile id -> its last answer, with `changes`, how often it was changed before."""
    answers = {}
    for row in rows:
        if row["event"] == "answer":
            before = answers.get(row["tile"])
            changes = before["changes"] + 1 if before else 0
            answers[row["tile"]] = {**dict.fromkeys(COLUMNS[5:]), "time": "", **row, "changes": changes}
    return answers


def read_answers(folder: Path, study: dict | None = None) -> tuple[dict, list[dict], list[str]]:
    """The study, its answers as rows with the keys COLUMNS, and one line for every journal line that was skipped.
    study: what `load` gave before, so that a server need not check every tile again for each reader who finishes."""
    study = study or load(folder)
    by_id = {tile["id"]: tile for tile in study["tiles"]}
    table, problems = [], []
    for number, reader in enumerate(study["readers"]):
        path = journal_path(folder, reader)
        rows, bad = read_journal(path, row_check(study))
        problems += [f"{path}, line {line}: skipped, {reason}" for line, reason in bad]
        answers = latest(rows)
        for position, identity in enumerate(order_of(study, number), 1):
            if identity in answers:
                table.append({"reader": reader["name"], "position": position, "tile": identity,
                              "class": by_id[identity]["class"], "file_name": by_id[identity]["file_name"],
                              **{name: answers[identity].get(name) for name in COLUMNS[5:]}})
    return study, table, problems


def answers_csv(folder: Path, study: dict | None = None) -> str:
    """The answers as CSV text, a header and a line an answer; no cell is a formula (lesion.web.tables)."""
    return write_table(COLUMNS, read_answers(folder, study)[1])


def export(folder: Path, study: dict | None = None) -> None:
    """Rewrite DIR/answers.csv from the journals, atomically."""
    files.write_bytes(Path(folder) / "answers.csv", answers_csv(folder, study).encode())


def as_arrays(study: dict, table: list[dict]) -> dict:
    """What lesion.stats.readers.analyse takes: names [R], is_real [M]; ratings, malignant, seconds [R, M].

    Not answered: rating 0, malignant -1 (None where it was not asked), seconds NaN. Seconds are the browser's, else the
    server's.
    """
    names = [reader["name"] for reader in study["readers"]]
    column = {tile["id"]: number for number, tile in enumerate(study["tiles"])}
    shape = (len(names), len(column))
    ratings, malignant, seconds = np.zeros(shape, int), np.full(shape, -1), np.full(shape, np.nan)
    for row in table:
        at = names.index(row["reader"]), column[row["tile"]]
        ratings[at] = row["rating"]
        if row["malignant"] is not None:
            malignant[at] = row["malignant"]
        taken = row["client_s"] if row["client_s"] is not None else row["server_s"]
        if taken is not None:
            seconds[at] = taken
    is_real = np.array([tile["class"] == "real" for tile in study["tiles"]])
    return {"names": names, "ratings": ratings, "is_real": is_real, "seconds": seconds,
            "malignant": malignant if study["settings"]["question_malignancy"] else None}


def now() -> str:
    """The time for a row: UTC, ISO 8601, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")
