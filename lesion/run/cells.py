"""Cells of tables that people open in a spreadsheet: text that begins with = + - @, a tab or a carriage return runs there as a formula
(OWASP, CSV injection), so it gets an apostrophe before it, which `plain` takes away again.

Standard library only. Proven by tests/web/test_label_people.py and tests/classify/test_predictions.py.
"""
FORMULA = ("=", "+", "-", "@", "\t", "\r")


def safe(value: object) -> object:
    """`value` as a cell that no spreadsheet runs; what is no text is no formula."""
    return f"'{value}" if isinstance(value, str) and value.lstrip("'").startswith(FORMULA) else value


def plain(cell: str) -> str:
    """The inverse of `safe`."""
    return cell[1:] if cell.startswith("'") and cell.lstrip("'").startswith(FORMULA) else cell
