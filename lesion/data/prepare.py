"""`python -m lesion prepare`: from a source of ISIC tiles to a prepared data set, one folder that every other command reads.

The folder: images/ with the original bytes, metadata.jsonl (one row a tile), dataset.json (how it was made, counts, overlap).
It is built beside its destination and renamed into place when complete: an interrupted run leaves no half set. The same
source, flags and seed give the same bytes. Proven by tests/data/test_prepare.py.
"""
import hashlib
import os
import shutil
from pathlib import Path

from lesion import __version__, cli, files

FORMAT = 1
OWN_FILES = {"images", files.MANIFEST, "dataset.json", ".cache"}
BENIGN = {"train": 8000, "val": 1000, "test": 2000}
ROW_FIELDS = ("text", "attributes", "license", "attribution", "source")  # kept where they came with the tile


def parse(argv: list[str]):
    parser = cli.Parser(prog="lesion prepare", description=__doc__.split("\n\n")[0])
    group = parser.add_argument_group("source and result")
    group.add_argument("--source", required=True, metavar="PATH_OR_URL", help="folder, zip, hdf5 file or URL of the tiles: the "
                       "official archive, Kaggle's, benign/ and malignant/ folders, an imagefolder, kohya captions")
    group.add_argument("--ground-truth", metavar="CSV", help="the label table (isic_id, malignant), where it is not beside the tiles")
    group.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write")
    group.add_argument("--overwrite", action="store_true", help="replace another prepared set in --out")
    group = parser.add_argument_group("sampling and split")
    group.add_argument("--split", choices=("patient", "image"), default="patient", help="unit of the split; image reproduces the study "
                       "and leaks patients")
    group.add_argument("--split-file", type=Path, metavar="CSV", help="isic_id,split with train, val or test: obeyed instead of --split")
    for part, count in BENIGN.items():
        group.add_argument(f"--benign-{part}", type=_count, metavar="N", help=f"benign tiles of {part}, or all (default: {count}, with "
                           "--split-file all)", default=_suppress())
    group.add_argument("--seed", type=cli.number(int, low=0), default=0, help="of the split and the sampling")
    group = parser.add_argument_group("prompts and pixels")
    group.add_argument("--prompts", choices=("structured", "fixed"), default="structured", help="a sentence of measured attributes, or one "
                       "fixed sentence a class; a caption that came with a tile is kept")
    group.add_argument("--color-norm", default="none", metavar="NAME", help="recorded, and applied whenever tiles are loaded: none, "
                       "grey-world, shades-of-gray, max-rgb")
    return parser.parse_args(argv)


def _suppress():
    import argparse
    return argparse.SUPPRESS


def _count(text: str) -> int | None:
    return None if text == "all" else cli.number(int, low=0)(text)


def main(argv: list[str]) -> None:
    args = parse(argv)
    from lesion.data import colour, isic
    if args.color_norm not in colour.NAMES:
        raise ValueError(f"--color-norm {args.color_norm!r} is unknown: allowed are {', '.join(colour.NAMES)}")
    _check_out(args.out, args.overwrite)
    print(f"reading {args.source}", flush=True)
    source = isic.open_source(args.source, args.ground_truth)
    for note in source.notes:
        print(f"  {note}")
    split, ids = choose(source, args)
    key = files.sha256_json([FORMAT, __version__, args.seed, args.prompts, args.color_norm,
                             [[i, split[i], source.labels[i], source.patients.get(i), source.stamp(i)] for i in ids]])
    if _identical(args.out, key):
        print(f"{args.out} already holds this data set; nothing to do")
        return
    if args.out.exists() and any(args.out.iterdir()) and not args.overwrite:
        raise ValueError(f"--out {args.out} holds another data set: choose another folder, or --overwrite")
    staging = args.out.parent / f".{args.out.name}.partial"
    try:
        rows, record = build(source, ids, split, args, staging)
        files.write_manifest(staging, rows)
        files.write_json(staging / "dataset.json", {**record, "key": key})
        _swap(staging, args.out)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    _report(args.out, rows, record)


def choose(source, args) -> tuple[dict[str, str], list[str]]:
    """(isic_id -> part, sorted ids of the sample) by the flags; the patient check comes first."""
    from lesion.data import isic
    from lesion.data import split as splitting
    ids = list(source.where)
    if args.split_file:
        if not args.split_file.is_file():
            raise ValueError(f"--split-file {args.split_file} does not exist")
        listed, patients = splitting.by_file(isic.Table(args.split_file.name,
                                                        lambda: open(args.split_file, encoding="utf-8-sig", newline="")))
        for isic_id, patient in patients.items():
            source.patients.setdefault(isic_id, patient)
        split = {i: listed[i] for i in ids if i in listed}
        print(f"  {len(split)} of {len(ids)} tiles are in {args.split_file.name}; {len(listed) - len(split)} of its rows have no tile")
        if not split:
            raise ValueError(f"--split-file {args.split_file} lists none of the tiles of {args.source}")
    elif args.split == "image":
        split = splitting.by_image(ids, source.labels, args.seed)
        leaked, positives = splitting.leaked_positives(split, source.labels, source.patients)
        print(f"  split by image: {leaked} of {positives} malignant test tiles have a patient-mate in training" if source.patients
              else "  split by image: no patient ids, so the leak cannot be counted")
    elif all(source.given.get(i, {}).get("split") in splitting.PARTS for i in ids):
        split = {i: source.given[i]["split"] for i in ids}
        print("  the split that came with the tiles is kept")
    else:
        known = [i for i in ids if i in source.patients]
        if not known:
            raise ValueError(f"{args.source} has no patient ids: give the split with --split-file CSV (isic_id,split), or accept that "
                             "patients may be on both sides with --split image")
        if len(known) < len(ids):
            print(f"  {len(ids) - len(known)} tiles have no patient id and are left out")
        split = splitting.by_patient(known, source.labels, source.patients, args.seed)
    benign = {part: getattr(args, f"benign_{part}", None if args.split_file else count) for part, count in BENIGN.items()}
    chosen = splitting.sample(split, source.labels, benign, args.seed)
    split = {i: split[i] for i in chosen}
    if args.split != "image" or args.split_file:
        for (a, b), patients in splitting.shared(split, source.patients).items():
            if patients:
                raise ValueError(f"{len(patients)} patients have tiles in both {a} and {b} (first: {min(patients)}): correct the split; "
                                 "--split image allows it, to reproduce the study")
    return split, chosen


