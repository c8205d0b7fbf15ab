"""Tables that people open in a spreadsheet: CSV text in which no cell is a formula.

A cell that begins with = + - @, a tab or a carriage return runs as a formula (OWASP, CSV injection): it gets an
apostrophe before it, which `plain_cell` takes away again. Proven by tests/web/test_label_people.py.
"""
import csv
import io

FORMULA = ("=", "+", "-", "@", "\t", "\r")


def safe_cell(value: object) -> object:
    """`value` as a cell that no spreadsheet runs: text that begins like a formula gets an apostrophe before it."""
    return f"'{value}" if isinstance(value, str) and value.lstrip("'").startswith(FORMULA) else value


def plain_cell(text: str) -> str:
    """The inverse of `safe_cell`."""
    return text[1:] if text.startswith("'") and text.lstrip("'").startswith(FORMULA) else text


def write_table(columns: tuple[str, ...], rows: list[dict]) -> str:
    """CSV text, every cell safe: a header and a line a row."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows([{name: safe_cell(row.get(name)) for name in columns} for row in rows])
    return text.getvalue()
