"""A report from blocks: one self-contained report.html, the same as report.md, the numbers as results.json.

A block is a dict from `heading`, `paragraph`, `table` or `figure`; the sections (classification.py, pictures.py,
readers.py) make lists of them.
Nothing is fetched when the page is read: figures are embedded, there are no scripts.
Proven by tests/report/test_page.py.
"""
import base64
import json
from pathlib import Path

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from lesion.run import files

TEMPLATES = Environment(loader=PackageLoader("lesion.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True)


def heading(text: str, level: int = 2) -> dict:
    """A heading of level 2 (a section) or 3."""
    return {"kind": "heading", "text": text, "level": level}


def paragraph(text: str, lead: bool = False) -> dict:
    """A paragraph of plain text; `lead` sets the finding off."""
    return {"kind": "paragraph", "text": text, "lead": lead}


def table(caption: str, header: list[str], rows: list[list[str]], text: tuple[int, ...] = ()) -> dict:
    """A table of strings; the columns numbered in `text`, and the first, are words and set left, the others right."""
    assert all(len(row) == len(header) for row in rows), caption
    return {"kind": "table", "caption": caption, "header": header, "rows": rows, "text": {0, *text}}


def figure(stem: str, caption: str, alt: str) -> dict:
    """The picture figures/`stem`.svg and .png of the report's folder; `alt` says in words what it shows."""
    return {"kind": "figure", "stem": stem, "caption": caption, "alt": alt}


def write(out: Path, title: str, blocks: list[dict], results: dict) -> None:
    """Write report.html, report.md and results.json into `out`, whose figures/ are there already. Atomic, file by file.

    ValueError if a number of `results` is NaN or infinite.
    """
    try:
        numbers = json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    except ValueError:
        raise ValueError("a figure of the report is not a finite number: nothing written") from None
    page, text = as_html(out, title, blocks), as_markdown(title, blocks)
    files.write_bytes(out / "results.json", numbers.encode())
    files.write_bytes(out / "report.md", text.encode())
    files.write_bytes(out / "report.html", page.encode())


def as_html(out: Path, title: str, blocks: list[dict]) -> str:
    """The page (templates/report.html), with the figures of `out`/figures embedded as SVG."""
    def picture(stem):
        data = base64.b64encode((out / "figures" / f"{stem}.svg").read_bytes()).decode()
        return f"data:image/svg+xml;base64,{data}"

    style = Markup(TEMPLATES.get_template("report.css").render())
    return TEMPLATES.get_template("report.html").render(title=title, blocks=blocks, style=style, picture=picture)


def as_markdown(title: str, blocks: list[dict]) -> str:
    """The same as GitHub-flavoured Markdown, figures linked as figures/<stem>.png."""
    parts = [f"# {_plain(title)}"]
    for block in blocks:
        if block["kind"] == "heading":
            parts.append("#" * block["level"] + " " + _plain(block["text"]))
        elif block["kind"] == "paragraph":
            parts.append(f"**{_plain(block['text'])}**" if block["lead"] else _plain(block["text"]))
        elif block["kind"] == "figure":
            parts.append(f"![{_plain(block['alt'])}](figures/{block['stem']}.png)\n\n*{_plain(block['caption'])}*")
        else:
            rule = [":--" if i in block["text"] else "--:" for i in range(len(block["header"]))]
            lines = [[_plain(cell) for cell in row] for row in [block["header"], *block["rows"]]]
            body = "\n".join(f"| {' | '.join(row)} |" for row in [lines[0], rule, *lines[1:]])
            parts.append(f"{_plain(block['caption'])}\n\n{body}")
    return "\n\n".join(parts) + "\n"


def _plain(text):
    """Text whose marks Markdown would take for its own, escaped; one line."""
    for mark in "\\`*_[]<>|#":
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
