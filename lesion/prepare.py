"""`python -m lesion prepare`: from a source of ISIC tiles to a prepared data set, the folder every other command reads.

The folder: images/ with the original bytes, metadata.jsonl (one row a tile), dataset.json (how it was made, counts,
overlap). It is built beside its destination and renamed into place when complete: an interrupted run leaves no half
set. The same source, flags and seed give the same bytes. Proven by tests/test_prepare.py.
"""
import argparse
import contextlib
import hashlib
import os
import shutil
import zlib
from importlib.metadata import version
from pathlib import Path

from lesion import __version__
from lesion.run import cli, files, lock, sums

FORMAT = 1
OWN_FILES = {"images", files.MANIFEST, "dataset.json", "attributes.png", ".cache", sums.NAME, lock.NAME}
BENIGN = {"train": 8000, "val": 1000, "test": 2000}
COLOR_NORMS = "none, grey-world, shades-of-gray, max-rgb, skin-locus"
MEASURED_BY = ("numpy", "pillow", "scikit-image", "scipy")
REFERENCE_TILES = 1000  # training tiles that define skin-locus's line
LEAST_SIDE = 16  # pixels; ISIC 2024's smallest tile has 51
OWN_PLACE = ("malignant", "target", "label", "patient_id", "lesion_id")  # columns that a row has a place of its own for


def parse(argv: list[str]) -> argparse.Namespace:
    """The flags."""
    parser = cli.Parser(prog="lesion prepare", description=__doc__.split("\n\n")[0])
    group = parser.add_argument_group("source and result")
    group.add_argument("--source", required=True, metavar="PATH_OR_URL",
                       help="folder, zip, hdf5 file or URL of the tiles: the official archive, Kaggle's, benign/ and "
                       "malignant/ folders, an imagefolder, kohya captions")
    group.add_argument("--ground-truth", metavar="CSV",
                       help="the label table (isic_id and malignant or target), where it is not beside the tiles")
    group.add_argument("--label-map", nargs="+", action="extend", type=_label_word, metavar="NAME=LABEL",
                       default=argparse.SUPPRESS,
                       help="what a folder's name, a table's word or a diagnosis stands for: benign, malignant or skip")
    group.add_argument("--out", type=Path, default=Path("data/isic2024"), metavar="DIR", help="folder to write")
    group.add_argument("--overwrite", action="store_true", help="replace another prepared set in --out")
    group = parser.add_argument_group("split and sampling")
    group.add_argument("--split", choices=("patient", "image"), default="patient",
                       help="unit of the 80/20 split; image reproduces the study and leaks patients")
    group.add_argument("--split-file", type=Path, metavar="CSV",
                       help="isic_id,split with train, val or test: obeyed instead of --split")
    for part, count in BENIGN.items():
        group.add_argument(f"--benign-{part}", type=_count, metavar="N", default=argparse.SUPPRESS,
                           help=f"benign tiles of {part}, or all (default: {count}; with --split-file all)")
    group.add_argument("--seed", type=cli.number(int, low=0, high=2 ** 32 - 1), default=0,
                       help="of the split and the sampling")
    group = parser.add_argument_group("prompts and pixels")
    group.add_argument("--prompts", choices=("structured", "fixed"), default="structured",
                       help="a sentence of measured attributes, or one sentence a class; a caption that came with a "
                       "tile is kept")
    group.add_argument("--color-norm", default="none", metavar="NAME",
                       help=f"recorded, and applied whenever tiles are loaded: {COLOR_NORMS}")
    group.add_argument("--workers", type=cli.number(int, low=1), default=os.cpu_count() or 1,
                       help="processes that measure attributes, connections that download")
    return parser.parse_args(argv)


def _count(text: str) -> int | None:
    return None if text == "all" else cli.number(int, low=0)(text)


def _label_word(text: str) -> tuple[str, str]:
    name, _, label = text.rpartition("=")
    if not name.strip() or label.lower() not in ("benign", "malignant", "skip"):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=benign, NAME=malignant or NAME=skip")
    return name.strip().lower(), label.lower()


def main(argv: list[str]) -> None:
    """Source to prepared data set, in order: read, choose, check that it is new, build aside, rename into place."""
    args = parse(argv)
    args.out = _place(args.out)
    with lock.owner(args.out, beside=True):
        prepare(args)


