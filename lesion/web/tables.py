"""Tables that people open in a spreadsheet: CSV text in which no cell is a formula (lesion.run.cells).

Proven by tests/web/test_label_people.py.
"""
import csv
import io

from lesion.run import cells


def write_table(columns: tuple[str, ...], rows: list[dict]) -> str:
    """CSV text, every cell safe: a header and a line a row."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows([{name: cells.safe(row.get(name)) for name in columns} for row in rows])
    return text.getvalue()
