"""Hostile content as hypothesis strategies: from a valid file, its structure kept in part and spoilt in part; and any bytes.

JSON, JSON lines, tables, YAML, zip, HDF5, pictures and safetensors, each with what its format allows and no honest writer
writes: wrong types, numbers beyond every limit, nesting, half characters, control characters, names that are paths, keys
twice, sizes that lie. tests/fuzz/boundaries.py says which reader gets which.
"""

import copy
import io
import json
import struct
import zipfile
import zlib

import numpy as np
from hypothesis import strategies as st
from PIL import Image


class Raw(str):
    """JSON text that no Python value becomes: `dumps` takes it as it stands."""


class Twin(str):
    """A key that a dict holds beside its equal: JSON allows a key twice."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__


PATHS = [
    "../beside/x",
    "../../beside/x",
    "../../../beside/x.jpg",
    "/lesion-fuzz/x",
    "..\\beside\\x",
    "C:\\x",
    "C:x",
    "a/../../x",
    "..",
    ".",
    "",
    " ",
    "/",
    "a/",
    "~/x",
    "a\0b",
    "x\ny",
    "-x",
    "con",
    ".hidden",
    "a" * 300,
    "e\u0301",
    "\u202egpj.x",
    "\U0001f642" * 70,
]
TEXTS = [
    *PATHS,
    "\ud800",
    "x\udcff",
    "\x00",
    "\x1b]0;x\x07\x1b[2J",
    "a\r\nb",
    "\u2028",
    "NaN",
    "nan",
    "inf",
    "1e999",
    "0x10",
    "1_0",
    "\u0663",
    "=1+1",
    "none",
    "{}",
    "[1]",
    "'",
    '"',
    "x" * 200_000,
]
NUMBERS = [
    0,
    -1,
    1,
    2,
    3,
    7,
    77,
    1.5,
    -0.0,
    5e-324,
    1e308,
    float("nan"),
    float("inf"),
    -float("inf"),
    2**31,
    2**63,
    -(2**63),
    10**18,
    10**400,
    -(10**400),
    Raw("1" * 5000),
    Raw("1e999"),
    True,
    False,
    None,
]
DEEP = [
    Raw(left * depth + "1" + right * depth)
    for depth in (30, 300, 800, 950, 1000, 3000, 100_000)
    for left, right in (("[", "]"), ('{"a":', "}"))
]
BOXES = [[], {}, [[]], [None], [1, 2], ["x"], {"": None}, {"a": 1}, [{}], [0.5] * 4, {"x": ["y"]}, *DEEP]
WORDS = [
    b"\0",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b'"',
    b"'",
    b",;\t|",
    b"nan",
    b"NaN",
    b"1e999",
    b"9" * 5000,
    b"[" * 2000,
    b'{"a":' * 2000,
    b"\r",
    b"\n",
    b"\n\n",
    b"../",
    b"{}",
    b"null",
    b"\\ud800",
    b"\\u0000",
    b"\x1b[2J",
    b"-",
    b"\xed\xa0\x80",
    b"=",
    b" ",
]

numbers, texts, boxes = map(st.sampled_from, (NUMBERS, TEXTS, BOXES))
values = st.one_of(numbers, texts, boxes, st.integers(-2, 10), st.floats(), st.text(max_size=8))


# --- bytes -----------------------------------------------------------------------------------------------------------


@st.composite
def damaged(draw, data):
    """`data`, bytes or a strategy of bytes, with one to five places changed, cut out, repeated, filled with a word or cut off."""
    found = bytearray(draw(data) if isinstance(data, st.SearchStrategy) else data)
    for _ in range(draw(st.integers(1, 5))):
        place = draw(st.integers(0, len(found)))
        what = draw(st.sampled_from(("change", "flip", "cut", "word", "repeat", "end")))
        if what == "change":
            found[place : place + 1] = draw(st.binary(max_size=4))
        elif what == "flip" and place < len(found):
            found[place] ^= 1 << draw(st.integers(0, 7))
        elif what == "cut":
            del found[place : place + draw(st.integers(1, 60))]
        elif what == "word":
            found[place:place] = draw(st.sampled_from(WORDS))
        elif what == "repeat":
            found[place:place] = found[place : place + draw(st.integers(1, 400))] * draw(st.sampled_from((1, 2, 50)))
        elif draw(st.integers(0, 3)) == 0:
            del found[place:]
    return bytes(found)


def spoilt(structured, plain):
    """Mostly `structured` (a strategy), at times damaged too; at times `plain` (valid bytes) damaged, or any bytes."""
    return st.one_of(structured, structured, structured, damaged(structured), damaged(plain), st.binary(max_size=300))


# --- JSON ------------------------------------------------------------------------------------------------------------


def dumps(value) -> str:
    """JSON text of a value with `Raw` and `Twin` in it; half characters as escapes, numbers as Python's json writes them."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(key))}: {dumps(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(dumps, value)) + "]"
    return json.dumps(value)