def prepare(args) -> None:
    """Read, choose, build beside --out, rename into place."""
    from lesion.tiles import colour, isic
    from lesion.tiles.source import metadata
    colour.check(args.color_norm)
    _check_out(args.out, args.overwrite)
    print(f"reading {args.source}", flush=True)
    source = isic.open_source(args.source, args.ground_truth, args.workers, dict(getattr(args, "label_map", ())))
    print(f"  {source.layout}: {len(source.where)} labelled tiles")
    print(f"  {cli.one_line(source.account())}")
    try:
        split, ids = choose(source, args)
    finally:  # the reasons stand before a refusal
        for note in source.notes:
            print(f"  {cli.one_line(note)}", flush=True)
    details = metadata(source, ids)
    key = files.sha256_json([FORMAT, __version__, args.seed, args.prompts, args.color_norm,
                             [[i, split[i], source.labels[i], source.patients.get(i), source.stamp(i), details[i],
                               source.given.get(i)] for i in ids]])
    if _recorded(args.out).get("key") == key:
        damaged = _damaged(args.out)
        if not damaged:
            print(f"{args.out} already holds this data set; nothing to do")
            return
        if not args.overwrite:
            raise ValueError(f"{args.out} holds this data set, but {damaged} is gone or changed: make it again with "
                             f"--overwrite")
    if args.out.exists() and any(args.out.iterdir()) and not args.overwrite:
        raise ValueError(f"--out {args.out} holds another data set: choose another folder, or --overwrite")
    _check_replaceable(args.out)
    staging = args.out.parent / f".{args.out.name}.partial"
    said = len(source.notes)
    try:
        record = build(source, details, split, args, staging)
        for note in source.notes[said:]:
            print(f"  {cli.one_line(note)}")
        files.write_json(staging / "dataset.json", {**record, "key": key})
        sums.write(staging)
        with contextlib.ExitStack() as held:
            held.enter_context(lock.owner(args.out, wanted=args.out.exists()))  # nobody labels what is replaced
            if os.name != "posix":
                held.close()  # Windows moves no folder with an open file in it
            _swap(staging, args.out)
    except BaseException:
        if source.remote:
            print(f"what was fetched is kept in {staging}; the same command goes on from there")
        else:
            shutil.rmtree(staging, ignore_errors=True)
        raise
    _report(args.out, record)


def choose(source, args) -> tuple[dict[str, str], list[str]]:
    """(isic_id -> part, sorted ids of the sample) by the flags. ValueError without patients to split by, or with a
    patient in two parts of a split that claims to be by patient."""
    from lesion.tiles import split
    from lesion.tiles.tables import file_table
    ids, came_with = list(source.where), {i: row["split"] for i, row in source.given.items() if "split" in row}
    if args.split_file:
        table = file_table(args.split_file, "--split-file")
        listed, patients = split.by_file(table)
        source.notes += table.notes
        source.patients = {**patients, **source.patients}
        parts = {i: listed[i] for i in ids if i in listed}
        if not parts:
            raise ValueError(f"--split-file {args.split_file} lists none of the {len(ids)} tiles of {args.source}")
        source.notes.append(f"{args.split_file.name} places {len(parts)} of {len(ids)} tiles; "
                            f"{len(listed) - len(parts)} of its rows have no tile")
    elif args.split == "image":
        parts = split.by_image(ids, source.labels, args.seed)
    elif len(came_with) == len(ids):
        parts = {i: came_with[i] for i in ids}
        source.notes.append("the split that came with the tiles is kept")
    else:
        known = [i for i in ids if i in source.patients]
        if not known:
            raise ValueError(f"{args.source} has no patient ids: give the split with --split-file CSV (isic_id,split), "
                             "or accept that patients may be on both sides with --split image")
        if len(known) < len(ids):
            source.notes.append(f"{len(ids) - len(known)} tiles have no patient id and are left out")
        parts = split.by_patient(known, source.labels, source.patients, args.seed)
    whole = args.split_file or (came_with and args.split != "image")  # a given split is not thinned unless asked to
    benign = {part: getattr(args, f"benign_{part}", None if whole else count) for part, count in BENIGN.items()}
    chosen = split.sample(parts, source.labels, benign, args.seed)
    parts = {i: parts[i] for i in chosen}
    if args.split == "image" and not args.split_file:
        leaked, positives = split.leaked_positives(parts, source.labels, source.patients)
        source.notes.append(f"split by image: {leaked} of {positives} malignant test tiles have a patient-mate in "
                            "training" if source.patients else
                            "split by image: no patient ids, so the leak cannot be counted")
        return parts, chosen
    for (a, b), both in split.shared(parts, source.patients).items():
        if both:
            raise ValueError(f"{len(both)} patients have tiles in both {a} and {b} (first: {min(both)}): correct the "
                             "split; only --split image allows it, to reproduce the study")
    return parts, chosen


