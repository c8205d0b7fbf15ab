"""A report from blocks: one self-contained report.html, the same as report.md, the numbers as results.json.

A block is a dict from `heading`, `paragraph`, `table` or `figure`; sections (lesion/report_*.py) make lists of them.
Nothing is fetched when the page is read: figures are embedded, there are no scripts. Proven by tests/report/test_page.py.
"""
import base64
import html
import json
from pathlib import Path

from lesion.run import files

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 60rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.7rem; line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #bbb; }
p { max-width: 46rem; } p.lead { font-size: 1.1rem; border-left: 4px solid #0072b2; padding-left: .8rem; }
.wide { overflow-x: auto; margin: 1.2rem 0; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
caption, figcaption { text-align: left; font-size: .9rem; color: #444; padding: .3rem 0; max-width: 46rem; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #ddd; vertical-align: top; }
th:first-child, td:first-child { text-align: left; } thead th { border-bottom: 2px solid #555; vertical-align: bottom; }
td.text, th.text { text-align: left; }
figure { margin: 1.5rem 0; } img { max-width: 100%; height: auto; }
code { font-size: .9em; overflow-wrap: anywhere; }
@media print { body { max-width: none; margin: 0; font-size: 11px; } h2 { break-after: avoid; }
               figure, tr { break-inside: avoid; } .wide { overflow: visible; } }
"""


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
    """The page, with the figures of `out`/figures embedded as SVG."""
    body = "\n".join(_html(out, block) for block in blocks)
    title = html.escape(title)
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>'
            f"<style>{STYLE}</style></head>\n<body><main>\n<h1>{title}</h1>\n{body}\n</main></body></html>\n")


def _html(out, block):
    if block["kind"] == "heading":
        return f"<h{block['level']}>{html.escape(block['text'])}</h{block['level']}>"
    if block["kind"] == "paragraph":
        return f"<p{' class=lead' if block['lead'] else ''}>{html.escape(block['text'])}</p>"
    if block["kind"] == "figure":
        data = base64.b64encode((out / "figures" / f"{block['stem']}.svg").read_bytes()).decode()
        return (f'<figure><img alt="{html.escape(block["alt"])}" src="data:image/svg+xml;base64,{data}">'
                f"<figcaption>{html.escape(block['caption'])}</figcaption></figure>")
    head = "".join(f"<th scope=col{_left(block, i)}>{html.escape(cell)}</th>" for i, cell in enumerate(block["header"]))
    rows = "\n".join("<tr>" + "".join(f"<td{_left(block, i)}>{html.escape(cell)}</td>" for i, cell in enumerate(row))
                     + "</tr>" for row in block["rows"])
    return (f'<div class="wide"><table><caption>{html.escape(block["caption"])}</caption><thead><tr>{head}</tr></thead>'
            f"<tbody>\n{rows}\n</tbody></table></div>")


def _left(block, column):
    return " class=text" if column in block["text"] else ""


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
