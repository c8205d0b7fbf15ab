"""Cells of tables that people open in a spreadsheet: text that begins with = + - @, a tab or a carriage return runs there as a formula
(OWASP, CSV injection), so it gets an apostrophe before it, which `plain` takes away again.

Standard library only. Proven by tests/classify/test_predictions.py.
"""
FORMULA = ("=", "+", "-", "@", "\t", "\r")


def safe(text: str) -> str:
    """`text` as a cell that no spreadsheet runs."""
    return f"'{text}" if text.lstrip("'").startswith(FORMULA) else text


def plain(cell: str) -> str:
    """The inverse of `safe`."""
    return cell[1:] if cell.startswith("'") and cell.lstrip("'").startswith(FORMULA) else cell