def build(source, details: dict[str, dict], parts: dict[str, str], args, staging: Path) -> dict:
    """Write images/ and metadata.jsonl to `staging`; returns dataset.json's record. `details`: `source.metadata`'s."""
    from lesion.describe.rows import describe, outline_sheet
    from lesion.tiles import split
    ids = list(details)
    if not source.remote:
        shutil.rmtree(staging, ignore_errors=True)
    prints, shapes, problems, remarks = fetch(source, ids, staging)
    source.notes += [f"{len(names)} tiles are {what} (first: {names[0]})" for what, names in sorted(remarks.items())]
    if not prints:
        raise ValueError(f"none of the {len(ids)} tiles is readable (first: {problems[0]})")
    rows = [_row(source, i, parts[i], details[i], prints[i][0]) for i in ids if i in prints]
    for path in (staging / "images").iterdir():  # left by an interrupted run with other flags
        if path.stem not in prints:
            path.unlink()
    describe(rows, staging, args.prompts == "structured", args.workers)
    if args.prompts == "structured":
        outline_sheet(rows, staging)
    files.write_manifest(staging, rows)
    readable = {i: part for i, part in parts.items() if i in prints}
    return {"format": FORMAT, "name": rows[0]["source"], "source": source.layout, "color_norm": args.color_norm,
            "color_norm_reference": _reference(rows, staging, args), "split": "file" if args.split_file else args.split,
            "seed": args.seed, "prompts": args.prompts, "counts": _counts(rows),
            "overlap": split.overlap(readable, source.patients, source.lesions, prints),
            "license": sorted({row["license"] or "unknown" for row in rows}), "unreadable": problems,
            "not_square": shapes, "notes": source.notes, "arguments": _arguments(args),
            "versions": {"lesion": __version__, **{name: version(name) for name in MEASURED_BY}}}


def _arguments(args) -> dict:
    """The flags that decide what is in the folder, as text."""
    return {name: str(value) for name, value in sorted(vars(args).items())
            if value is not None and name not in ("out", "overwrite", "workers")}


def fetch(source, ids: list[str], staging: Path) -> tuple[dict, list[str], list[str], dict[str, list[str]]]:
    """Copy the tiles' bytes to `staging`/images: ({isic_id: (sha256, fingerprint)}, not square, unreadable "id: why",
    {remark: ids}). A tile under LEAST_SIDE pixels is unreadable, and so is one whose path would leave the folder."""
    from lesion.tiles import decode, split
    images = staging / "images"
    images.mkdir(parents=True, exist_ok=True)
    kept = {i for i in ids if source.remote and _is_there(images / _name(source, i), source.stamp(i))}
    prints, shapes, problems, remarks = {}, [], [], {}
    with cli.progress(total=len(ids), desc="tiles", unit="tile") as bar:
        fresh = source.read([i for i in ids if i not in kept])
        old = ((i, (images / _name(source, i)).read_bytes()) for i in ids if i in kept)
        for stream, new in ((old, False), (fresh, True)):
            for isic_id, data in stream:
                bar.update()
                try:
                    if isinstance(data, ValueError):
                        raise data
                    image = decode.decode(data, square=False)
                    if min(image.shape[:2]) < LEAST_SIDE:
                        raise ValueError(f"{image.shape[1]}x{image.shape[0]} pixels, expected at least {LEAST_SIDE} a "
                                         f"side")
                except ValueError as error:
                    problems.append(f"{isic_id}: {error}")
                    continue
                if image.shape[0] != image.shape[1]:
                    shapes.append(f"{isic_id}: {image.shape[1]}x{image.shape[0]}")
                if (what := decode.remark(data)) is not None:
                    remarks.setdefault(what, []).append(isic_id)
                if new:
                    path = images / _name(source, isic_id)
                    if path.parent != images or path.is_symlink():
                        raise ValueError(f"{path} is no place for a tile: {isic_id!r} leads out of {images}")
                    path.write_bytes(data)
                prints[isic_id] = hashlib.sha256(data).hexdigest(), split.fingerprint(decode.central_square(image))
    return prints, sorted(shapes), sorted(problems), remarks


def _is_there(path: Path, stamp: list) -> bool:
    """Whether an earlier, interrupted run has fetched this zip member whole: same size and CRC-32."""
    if not path.is_file() or path.stat().st_size != stamp[0]:
        return False
    return zlib.crc32(path.read_bytes()) == stamp[1]


def _name(source, isic_id: str) -> str:
    return isic_id + source.suffix(isic_id)


