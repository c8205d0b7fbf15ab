"""Which tiles a LoRA has seen, who a tile belongs to, and that nothing held out is among them.

Proven by tests/classify/test_arms.py.
"""
from dataclasses import dataclass, field
from pathlib import Path

from lesion.run import files


@dataclass
class Parts:
    """Rows to learn from, to choose by, to test on; `val_held_back` if val was taken from the data set's train."""
    train: list[dict]
    val: list[dict]
    test: list[dict]
    val_held_back: bool
    notes: list[str] = field(default_factory=list)


def train_files(data: Path, rows: list[dict]) -> list[dict]:
    """What the LoRA is about to see: {file_name, sha256, patient_id} a tile; the experiments' leak check compares
    these."""
    return [{"file_name": row["file_name"], "sha256": files.sha256_file(Path(data) / row["file_name"]),
             "patient_id": row.get("patient_id")} for row in rows]


def files_seen(seen: list[dict], start: Path | None) -> list[dict] | None:
    """`seen` and what the starting LoRA, the file `start`, saw before; None if that is not known."""
    if start is None:
        return seen
    before = files_of_lora(start)
    if before is None:
        return None
    return seen + [row for row in before if row not in seen]


def files_of_lora(lora: Path) -> list[dict] | None:
    """The tiles that a LoRA file of a run folder (or of its checkpoints/) has seen; None if the file stands
    elsewhere."""
    for folder in (lora.parent, lora.parent.parent):
        path = folder / "train_files.json"
        if path.is_file():
            try:
                return _checked(files.parse_json(path.read_bytes()))
            except ValueError as error:
                raise ValueError(f"{path} is damaged ({error}): it lists the tiles that the LoRA saw, one object each "
                                 f"with file_name") \
                    from None
    return None


def read_provenance(path: Path) -> dict:
    """What generate.py left beside its pictures, its `loras` a list of objects. ValueError for wrong types."""
    record = files.read_json(path)
    loras = record["loras"] = record.get("loras") or []
    if not isinstance(loras, list) or not all(isinstance(lora, dict) for lora in loras):
        raise ValueError(f"{path} is damaged: its loras are no list of objects")
    named = [(lora, key) for lora in loras for key in ("file", "sha256")]
    for place, name in [(record, "base"), (record, "base_sha256"), *named]:
        files.check_text(place.get(name), f"{path}: {name}")
    for lora in loras:
        try:
            lora["train_files"] = _checked(lora.get("train_files") or [])
        except ValueError as error:
            raise ValueError(f"{path}, train_files: {error}") from None
    return record


def _checked(tiles: object) -> list[dict]:
    """A list of {file_name, sha256, patient_id} with known types; ValueError for anything else."""
    if not isinstance(tiles, list) or \
            not all(isinstance(tile, dict) and isinstance(tile.get("file_name"), str) for tile in tiles):
        raise ValueError("not a list of tiles")
    for tile in tiles:
        files.check_row(tile, tile["file_name"])
    return tiles


def unit_of(row: dict) -> str:
    """Who a tile belongs to: its patient, else itself together with its exact copies."""
    return f"patient {row['patient_id']}" if row.get("patient_id") else f"tile {row.get('sha256') or row['file_name']}"


def tile_id(row: dict) -> str:
    """isic_id where there is one, else the file's name without its ending."""
    return str(row.get("isic_id") or Path(row["file_name"]).stem)


# ------------------------------------------------------------------------------------------- leak check

def check_synthetic(folder: Path, rows: list[dict], parts: Parts, accept_unknown: bool = False,
                    accept_overlap: bool = False) -> dict:
    """Refuse synthetic tiles whose LoRA was trained on a held-out tile or patient; the record of what was checked.

    `folder`/provenance.json (written by generate.py) lists the tiles each LoRA saw; they are compared with the test
    part and the data set's own val part by SHA-256, by ISIC id and by patient. A validation part that was held back
    here was open to the LoRA: how many of its tiles it saw is recorded. `accept_unknown` lets pictures without
    (complete) provenance pass, which is recorded too; a LoRA that saw a test tile never passes. `accept_overlap` (the
    study's split by tile) compares tiles only, not patients.
    """
    loras, problem = _loras(Path(folder), rows)
    held_out = parts.test if parts.val_held_back else parts.test + parts.val
    held_back = parts.val if parts.val_held_back else []
    for lora in loras:
        if leaks := overlap(lora["train_files"], held_out, patients=not accept_overlap):
            raise ValueError(f"the LoRA {lora.get('file')} of {folder} was trained on {len(leaks)} held-out tiles or "
                             f"their patients (first: {leaks[0]}): train it on the training part only, and draw again")
    if problem and not accept_unknown:
        raise ValueError(f"{problem}, so its tiles may have seen a test tile: draw them with this project's "
                         "generate.py, or accept them knowingly with --accept-unknown-synthetic")
    return {"folder": str(folder), "tiles": len(rows), "accepted_unknown": bool(problem),
            "held_back_seen": max((len(overlap(lora["train_files"], held_back)) for lora in loras), default=0),
            "loras": [{"file": lora.get("file"), "sha256": lora.get("sha256"), "tiles": len(lora["train_files"])}
                      for lora in loras]}


def overlap(seen: list[dict], rows: list[dict], patients: bool = True) -> list[str]:
    """File names of `rows` that are among the `seen` tiles: same bytes, same ISIC id, or (`patients`) same patient."""
    hashes, people = values(seen, "sha256"), values(seen, "patient_id") if patients else set()
    isic = {stem for tile in seen if (stem := Path(tile.get("file_name") or "").stem).startswith("ISIC_")}
    return [row["file_name"] for row in rows if row.get("sha256") in hashes or row.get("patient_id") in people
            or tile_id(row) in isic]


def _loras(folder, rows):
    """(the LoRAs of provenance.json whose tiles are known, what is missing to trust the folder or None)."""
    try:
        loras = files.read_json(folder / "provenance.json")["loras"]
        known = {lora["sha256"] for lora in loras}
        complete = [lora for lora in loras if lora["train_files"] and _is_list(lora["train_files"])]
    except (OSError, ValueError, KeyError, TypeError):
        return [], f"{folder} has no readable provenance.json"
    if unknown := {sha for row in rows for sha in _listed(row.get("lora_sha256"))} - known:
        return complete, f"{folder}/provenance.json does not know the LoRA {min(unknown)[:12]} of its tiles"
    if len(complete) < len(loras):
        return complete, f"{folder}/provenance.json does not say which tiles a LoRA was trained on"
    return complete, None


def _is_list(tiles):
    try:
        return bool(_checked(tiles))
    except ValueError:
        return False


def values(rows: list[dict], key: str) -> set:
    """The known values of a column."""
    return {row[key] for row in rows if row.get(key)}


def _listed(value):
    return [] if not value else [str(one) for one in (value if isinstance(value, list) else [value])]