def build(source, ids, split, args, staging: Path) -> tuple[list[dict], dict]:
    """Write the tiles to `staging`/images; the manifest's rows and dataset.json's record."""
    from lesion.data import isic, tiles
    from lesion.data.prompts import FIXED_PROMPT
    shutil.rmtree(staging, ignore_errors=True)
    (staging / "images").mkdir(parents=True)
    details = isic.metadata(source, ids)
    rows, problems = [], []
    for isic_id, data in cli.progress(source.read(ids), total=len(ids), desc="tiles", unit="tile"):
        try:
            if isinstance(data, ValueError):
                raise data
            tiles.decode(data)
        except ValueError as error:
            problems.append(f"{isic_id}: {error}")
            continue
        name = f"images/{isic_id}{source.suffix(isic_id)}"
        (staging / name).write_bytes(data)
        rows.append(_row(source, isic_id, name, split[isic_id], details[isic_id], hashlib.sha256(data).hexdigest()))
    if not rows:
        raise ValueError(f"none of the {len(ids)} tiles is readable (first: {problems[0]})")
    for row in rows:
        row["text"] = row["text"] or FIXED_PROMPT[row["label"]]
    record = {"format": FORMAT, "name": rows[0]["source"], "source": source.layout, "color_norm": args.color_norm,
              "split": "file" if args.split_file else args.split, "seed": args.seed, "prompts": args.prompts, "counts": _counts(rows),
              "license": sorted({row["license"] or "unknown" for row in rows}), "unreadable": problems, "notes": source.notes}
    return rows, record


def _row(source, isic_id: str, name: str, part: str, details: dict, sha256: str) -> dict:
    given = source.given.get(isic_id, {})
    origin, licence = source.origin(isic_id)
    row = {"file_name": name, "isic_id": isic_id, "text": given.get("text"), "label": source.labels[isic_id], "split": part,
           "patient_id": source.patients.get(isic_id), "attributes": given.get("attributes", {}), "source": given.get("source", origin),
           "license": details.pop("copyright_license", None) or given.get("license", licence),
           "attribution": details.pop("attribution", None) or given.get("attribution"), "sha256": sha256}
    for name in ("malignant", "target", "label", "patient_id"):
        details.pop(name, None)
    return {**row, "lesion_id": source.lesions.get(isic_id), "metadata": details}


def _counts(rows) -> dict:
    counts = {}
    for row in rows:
        part = counts.setdefault(row["split"], {"benign": 0, "malignant": 0, "patients": set()})
        part[row["label"]] += 1
        part["patients"].add(row["patient_id"])
    return {part: {**counts[part], "patients": len(counts[part]["patients"] - {None})} for part in ("train", "val", "test") if part in counts}


def _check_out(out: Path, overwrite: bool) -> None:
    old = out.parent / f".{out.name}.old"
    if old.exists() and not out.exists():
        os.replace(old, out)  # an --overwrite was killed between its two renames
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: give a folder")
    if overwrite and out.exists() and (others := sorted(p.name for p in out.iterdir() if p.name not in OWN_FILES)):
        raise ValueError(f"--out {out} holds what prepare did not write ({', '.join(others[:3])}): move it away before --overwrite")


def _identical(out: Path, key: str) -> bool:
    import json
    path = out / "dataset.json"
    return path.is_file() and json.loads(path.read_text()).get("key") == key


def _swap(staging: Path, out: Path) -> None:
    """Rename the finished folder into place; an old one is kept until the new one stands."""
    if hasattr(os, "sync"):
        os.sync()  # thousands of small files: one flush instead of one each
    old = out.parent / f".{out.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        os.replace(out, old)
    os.replace(staging, out)
    shutil.rmtree(old, ignore_errors=True)


def _report(out: Path, rows, record) -> None:
    print(f"\n{out}: {len(rows)} tiles ({', '.join(record['license'])})\n")
    print(f"  {'':8}{'benign':>8}{'malignant':>11}{'patients':>10}")
    for part, count in record["counts"].items():
        print(f"  {part:8}{count['benign']:8}{count['malignant']:11}{count['patients'] or 'unknown':>10}")
    if record["unreadable"]:
        print(f"\n{len(record['unreadable'])} tiles are unreadable and left out: {'; '.join(record['unreadable'][:3])}")
    print(f"\nnext: python train_lora.py --phase 1 --data {out}")