def _row(source, isic_id: str, part: str, details: dict, sha256: str) -> dict:
    given = {k: v for k, v in source.given.get(isic_id, {}).items() if v is not None}
    name, licence = source.origin(isic_id)
    row = {"file_name": f"images/{_name(source, isic_id)}", "isic_id": isic_id, "text": None,
           "label": source.labels[isic_id], "patient_id": source.patients.get(isic_id), "attributes": {},
           "source": name, "license": licence, "lesion_id": source.lesions.get(isic_id), **given,
           "split": part, "sha256": sha256}
    row["license"] = details.pop("copyright_license", None) or row["license"]
    row["attribution"] = details.pop("attribution", None) or row.get("attribution")
    row["metadata"] = {k: v for k, v in details.items() if k not in OWN_PLACE} or row.get("metadata")
    return {k: v for k, v in row.items() if v is not None or k == "patient_id" or k == "license" or k == "text"}


def _counts(rows: list[dict]) -> dict:
    counts = {}
    for part in ("train", "val", "test"):
        mine = [row for row in rows if row["split"] == part]
        if mine:
            counts[part] = {label: sum(row["label"] == label for row in mine) for label in ("benign", "malignant")}
            counts[part]["patients"] = len({row["patient_id"] for row in mine} - {None}) or None
    return counts


def _reference(rows: list[dict], staging: Path, args) -> dict | None:
    if args.color_norm != "skin-locus":
        return None
    import numpy as np

    from lesion.tiles import colour, decode
    train = [row for row in rows if row["split"] == "train"]
    if not train:
        raise ValueError("--color-norm skin-locus learns its line from training tiles, and there are none")
    order = np.random.default_rng([args.seed, 3]).permutation(len(train))[:REFERENCE_TILES]
    return colour.skin_reference([decode.fill_borders(decode.decode((staging / train[i]["file_name"]).read_bytes()))
                                  for i in sorted(order)])


def _recorded(out: Path) -> dict:
    path = out / "dataset.json"
    return files.read_json(path) if path.is_file() else {}


def _damaged(out: Path) -> str | None:
    """The first tile of a finished set that is gone or changed; the manifest itself where that cannot be read."""
    try:
        rows = files.read_manifest(out)
    except ValueError:
        return files.MANIFEST
    for row in rows:
        path = out / row["file_name"]
        if not path.is_file() or files.sha256_file(path) != row.get("sha256"):
            return row["file_name"]
    return None


def _place(out: Path) -> Path:
    """The folder that --out stands for: a link's target is replaced, not the link."""
    place = out.resolve()
    return out if out.name == place.name and not out.is_symlink() else place


def _check_replaceable(out: Path) -> None:
    """ValueError for a folder that no other can be renamed over."""
    inner = f"give another folder, such as --out {out / 'isic2024'}"
    if Path.cwd().is_relative_to(out.resolve()):
        raise ValueError(f"--out {out} is the current folder or holds it, and would be taken away: {inner}")
    if os.path.ismount(out):
        raise ValueError(f"--out {out} is where a file system is mounted, and cannot be replaced: {inner}")


def _check_out(out: Path, overwrite: bool) -> None:
    old = out.parent / f".{out.name}.old"
    if old.is_symlink():
        old.unlink()  # left where --out was a link
    if old.exists() and not out.exists():
        os.replace(old, out)  # an --overwrite was killed between its two renames
    shutil.rmtree(old, ignore_errors=True)  # or after them
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: give a folder")
    if overwrite and out.exists() and (others := sorted(p.name for p in out.iterdir() if p.name not in OWN_FILES)):
        raise ValueError(f"--out {out} holds what prepare did not write ({', '.join(others[:3])}): move it away first")


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


def _report(out: Path, record: dict) -> None:
    counts = record["counts"]
    total = sum(count["benign"] + count["malignant"] for count in counts.values())
    print(f"\n{out}: {total} tiles, {cli.one_line(', '.join(record['license']))}, colour normalisation {record['color_norm']}\n\n"
          f"{'':16}{'benign':>9}{'malignant':>11}{'patients':>10}")
    for part, count in counts.items():
        print(f"{part:16}{count['benign']:9}{count['malignant']:11}{count['patients'] or 'unknown':>10}")
    if record["overlap"]:
        print(f"\n{'in both':16}{'patients':>9}{'lesions':>11}{'same file':>10}{'near copies':>12}")
    for pair, both in record["overlap"].items():
        cells = ["unknown" if both[name] is None else both[name] for name in ("patients", "lesions", "exact", "near")]
        print(f"{pair:16}{cells[0]:>9}{cells[1]:>11}{cells[2]:>10}{cells[3]:>12}")
        for a, b, likeness in both["pairs"][:3]:
            print(f"{'':16}{cli.one_line(f'{a} and {b}')}, likeness {likeness}")
    for name, what in (("unreadable", "unreadable and left out"), ("not_square", "not square: their centre is used")):
        if record[name]:
            print(f"\n{len(record[name])} tiles are {what}: {cli.one_line('; '.join(record[name][:3]))}")
    print(f"\nnext: python -m lesion label {out}\n      python train_lora.py --phase 1 --data {out}")
