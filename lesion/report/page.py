"""A report from blocks: one self-contained report.html, the same as report.md, the numbers as results.json.

A block is a dict from one of the functions below; the sections (front.py, classification.py, pictures.py, readers.py)
make lists of them. Nothing is fetched when the page is read: pictures are embedded, there are no scripts.
Proven by tests/report/test_page.py and, in a browser, tests/browser/test_report_browser.py.
"""
import base64
import io
import json
from pathlib import Path

import numpy as np
from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from PIL import Image

from lesion.run import files

TEMPLATES = Environment(loader=PackageLoader("lesion.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True)


# ---------------------------------------------------------------------------------------------- blocks

def heading(text: str, level: int = 2) -> dict:
    """A heading of level 2 (a section) or 3."""
    return {"kind": "heading", "text": text, "level": level}


def paragraph(text: str, lead: bool = False) -> dict:
    """A paragraph of plain text; `lead` sets the finding off."""
    return {"kind": "paragraph", "text": text, "lead": lead}


def bullets(items: list[str]) -> dict:
    """A list of short texts."""
    return {"kind": "bullets", "items": list(items)}


def facts(rows: list[tuple[str, str]]) -> dict:
    """Names and what they stand for, as a list of terms."""
    return {"kind": "facts", "rows": list(rows)}


def table(caption: str, header: list[str], rows: list[list[str]], text: tuple[int, ...] = ()) -> dict:
    """A table of strings; the columns numbered in `text`, and the first, are words and set left, the others right."""
    assert all(len(row) == len(header) for row in rows), caption
    return {"kind": "table", "caption": caption, "header": header, "rows": rows, "text": {0, *text}}


def figure(stem: str, caption: str, alt: str) -> dict:
    """The chart figures/`stem`.svg and .png of the report's folder; `alt` says in words what it shows. Where there is a
    figures/narrow/`stem`.svg, narrow screens show that."""
    return {"kind": "figure", "stem": stem, "caption": caption, "alt": alt}


def tiles(stem: str, caption: str, alt: str, rows: list[tuple[str, list[dict]]]) -> dict:
    """Tiles that flow with the width of the page; Markdown has figures/`stem`.png in their place.

    rows: (title, cells), a cell {"images": uint8 [R,R,3] each, "caption": str, "marked": bool (framed)}.
    """
    return {"kind": "tiles", "stem": stem, "caption": caption, "alt": alt, "rows": rows}


def animation(stem: str, still: str, caption: str, alt: str) -> dict:
    """figures/`stem`.gif; figures/`still`.png in its place on paper and for readers who asked for less motion."""
    return {"kind": "animation", "stem": stem, "still": still, "caption": caption, "alt": alt}


def contents() -> dict:
    """Links to the headings of the report; for the first page."""
    return {"kind": "contents"}


def beside(*blocks: dict) -> dict:
    """Two blocks side by side where the page is wide enough."""
    return {"kind": "beside", "blocks": list(blocks)}


# ---------------------------------------------------------------------------------------------- writing

def write(out: Path, title: str, blocks: list[dict], results: dict, front: list[list[list[dict]]] = ()) -> None:
    """Write report.html, report.md and results.json into `out`, whose figures/ are there already. Atomic, file by file.

    front: the first page as rows of cells of blocks. ValueError if a number of `results` is NaN or infinite.
    """
    try:
        numbers = json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    except ValueError:
        raise ValueError("a figure of the report is not a finite number: nothing written") from None
    page, text = as_html(out, title, blocks, front), as_markdown(title, blocks, front)
    files.write_bytes(out / "results.json", numbers.encode())
    files.write_bytes(out / "report.md", text.encode())
    files.write_bytes(out / "report.html", page.encode())


def as_html(out: Path, title: str, blocks: list[dict], front: list[list[list[dict]]] = ()) -> str:
    """The page (templates/report.html), with the pictures of `out`/figures embedded."""
    numbered = [block | {"id": f"part-{place}"} if block["kind"] == "heading" else block
                for place, block in enumerate(blocks)]
    style = Markup(TEMPLATES.get_template("report.css").render())
    return TEMPLATES.get_template("report.html").render(
        title=title, blocks=numbered, front=front, contents=_contents(numbered), style=style,
        embed=lambda name: _embed(out / "figures" / name), tile=_tile,
        narrow=lambda stem: (out / "figures" / "narrow" / f"{stem}.svg").is_file())


def _contents(blocks):
    """[(heading of level 2, [headings of level 3 under it])]."""
    sections = []
    for block in blocks:
        if block["kind"] == "heading" and block["level"] == 2:
            sections.append((block, []))
        elif block["kind"] == "heading" and sections:
            sections[-1][1].append(block)
    return sections


def _embed(path):
    kind = {".svg": "svg+xml", ".png": "png", ".gif": "gif"}[path.suffix]
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _tile(image: np.ndarray) -> str:
    """One tile, its very pixels, as the address of an embedded PNG."""
    data = io.BytesIO()
    Image.fromarray(image).save(data, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"


def as_markdown(title: str, blocks: list[dict], front: list[list[list[dict]]] = ()) -> str:
    """The same as GitHub-flavoured Markdown, figures linked as figures/<stem>.png."""
    first = [block for row in front for cell in row for block in cell if block["kind"] != "contents"]
    return "\n\n".join([f"# {_plain(title)}", *map(_markdown, [*first, *blocks])]) + "\n"


def _markdown(block):
    kind = block["kind"]
    if kind == "heading":
        return "#" * block["level"] + " " + _plain(block["text"])
    if kind == "paragraph":
        return f"**{_plain(block['text'])}**" if block["lead"] else _plain(block["text"])
    if kind == "bullets":
        return "\n".join(f"- {_plain(item)}" for item in block["items"])
    if kind == "facts":
        return "\n".join(f"- {_plain(name)}: {_plain(value)}" for name, value in block["rows"])
    if kind in ("figure", "tiles", "animation"):
        ending = "gif" if kind == "animation" else "png"
        return f"![{_plain(block['alt'])}](figures/{block['stem']}.{ending})\n\n*{_plain(block['caption'])}*"
    if kind == "beside":
        return "\n\n".join(map(_markdown, block["blocks"]))
    rule = [":--" if i in block["text"] else "--:" for i in range(len(block["header"]))]
    lines = [[_plain(cell) for cell in row] for row in [block["header"], *block["rows"]]]
    body = "\n".join(f"| {' | '.join(row)} |" for row in [lines[0], rule, *lines[1:]])
    return f"{_plain(block['caption'])}\n\n{body}"


def _plain(text):
    """Text whose marks Markdown would take for its own, escaped; one line."""
    for mark in "\\`*_[]<>|#$~&":
        text = text.replace(mark, "\\" + mark)
    return " ".join(text.split())


# --------------------------------------------------------------------------------------------- numbers

def number(value: float | None, digits: int = 3) -> str:
    """"0.812"; a dash where there is no value."""
    return "–" if value is None else _minus(f"{value:.{digits}f}")


def _minus(text):
    """The typographic minus, and no sign on a zero."""
    return text.replace("-", "−") if text.strip("+-0.") else text.lstrip("+-")


def interval(row: dict, key: str = "mean", digits: int = 3) -> str:
    """"0.812 [0.740, 0.871]" of a row with `key`, low and high."""
    if row[key] is None:
        return "–"
    if row["low"] is None:
        return number(row[key], digits)
    return f"{number(row[key], digits)} [{number(row['low'], digits)},\u00a0{number(row['high'], digits)}]"


def difference(row: dict, digits: int = 3) -> str:
    """"+0.012 [−0.020, +0.044]" of a row with difference, low and high."""
    if row["difference"] is None:
        return "–"
    middle, *ends = (_minus(f"{row[key]:+.{digits}f}") for key in ("difference", "low", "high") if row[key] is not None)
    return f"{middle} [{ends[0]},\u00a0{ends[1]}]" if ends else middle


def p_value(value: float | None) -> str:
    """".031", "< .001", "1"."""
    if value is None:
        return "–"
    return "< .001" if value < 0.0005 else "1" if value > 0.9995 else f"{value:.3f}".removeprefix("0")