def places(value):
    """(container, key) of everything inside."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        yield value, key
        if isinstance(item, dict | list):
            yield from places(item)


@st.composite
def edited(draw, value):
    """`value`, as JSON has it, with one to three places given another value, taken out, renamed, doubled or wrapped."""
    box = [copy.deepcopy(value)]
    for _ in range(draw(st.integers(1, 3))):
        inside = list(places(box))
        into, key = inside[draw(st.integers(0, len(inside) - 1))]
        what = draw(st.sampled_from(("put", "put", "put", "put", "take", "rename", "twice", "wrap", "move")))
        if what == "put":
            into[key] = copy.deepcopy(draw(values))
        elif what == "take" and into is not box:
            del into[key]
        elif what == "rename" and isinstance(into, dict):
            into[draw(texts)] = into.pop(key)
        elif what == "twice" and isinstance(into, dict):
            into[Twin(key)] = copy.deepcopy(draw(values))
        elif what == "twice" and into is not box:
            into.append(copy.deepcopy(into[key]))
        elif what == "wrap":
            into[key] = [into[key]]
        elif what == "move":
            other, name = inside[draw(st.integers(0, len(inside) - 1))]
            into[key] = copy.deepcopy(other[name])
    return box[0]


def as_json(value):
    """An edited JSON document as bytes, in UTF-8 or, at times, another coding."""
    coded = st.builds(
        lambda found, coding: dumps(found).encode(coding, "replace"),
        edited(value),
        st.sampled_from(["utf-8"] * 8 + ["utf-16", "utf-8-sig", "utf-32"]),
    )
    return spoilt(coded, json.dumps(value).encode())


def as_lines(rows):
    """Edited JSON lines; a row that is no object, and a list of all rows, among them."""

    def lines(found):
        return "".join(dumps(row) + "\n" for row in found) if isinstance(found, list) else dumps(found)

    return spoilt(edited(rows).map(lambda found: lines(found).encode()), lines(rows).encode())


# --- text ------------------------------------------------------------------------------------------------------------


@st.composite
def edited_table(draw, rows):
    """A table, a list of rows of cells the first of which is the header, with cells, rows and columns changed, as csv in some
    coding with some sign between the cells."""
    rows = [list(map(str, row)) for row in rows]
    for _ in range(draw(st.integers(0, 4))):
        row = rows[draw(st.integers(0, len(rows) - 1))]
        place = draw(st.integers(0, max(0, len(row) - 1)))
        what = draw(st.sampled_from(("put", "put", "put", "short", "long", "twice", "turn")))
        if what == "put" and row:
            row[place] = draw(
                st.one_of(texts, st.text(max_size=8), numbers.map(str), st.sampled_from(sum(rows[:1], []) or ["x"]))
            )
        elif what == "short":
            del row[place:]
        elif what == "long":
            row.append(draw(texts))
        elif what == "twice":
            rows.append(list(row))
        elif what == "turn":
            rows = [list(reversed(one)) for one in rows]
    sign, end = draw(st.sampled_from(",,,,;\t|")), draw(st.sampled_from(("\n", "\n", "\r\n", "\r", "")))
    quote = draw(st.booleans())
    cells = [['"' + cell.replace('"', '""') + '"' if quote else cell for cell in row] for row in rows]
    text = "".join(sign.join(row) + end for row in cells)
    return text.encode(draw(st.sampled_from(["utf-8"] * 5 + ["utf-8-sig", "utf-16", "utf-16-le", "cp1252"])), "replace")


def as_table(rows):
    """An edited csv table as bytes."""
    return spoilt(edited_table(rows), "".join(",".join(map(str, row)) + "\n" for row in rows).encode())


YAML = [
    "!!timestamp x",
    "!!bool maybe",
    "!!int ''",
    "!!float ''",
    "!!int 0x",
    "!!binary é",
    "!!set {a, b}",
    "!!python/object/apply:os.abort []",
    "2001-99-99",
    "2001-01-01T00:00:00+99:99",
    "1:1:1.5" + ":1" * 300,
    "9" * 5000,
    "1:" + "59:" * 300 + "59.5",
    ".nan",
    "-.inf",
    "~",
    "=",
    "<<",
    "&a [*a]",
    "*b",
    "[" * 900,
    "[" * 3000,
    "{a: " * 900,
    "- " * 900,
    "? [a]\n: b",
    "{[a]: b}",
    "{<<: 3}",
    "{<<: [1]}",
    "|\n x",
    "'",
    '"',
    "%YAML 9.9",
    "--- a\n--- b",
    "\0",
    "\x1b",
    "!<tag:x>",
    "!x y",
    "@",
    "`",
    "a: b: c",
    "\ud800",
]
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi")
)


@st.composite
def edited_yaml(draw, text):
    """YAML with values changed for what its resolver and constructors know, lines moved, and aliases."""
    lines = text.split("\n")
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(lines) - 1))
        what = draw(st.sampled_from(("value", "value", "key", "line", "take", "indent", "bomb")))
        key, colon, _ = lines[place].partition(":")
        if what == "value" and colon:
            lines[place] = f"{key}: {draw(st.one_of(st.sampled_from(YAML), texts, numbers.map(str), boxes.map(dumps)))}"
        elif what == "key":
            lines[place] = f"{draw(st.sampled_from(YAML))}: 1"
        elif what == "line":
            lines.insert(place, draw(st.sampled_from(YAML)))
        elif what == "take" and len(lines) > 1:
            del lines[place]
        elif what == "indent":
            lines[place] = " " * draw(st.integers(0, 9)) + lines[place].lstrip()
        elif what == "bomb":
            lines.append(BOMB)
    return "\n".join(lines).encode("utf-8", "replace")


def as_yaml(text):
    """Edited YAML as bytes."""
    return spoilt(edited_yaml(text), text.encode())


# --- zip -------------------------------------------------------------------------------------------------------------

FIELDS = {
    b"PK\1\2": ((8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (30, 2), (32, 2), (34, 2), (42, 4)),
    b"PK\3\4": ((6, 2), (8, 2), (14, 4), (18, 4), (22, 4), (26, 2), (28, 2)),
    b"PK\5\6": ((4, 2), (8, 2), (10, 2), (12, 4), (16, 4), (20, 2)),
}
LIES = [0, 1, 9, 10, 12, 14, 93, 95, 99, 255, 2048, 0x7FFF, 0xFFFF, 65 << 20, 0x7FFFFFFF, 0xFFFFFFFE, 0xFFFFFFFF]


@st.composite
def edited_zip(draw, members):
    """A zip of `members` {name: bytes} with names that are paths, members twice, and headers that lie about sizes, offsets,
    methods and counts."""
    stream = io.BytesIO()
    items = list(members.items())
    for _ in range(draw(st.integers(0, 2))):
        place = draw(st.integers(0, len(items) - 1))
        name, data = items[place]
        other = draw(st.one_of(texts, st.sampled_from(list(members)))).encode("utf-8", "replace").decode()
        items[place] = draw(
            st.sampled_from(
                (
                    (other[:60_000], data),
                    (name.rpartition("/")[0] + "/" + other[:60_000] + ".jpg", data),
                    (name, draw(st.binary(max_size=40))),
                    (name, items[-1][1]),
                )
            )
        )
    with zipfile.ZipFile(stream, "w", draw(st.sampled_from((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)))) as archive:
        for name, data in items:
            info = zipfile.ZipInfo("x")
            info.filename, info.compress_type = name, archive.compression
            archive.writestr(info, data)
    found = bytearray(stream.getvalue())
    for _ in range(draw(st.integers(0, 3))):
        mark = draw(st.sampled_from(list(FIELDS)))
        starts = [place for place in range(len(found)) if found.startswith(mark, place)]
        at, size = draw(st.sampled_from(FIELDS[mark]))
        if starts:
            start = draw(st.sampled_from(starts)) + at
            found[start : start + size] = struct.pack("<I", draw(st.sampled_from(LIES)))[:size]
    return bytes(found)


# --- HDF5 ------------------------------------------------------------------------------------------------------------


def _h5(file, name, kind, tile):
    import h5py

    if kind == "external link":
        file[name] = h5py.ExternalLink("../beside/secret.h5", "x")
    elif kind == "soft link":
        file[name] = h5py.SoftLink("/" + name)
    elif kind == "hard link":
        file[name] = file["/"]
    elif kind == "external":
        file.create_dataset(name, (9,), np.uint8, external=[("../beside/secret", 0, 9)])
    elif kind == "virtual":
        layout = h5py.VirtualLayout((9,), np.uint8)
        layout[:] = h5py.VirtualSource("../beside/secret.h5", "x", (9,))
        file.create_virtual_dataset(name, layout)
    elif kind == "group":
        file.create_group(name)
    elif kind == "huge":
        file.create_dataset(name, (1 << 40,), np.uint8, chunks=(1 << 20,), compression="gzip")
    elif kind == "large":
        file.create_dataset(name, (60 << 20,), np.uint8, chunks=(1 << 20,), compression="gzip")
    elif kind == "packed":
        file.create_dataset(
            name, data=np.frombuffer(tile, np.uint8), chunks=(64,), compression="gzip", shuffle=True, fletcher32=True
        )
    elif kind == "type":
        file[name] = np.dtype("f8")
    elif kind == "null":
        file[name] = h5py.Empty("S10")
    elif kind == "bytes vlen":
        file.create_dataset(name, data=tile.replace(b"\0", b"0"), dtype=h5py.string_dtype("ascii"))
    elif kind == "numbers vlen":
        data = file.create_dataset(name, (2,), dtype=h5py.vlen_dtype(np.uint8))
        data[0] = np.frombuffer(tile[:9], np.uint8)
    elif kind == "reference":
        file.create_dataset(name, data=file.ref, dtype=h5py.ref_dtype)
    elif kind == "void list":
        file[name] = np.array([np.void(tile), np.void(tile[::-1])])
    else:
        file[name] = {
            "void": np.void(tile),
            "uint8": np.frombuffer(tile, np.uint8),
            "int8": np.zeros(9, np.int8),
            "float": 5.0,
            "bool": True,
            "complex": 1j,
            "2-d": np.zeros((4, 4), np.uint8),
            "empty": np.zeros(0, np.uint8),
            "text": "x",
            "S": np.bytes_(tile[:99]),
            "compound": np.zeros(3, [("a", "f8"), ("b", "S4")]),
            "array": np.zeros(2, [("a", "u1", (3,))]),
        }[kind]


H5_KINDS = [
    "void",
    "void",
    "uint8",
    "packed",
    "external link",
    "soft link",
    "hard link",
    "external",
    "virtual",
    "group",
    "huge",
    "large",
    "type",
    "null",
    "bytes vlen",
    "numbers vlen",
    "reference",
    "void list",
    "int8",
    "float",
    "bool",
    "complex",
    "2-d",
    "empty",
    "text",
    "S",
    "compound",
    "array",
]


@st.composite
def edited_hdf5(draw, tiles):
    """A file of `tiles` {id: bytes} in which some are datasets of odd types, links, groups, or stored elsewhere; odd names."""
    import h5py

    with h5py.File(
        "fuzz.h5", "w", driver="core", backing_store=False, libver=draw(st.sampled_from(("earliest", "latest")))
    ) as file:
        for name, data in tiles.items():
            name = (
                draw(st.one_of(st.just(name), st.just(name), texts))
                .encode("utf-8", "replace")
                .decode()[:200]
                .replace("\0", "0")
                .strip("/")
            )
            kind = draw(st.sampled_from(H5_KINDS))
            if name.strip("/. ") and name not in file:
                _h5(file, name, kind, data)
        file.flush()
        return file.id.get_file_image()


# --- pictures --------------------------------------------------------------------------------------------------------

SIDES = [0, 1, 2, 16, 24, 255, 7000, 7072, 13_300, 16_383, 65_500, 65_535, 2**24, 2**31 - 1, 2**31, 2**32 - 1]


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


PNG_MORE = [
    (b"tEXt", b"a\0" + b"b" * 99),
    (b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 22))),
    (b"iCCP", b"a\0\0" + zlib.compress(bytes(1 << 22))),
    (b"iTXt", b"a\0\1\0\0\0" + zlib.compress(b"x")),
    (b"eXIf", b"MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6"),
    (b"eXIf", b""),
    (b"tRNS", b"\0"),
    (b"tRNS", b""),
    (b"PLTE", b"\0" * 3),
    (b"PLTE", b"\0" * 769),
    (b"acTL", struct.pack(">II", 2, 0)),
    (b"acTL", b""),
    (b"fcTL", bytes(26)),
    (b"fdAT", bytes(8)),
    (b"gAMA", b"\0"),
    (b"pHYs", b"\0"),
    (b"cHRM", b""),
    (b"sRGB", b""),
    (b"IDAT", b""),
    (b"IEND", b""),
    (b"IHDR", b""),
    (b"xxxx", b""),
]


@st.composite
def edited_png(draw, data):
    """A PNG with chunks added, doubled, taken out, and a header that lies, all under right checksums."""
    chunks, place = [], 8
    while place < len(data):
        size = int.from_bytes(data[place : place + 4], "big")
        chunks.append((data[place + 4 : place + 8], data[place + 8 : place + 8 + size]))
        place += 12 + size
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(chunks) - 1)) if chunks else 0
        what = draw(st.sampled_from(("header", "header", "more", "take", "twice", "pixels")))
        if what == "header" and chunks and chunks[0][0] == b"IHDR" and len(chunks[0][1]) == 13:
            head = bytearray(chunks[0][1])
            if draw(st.booleans()):
                start = draw(st.sampled_from((0, 4)))
                head[start : start + 4] = struct.pack(">I", draw(st.sampled_from(SIDES)))
            else:
                head[draw(st.integers(8, 12))] = draw(st.sampled_from((0, 1, 2, 3, 4, 6, 8, 16, 255)))
            chunks[0] = b"IHDR", bytes(head)
        elif what == "more":
            chunks.insert(place, draw(st.sampled_from(PNG_MORE)))
        elif what == "take" and chunks:
            del chunks[place]
        elif what == "twice" and chunks:
            chunks.insert(place, chunks[place])
        elif what == "pixels":
            chunks = [
                (kind, zlib.compress(bytes(draw(st.sampled_from((0, 9, 5000, 1 << 20))))) if kind == b"IDAT" else item)
                for kind, item in chunks
            ]
    return data[:8] + b"".join(chunk(*one) for one in chunks)


def segments(data):
    """A JPEG's parts: each begins with a marker and goes to the next; what is coded stays with its scan's header."""
    cuts = [
        place
        for place in range(len(data) - 1)
        if data[place] == 0xFF and data[place + 1] not in (0, 0xFF, *range(0xD0, 0xD8))
    ]
    return [data[a:b] for a, b in zip(cuts, [*cuts[1:], len(data)])]


@st.composite
def edited_jpeg(draw, data):
    """A JPEG with segments doubled (scans many times over), moved, taken out, and frame headers that lie."""
    parts = segments(data)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(parts) - 1)) if parts else 0
        what = draw(st.sampled_from(("frame", "frame", "many", "take", "twice", "length", "exif")))
        if what == "frame":
            for number, part in enumerate(parts):
                if part[:1] == b"\xff" and part[1:2] in (b"\xc0", b"\xc1", b"\xc2") and len(part) > 12:
                    found = bytearray(part)
                    start = draw(st.sampled_from((5, 7)))
                    found[start : start + 2] = struct.pack(">H", draw(st.sampled_from(SIDES)) & 0xFFFF)
                    found[draw(st.integers(9, len(found) - 1))] = draw(st.sampled_from((0, 1, 0x11, 0x22, 0x44, 0xFF)))
                    parts[number] = bytes(found)
        elif what == "many" and parts:
            parts[place:place] = [parts[place]] * draw(st.sampled_from((2, 20, 500)))
        elif what == "take" and parts:
            del parts[place]
        elif what == "twice" and parts:
            parts.insert(draw(st.integers(0, len(parts))), parts[place])
        elif what == "length" and parts and len(parts[place]) > 4:
            parts[place] = (
                parts[place][:2] + struct.pack(">H", draw(st.sampled_from(SIDES)) & 0xFFFF) + parts[place][4:]
            )
        elif what == "exif":
            body = b"Exif\0\0" + draw(st.sampled_from((b"MM\0*", b"II*\0", b""))) + draw(st.binary(max_size=60))
            parts[1:1] = [b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body]
    return b"".join(parts)


@st.composite
def edited_words(draw, data, starts, order):
    """Whole numbers of a binary header, at `starts` of `data`, that lie."""
    found = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.sampled_from(starts))
        found[start : start + 4] = struct.pack(order + "I", draw(st.sampled_from(SIDES)))
    return bytes(found)


def picture(kind, mode="RGB", **how):
    stream = io.BytesIO()
    pixels = np.random.default_rng(3).integers(0, 256, (24, 24, 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(stream, kind, **how)
    return stream.getvalue()


def pictures():
    """Pictures of the four kinds that are read, spoilt."""
    found = []
    for data in (picture("PNG"), picture("PNG", "P"), picture("PNG", "LA"), picture("PNG", "1")):
        found.append(spoilt(edited_png(data), data))
    for data in (
        picture("JPEG"),
        picture("JPEG", progressive=True),
        picture("JPEG", "CMYK"),
        picture("JPEG", "L", exif=Image.Exif()),
    ):
        found.append(spoilt(edited_jpeg(data), data))
    lossy, exact = picture("WEBP"), picture("WEBP", lossless=True, exif=b"Exif\0\0MM\0*")
    found += [spoilt(edited_words(data, list(range(4, 40)), "<"), data) for data in (lossy, exact)]
    bitmap = picture("BMP")
    found.append(spoilt(edited_words(bitmap, [2, 10, 14, 18, 22, 26, 28, 30, 34, 38, 46, 50], "<"), bitmap))
    return st.one_of(found)


# --- safetensors -----------------------------------------------------------------------------------------------------

BITS = {
    "F64": 64,
    "F32": 32,
    "F16": 16,
    "BF16": 16,
    "I64": 64,
    "I32": 32,
    "I16": 16,
    "I8": 8,
    "U8": 8,
    "U16": 16,
    "U32": 32,
    "U64": 64,
    "BOOL": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "C64": 64,
    "X9": 8,
}
MOST = 2 << 20  # bytes of one tensor


def packed(header, body):
    """A safetensors file of a header (JSON text) and the tensors' bytes."""
    text = header.encode("utf-8", "replace")
    return struct.pack("<Q", len(text)) + text + body


