"""What the names of files say, in a folder and in a zip alike: which are tiles, their ids, classes, splits and
captions.

Proven by tests/tiles/test_names.py.
"""
import os
import posixpath
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from lesion.run.files import check_text
from lesion.tiles.source import SUFFIXES, tile_id
from lesion.tiles.tables import SPLITS

CLASS = re.compile(r"^(?:\d+[_ -])?(malign|benign)(?:ant)?(?![a-z])", re.IGNORECASE)  # kohya: "10_malignant x"
ISIC = re.compile(r"^ISIC_\d+", re.IGNORECASE)
CAPTIONS = (".txt", ".caption")
CAPTION_BYTES = 1 << 16
ABOUT = re.compile(r"readme|licen[sc]e|attribution|credits|citation|changelog|requirements|notes|classes|labels",
                   re.IGNORECASE)
TABLES = {".csv", ".tsv", ".json", ".jsonl"}
CONVERT = {".tif", ".tiff", ".gif", ".heic", ".heif", ".avif", ".jp2", ".dcm", ".psd", ".raw", ".npy", ".ppm"}


@dataclass
class Names:
    """`where`: isic_id -> file name; labels and splits by folder names, captions from files beside the tiles
    (`given`)."""
    where: dict[str, str] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    given: dict[str, dict] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    skipped: Counter = field(default_factory=Counter)
    unlabelled: Counter = field(default_factory=Counter)


def is_hidden(name: str) -> bool:
    """Whether a path is a system's own: ._ twins and __MACOSX of macOS, other dot files, Windows' thumbnails."""
    return "/." in name or name.startswith(".") or "__MACOSX/" in name or \
        name.lower().endswith(("thumbs.db", "desktop.ini"))


def arrange(names: Iterable[str], read: Callable[[str], bytes], label_map: dict[str, str] | None = None,
            same: Callable[[str, str], bool] = lambda a, b: False) -> Names:
    """Sort the files `names` (paths with forward slashes, in their order) into tiles, captions and the rest.

    An id is a file's name without its ending. Where class folders number their files each from 1, ids are made of
    folder and name. `read`: name -> bytes, for captions. `label_map`: a folder's name in small letters -> benign,
    malignant or skip. `same`: whether two files of one id hold the same bytes; the first is taken then.

    ValueError for one id twice, an id that is no name, a caption that is not UTF-8 or belongs to no tile.
    """
    found, tiles, captions = Names(), [], defaultdict(list)
    for name in names:
        stem, ending = os.path.splitext(name)
        ending = ending.lower()
        if is_hidden(name):
            found.skipped["files of the system (._*, __MACOSX, .DS_Store ...)"] += 1
        elif ending in SUFFIXES:
            tiles.append(name)
        elif ending in CAPTIONS:
            captions[stem].append(name)
        elif ending in CONVERT:
            found.skipped[f"{ending} (not read: save them as JPEG or PNG)"] += 1
        elif ending not in TABLES:
            found.skipped[f"{ending or 'files without an ending'}"] += 1
    classes = {folder: _class_of(folder, label_map or {}) for folder in {name.rpartition("/")[0] for name in tiles}}
    used = set()
    for isic_id, name in _identified(tiles, classes, found, same):
        folder = name.rpartition("/")[0]
        label = classes[folder]
        if label == "skip":
            found.skipped["tiles in folders mapped to skip"] += 1
            used.update(_beside(name, captions))
            continue
        found.where[isic_id] = name
        extra = {}
        if label:
            found.labels[isic_id] = label
            split = next((SPLITS[part.lower()] for part in folder.split("/") if part.lower() in SPLITS), None)
            extra = {"split": split} if split else {}
        elif folder:
            found.unlabelled[folder.rpartition("/")[2]] += 1
        if captions and (beside := _beside(name, captions)):
            texts = sorted({text for caption in beside if (text := _caption(caption, read))})
            if len(texts) > 1:
                raise ValueError(f"{name} has {len(texts)} different captions ({', '.join(beside)}): keep one")
            if texts:
                extra["text"] = texts[0]
            used.update(beside)
        if extra:
            found.given[isic_id] = extra
    _all_used(captions, used, tiles, found)
    return found


def _beside(name, captions):
    """Caption files of a tile: a.txt or a.jpg.txt beside a.jpg."""
    return [*captions.get(os.path.splitext(name)[0], ()), *captions.get(name, ())]


def _caption(name, read):
    data = read(name)
    if len(data) > CAPTION_BYTES:
        raise ValueError(f"{name}: a caption of {len(data):,} bytes is no caption (at most {CAPTION_BYTES:,})")
    try:
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text ({error.reason} at byte {error.start}): save the caption as "
                         f"UTF-8") from None
    if "\0" in text:
        raise ValueError(f"{name} holds zero bytes: save the caption as UTF-8")
    return check_text(text.strip(), name)


def _all_used(captions, used, tiles, found):
    """Count texts about the set, and refuse captions of no tile."""
    folders = {name.rpartition("/")[0] for name in tiles}
    lost = []
    for name in sorted(name for names in captions.values() for name in names if name not in used):
        folder, _, base = name.rpartition("/")
        apart = folder not in folders and not re.search("caption|prompt|text", folder, re.IGNORECASE)
        if apart or ABOUT.search(base):
            found.skipped[os.path.splitext(base)[1].lower() + " about the set"] += 1
        else:
            lost.append(name)
    if lost and not used and len(lost) <= max(2, len(tiles) // 10):  # lists such as train.txt, no captions anywhere
        found.skipped[".txt about the set"] += len(lost)
    elif lost:
        raise ValueError(f"{len(lost)} captions belong to no tile (first: {lost[0]}): a caption lies beside its tile "
                         f"and has its name, "
                         "a.txt for a.jpg; move or remove them")


def _class_of(folder, label_map):
    """The class that a folder's path says, the innermost name that says one; None if none does."""
    for part in reversed(folder.split("/")):
        word = re.sub(r"^\d+_", "", part.lower())
        for known in (part.lower(), word, word.split(" ")[0]):
            if known in label_map:
                return label_map[known]
        if (match := CLASS.match(part)) and not ("benign" in part.lower() and "malign" in part.lower()):
            return "benign" if match[1].lower() == "benign" else "malignant"
    return None


def _identified(tiles, classes, found, same):
    """(id, name) of each tile, once an id."""
    stems, first, repeated = {}, {}, []
    for name in tiles:
        stems[name] = os.path.splitext(name.rpartition("/")[2])[0]
        if (other := first.setdefault(stems[name], name)) != name and not same(other, name):
            repeated.append((other, name))
    for a, b in repeated:
        if ISIC.match(stems[a]) or not (classes[a.rpartition("/")[0]] and classes[b.rpartition("/")[0]]):
            raise ValueError(f"{stems[a]} is there twice: {a} and {b}")
    if repeated:
        top = posixpath.commonpath([name.rpartition("/")[0] for name in tiles])
        stems = {name: "_".join(PurePosixPath(os.path.splitext(name)[0]).relative_to(top).parts) for name in tiles}
        found.notes.append(f"file names repeat between folders: an id is folder and name (such as "
                           f"{min(stems.values())})")
    taken = {}
    for name in tiles:
        isic_id = tile_id(stems[name], name)
        other = taken.setdefault(isic_id, name)
        if other == name:
            yield isic_id, name
        elif not same(other, name):
            raise ValueError(f"{isic_id} is there twice: {other} and {name}")
