"""A folder of drawn tiles: whose it is, which of its pictures are whole, its rows, and A1111's line in each picture.

`provenance.json` says what drew them, `metadata.jsonl` holds one row a picture with its SHA-256. Standard library only.
Proven by tests/test_generate.py.
"""
import json
from pathlib import Path

from lesion.run import files

UI_NAMES = {"ddim": "DDIM", "ddpm": "DDPM", "dpmpp": "DPM++ 2M"}  # of the samplers, as A1111 spells them (it has no DDPM)


def named_loras(loras) -> list[tuple[str, float, str]]:
    """(the name that user interfaces show, weight, the first 12 digits of A1111's hash or "") of each LoRA."""
    return [(metadata.get("ss_output_name") or Path(path).stem, weight, metadata.get("sshs_model_hash", "")[:12])
            for path, weight, _, metadata in loras]


def as_parameters(row: dict, loras: list[tuple[str, float, str]] = ()) -> str:
    """The generation parameters as A1111 writes and reads them: prompt with <lora:name:weight>, negative prompt, then one line
    of `Name: value` pairs between commas; a value with a comma or colon stands in quotes."""
    tags = "".join(f" <lora:{name}:{weight:g}>" for name, weight, _ in loras)
    negative = f"\nNegative prompt: {row['negative_prompt']}" if row["negative_prompt"] else ""
    pairs = {"Steps": row["steps"], "Sampler": UI_NAMES.get(row["sampler"], row["sampler"]), "CFG scale": f"{row['guidance_scale']:g}",
             "Seed": row["seed"], "Size": f"{row['resolution']}x{row['resolution']}", "Model hash": row["base_sha256"][:10]}
    if row["eta"]:
        pairs["Eta"] = f"{row['eta']:g}"
    hashes = ", ".join(f"{name}: {digest}" for name, _, digest in loras if digest)
    if hashes:
        pairs["Lora hashes"] = json.dumps(hashes, ensure_ascii=False)
    return f"{row['prompt']}{tags}{negative}\n" + ", ".join(f"{name}: {value}" for name, value in pairs.items())


def open_folder(out: Path, provenance: dict) -> None:
    """Write `provenance.json`, or check that the folder's own is the same. ValueError for another call's folder."""
    path = out / "provenance.json"
    if path.is_file():
        old = files.read_json(path)
        fresh = json.loads(json.dumps(provenance))
        changed = [key for key in ("base_sha256", "base_settings_sha256", "loras", "settings") if old.get(key) != fresh.get(key)]
        if changed == ["settings"] and isinstance(old.get("settings"), dict):
            changed = [key for key in old["settings"] | fresh["settings"] if old["settings"].get(key) != fresh["settings"].get(key)]
        if changed:
            raise ValueError(f"{out} holds the images of another call (other {', '.join(changed)}): give another --out")
        if old == fresh:
            return
    elif out.exists() and any(entry.name[0] != "." for entry in out.iterdir()):
        raise ValueError(f"{out} exists and is not a folder of generate.py: give another --out")
    files.write_json(path, provenance)


def listed_in(path: Path) -> dict[str, dict]:
    """{file_name: row} of a manifest, or nothing where there is none yet. ValueError for a damaged one."""
    have = {row.get("file_name"): row for row in files.read_jsonl(path)} if path.is_file() else {}
    if not all(isinstance(name, str) for name in have):
        raise ValueError(f"{path} is damaged: a row has no file_name")
    return have


def keep_whole(out: Path, batches: list[list[dict]]) -> list[tuple[str, str]]:
    """Take out of the folder and its manifest every picture of a batch that is not whole; (name, what is wrong) of those that are
    listed but not as they were drawn, and of rows of no picture. A batch is whole if each picture has the SHA-256 that its row says:
    one without a row is a killed call's, whose row was not written yet."""
    path = out / files.MANIFEST
    have = listed_in(path)
    wrong, again = [], []
    for some in batches:
        states = {row["file_name"]: state_of(out / row["file_name"], row, have.get(row["file_name"])) for row in some}
        wrong += [(name, state) for name, state in states.items() if state and name in have]
        again += states if any(state is not None for state in states.values()) else []
    ours = {row["file_name"] for some in batches for row in some}
    others = {name: state_of(out / name, row, row) for name, row in have.items() if name not in ours}  # a longer call's
    stray = [name for name, state in others.items() if state and ("sha256" in have[name] or not (out / name).is_file())]
    wrong += [(name, others[name]) for name in stray]
    for name in (*again, *stray):
        (out / name).unlink(missing_ok=True)
    if any(name in have for name in (*again, *stray)):
        files.write_manifest(out, [row for name, row in have.items() if name not in (*again, *stray)])
    return wrong


def state_of(picture: Path, row: dict, listed: dict | None) -> str | None:
    """What is wrong with a picture: None if it is as the manifest lists it, and listed as it shall be drawn."""
    if not picture.is_file():
        return "is missing"
    if listed is None or "sha256" not in listed:
        return "has no recorded SHA-256"
    if listed != json.loads(json.dumps(row)) | {"sha256": listed["sha256"]}:
        return f"is not listed in {files.MANIFEST} as it was drawn"
    return None if files.sha256_file(picture) == listed["sha256"] else "is not the picture that was drawn (its SHA-256 differs)"


def write_rows(out: Path, rows: list[dict], final: bool) -> None:
    """Manifest rows of the images that exist, with their SHA-256: appended as they come, at last written in order (a shorter call
    keeps a longer one's)."""
    path = out / files.MANIFEST
    have = listed_in(path)
    fresh = [row | {"sha256": files.sha256_file(out / row["file_name"])} for row in rows
             if row["file_name"] not in have and (out / row["file_name"]).is_file()]
    if final:
        have |= {row["file_name"]: row for row in fresh}
        files.write_manifest(out, [have[name] for name in sorted(have)])
    elif fresh:
        files.append_jsonl(path, *fresh)