def tensors_file(tensors, metadata=None, fill=b"\0"):
    """A consistent file of {name: (dtype, shape)}, whatever the types and shapes; `fill` is every byte of it."""
    header, at = {} if metadata is None else {"__metadata__": metadata}, 0
    for name, (kind, shape) in tensors.items():
        size = (int(np.prod(shape, dtype=object)) * BITS[kind] + 7) // 8
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [at, at + min(size, MOST)]}
        at += min(size, MOST)
    return packed(dumps(header), fill * at)


@st.composite
def edited_tensors(draw, tensors, metadata):
    """A consistent file in which tensors have other types, axes, lengths and names, with edited metadata."""
    found = {name: list(one) for name, one in tensors.items()}
    for _ in range(draw(st.integers(0, 3))):
        name = draw(st.sampled_from(sorted(found)))
        kind, shape = found[name]
        what = draw(st.sampled_from(("type", "length", "length", "axes", "take", "rename")))
        if what == "type":
            found[name][0] = draw(st.sampled_from(sorted(BITS)))
        elif what == "length" and shape:
            place, shape = draw(st.integers(0, len(shape) - 1)), list(shape)
            shape[place] = draw(st.sampled_from((0, 1, 2, 3, 4, 48, 96, 128, 1000, 50_000)))
            found[name][1] = shape
        elif what == "axes":
            found[name][1] = draw(
                st.sampled_from(
                    ([], [1], [*shape, 1], [1, *shape], list(reversed(shape)), [0], [2, 2, 1, 1], [300, 300])
                )
            )
        elif what == "take" and len(found) > 1:
            del found[name]
        elif what == "rename":
            stem, _, role = name.rpartition(".")
            found[
                draw(
                    st.sampled_from(
                        (
                            f"{stem}.{role}x",
                            f"{stem}.dora_scale",
                            f"{stem}.alpha",
                            f"x.{role}",
                            "text_projection.x",
                            f"{stem}.diff",
                            "\x1b[2J\n",
                            "",
                            "__metadata__ ",
                        )
                    )
                )
            ] = found.pop(name)
    said = draw(st.one_of(st.none(), st.just(metadata), edited(metadata)))
    if draw(st.integers(0, 3)) and isinstance(said, dict):
        said = {
            key: item if isinstance(item, str) and not isinstance(item, Raw) else dumps(item)[:5000]
            for key, item in said.items()
        }
    return tensors_file(found, said, draw(st.sampled_from((b"\0", b"\0", b"\x3c", b"\x7f", b"\xff", b"\1"))))


@st.composite
def edited_header(draw, data):
    """A safetensors file with an edited header: shapes, offsets and types that do not fit, and a length that lies."""
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    found = packed(dumps(draw(edited(header))), body)
    if draw(st.integers(0, 5)) == 0:
        found = (
            struct.pack("<Q", draw(st.sampled_from((0, 1, 8, size - 1, size + 1, 10**8, 2**31, 2**63, 2**64 - 1))))
            + found[8:]
        )
    return found


def as_safetensors(data, *more):
    """Spoilt safetensors files made of the valid `data`, and of the strategies `more`."""
    return st.one_of(spoilt(edited_header(data), data), *more)
