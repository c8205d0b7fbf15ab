"""lesion.report and lesion.report.plots: self-contained, escaped, deterministic, no NaN."""
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from lesion.report import page as report
from lesion.report import plots

EVIL = '<script>alert(1)</script> & "a|b" *c*'


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def written(tmp_path):
    figure = plots.confusion({"W1": {"tp": 3.0, "fn": 1.0, "fp": 2.5, "tn": 30.0}}, "a title")
    plots.save(figure, tmp_path / "figures", "confusion")
    blocks = [report.heading("Part <1>"), report.paragraph(EVIL, lead=True), report.paragraph("plain"),
              report.table("Caption <b>", ["name", "x|y"], [[EVIL, "1.0"], ["b", "−2"]]),
              report.figure("confusion", "what it is", 'alt "text"')]
    report.write(tmp_path, "Title <&>", blocks, {"a": 1.5, "b": None})
    return tmp_path


def test_page_is_self_contained_and_escaped(written):
    """No script, nothing fetched, figures embedded; text that looks like markup stays text, in HTML and in Markdown."""
    page = Page((written / "report.html").read_text(encoding="utf-8"))
    assert not {"script", "link", "iframe", "b"} & set(page.tags)
    assert all(link.startswith("data:image/svg+xml;base64,") for link in page.links)
    assert len(page.links) == 1
    assert EVIL in page.text
    markdown = (written / "report.md").read_text(encoding="utf-8")
    assert "<script>" not in markdown.replace("\\<", "")
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {3}, "an escaped bar must not make a column"
    assert "(figures/confusion.png)" in markdown


def test_same_input_same_bytes(written, tmp_path_factory):
    """Report and figures carry no date, no random ids: the same numbers give the same files."""
    again = tmp_path_factory.mktemp("again")
    plots.save(plots.confusion({"W1": {"tp": 3.0, "fn": 1.0, "fp": 2.5, "tn": 30.0}}, "a title"), again / "figures",
               "confusion")
    for name in ("confusion.png", "confusion.svg"):
        assert (again / "figures" / name).read_bytes() == (written / "figures" / name).read_bytes()


def test_nan_is_refused(written):
    """A NaN in the results is an error, and the earlier report stays as it was."""
    before = (written / "report.html").read_bytes()
    with pytest.raises(ValueError, match="not a finite number"):
        report.write(written, "other", [], {"a": float("nan")})
    assert (written / "report.html").read_bytes() == before
    assert json.loads((written / "results.json").read_text(encoding="utf-8")) == {"a": 1.5, "b": None}


def test_numbers():
    """Fixed digits, a true minus sign, a dash for no value, p as journals print it."""
    assert report.number(-0.0123) == "−0.012"
    assert report.number(-0.0001) == "0.000"
    assert report.number(None) == "–"
    assert report.interval({"mean": 0.5, "low": 0.4, "high": 0.61}, digits=2) == "0.50 [0.40,\u00a00.61]"
    assert report.interval({"mean": None, "low": None, "high": None}) == "–"
    assert report.difference({"difference": 0.1, "low": -0.2, "high": 0.4}) == "+0.100 [−0.200,\u00a0+0.400]"
    assert [report.p_value(p) for p in (None, 0.0004, 0.0312, 0.5, 1.0)] == ["–", "< .001", ".031", ".500", "1"]


def test_every_figure_draws():
    """Each kind of figure on small and on extreme input (one arm, no malignant tile in a bin, a missing interval)."""
    grid = np.linspace(0, 1, 5)
    bands = {"roc": (grid, grid, grid * 0.9, grid), "pr": (grid, 1 - grid / 2, grid * 0, grid * 0 + 1)}
    assert len(plots.curves([("A1", bands, "S2", bands)], 0.1).axes) == 2
    cell = {"difference": 0.1, "low": -0.1, "high": 0.3, "verdict": "not distinguishable"}
    rows = [{"first": "A1", "second": "S2", "metrics": {"auroc": cell, "auprc": cell | {"low": None, "high": None}}}]
    assert len(plots.forest(rows, {"auroc": "AUROC", "auprc": "AUPRC"}).axes) == 2
    bins = [{"n": 20, "malignant": k, "mean_score": s, "observed": k / 20, "low": 0.0, "high": 0.4}
            for k, s in ((0, 0.0), (3, 0.5))]
    chart = plots.calibration({"A1": bins, "W1": bins, "S2": bins, "O1": bins})
    assert sum(axis.get_visible() for axis in chart.axes) == 4
