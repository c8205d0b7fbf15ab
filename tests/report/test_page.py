"""lesion.report and lesion.report.plots: self-contained, escaped, deterministic, no NaN."""
import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from PIL import Image

from lesion.report import page as report
from lesion.report import plots, plots_pictures

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


def test_pictures_tiles_and_films_are_embedded(tmp_path):
    """Tiles stand in the page as their very pixels, copies framed and said in words; a film has a still for paper; what is wide
    has a narrow figure for a phone where there is one; Markdown has figures in their place."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    (tmp_path / "figures" / "narrow").mkdir(parents=True)
    for name in ("film.gif", "still.png", "wide.svg", "narrow/wide.svg", "plain.svg"):
        (tmp_path / "figures" / name).write_bytes(name.encode())
    cells = [{"images": [images[0], images[1]], "caption": "copy: 1", "marked": True}, {"images": [images[2]], "caption": "<2>"}]
    blocks = [report.tiles("sheet", "some tiles", "three tiles", [("a <b>", cells)]), report.animation("film", "still", "a film", "noise"),
              report.beside(report.figure("wide", "w", "wide one"), report.figure("plain", "p", "plain one")),
              report.bullets(["one", "<two>"]), report.facts([("Made", "to day")])]
    report.write(tmp_path, "Title", blocks, {})
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    shown = [np.asarray(Image.open(io.BytesIO(base64.b64decode(link.partition(",")[2])))) for link in page.links
             if link.startswith("data:image/png") and b"PNG" in base64.b64decode(link.partition(",")[2])]
    np.testing.assert_array_equal(shown, images)
    assert html.count("marked") == 1 + report.TEMPLATES.get_template("report.css").render().count("marked")
    assert 'class="still"' in html
    assert html.count("<source") == 1
    for words in ("a <b>", "copy: 1", "<2>", "<two>", "to day"):
        assert words in page.text
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    for words in ("(figures/film.gif)", "(figures/sheet.png)", "(figures/plain.png)", "- one", "- Made: to day"):
        assert words in markdown


def texts_of(chart):
    """(words, bounding box) of every text that shows."""
    canvas = FigureCanvasAgg(chart)
    canvas.draw()
    found = chart.findobj(lambda one: isinstance(one, Text) and one.get_visible() and one.get_text().strip())
    shown = [text for text in found if text.axes is None or text.axes.get_visible()]
    hidden = {label for axis in chart.axes for line in (axis.xaxis, axis.yaxis) for tick in line.get_major_ticks()
              for label in (tick.label1, tick.label2) if not tick.get_visible() or not label.get_visible()
              or not line.get_view_interval()[0] - 1e-9 <= tick.get_loc() <= line.get_view_interval()[1] + 1e-9}
    return [(text.get_text(), text.get_window_extent(canvas.get_renderer())) for text in shown if text not in hidden]


def figures_of_many():
    """The charts of a full report on awkward numbers, wide and narrow."""
    rng = np.random.default_rng(0)
    grid = np.linspace(0, 1, 5)
    bands = {"roc": (grid, grid, grid * 0.9, grid), "pr": (grid, 1 - grid / 2, grid * 0, grid * 0 + 1)}
    pairs = [("A1", bands, "S2", bands), ("W1", bands, "S2w", bands), ("O1", bands, "S2", bands)]
    names = {"auroc": "AUROC", "auprc": "AUPRC", "a": "recall at 90 %\nspecificity", "b": "recall at chosen\nthreshold",
             "c": "specificity at\nchosen threshold"}
    rows = []
    for first, _, second, _ in pairs:
        values = rng.normal(0, 0.3, len(names))
        rows.append({"first": first, "second": second, "metrics": {
            name: {"difference": v, "low": v - 0.2, "high": v + 0.25, "verdict": "supported"} for name, v in zip(names, values)}})
    bins = [{"n": 20, "malignant": k, "mean_score": s, "observed": k / 20, "low": 0.0, "high": 0.4}
            for k, s in ((0, 1e-4), (3, 0.5), (10, 0.9))]
    arms = dict.fromkeys(("B0", "A1", "W1", "S2", "S2w", "O1"), bins)
    words = "−0.123 [−0.456, +0.789]  not distinguishable"
    yield "answer", plots.answer([(f"{row['first']} → {row['second']}", words, row["metrics"]["auroc"]) for row in rows])
    yield "confusion", plots.confusion(dict.fromkeys(("W1", "S2"), {"tp": 45.6, "fn": 33.4, "fp": 123.4, "tn": 1876.6}), "a title")
    for columns in (3, 1):
        yield f"forest {columns}", plots.forest(rows, names, columns)
        yield f"curves {columns}", plots.curves(pairs, 0.04, columns)
        yield f"calibration {columns}", plots.calibration(arms, columns)
    sets = {"real malignant": {name: [1] * 6 for name in "ab"}, "malignant-phase2": {name: [2] * 6 for name in "ab"}}
    values = dict.fromkeys("ab", ("very light", "light", "intermediate", "tan", "brown", "dark"))
    for columns in (2, 1):
        yield f"attributes {columns}", plots_pictures.attributes(sets, values, {"a": "Skin tone", "b": "Size"}, columns)
    runs = [{"name": f"malignant-phase{k}", "steps": [0, 500, 1400], "losses": [0.2, 0.11, 0.12], "best": 500,
             "copies": [(500, 0.2, 0.1, 0.3)]} for k in (1, 2)]
    for columns, count in ((2, 1), (2, 2), (1, 2)):
        yield f"learning {columns} {count}", plots_pictures.learning(runs[:count], columns)


@pytest.mark.parametrize(("name", "chart"), figures_of_many(), ids=lambda value: value if isinstance(value, str) else "")
def test_no_two_texts_overlap_and_all_print_at_their_size(name, chart):
    """Ticks, titles, legends and numbers keep clear of each other, stay inside, are 8 points or more, and no chart is wider than
    the text of a printed page, where it would be shrunk."""
    assert chart.get_figwidth() <= plots.WIDTH + 1e-9
    assert min(text.get_fontsize() for text in chart.findobj(Text) if text.get_text().strip()) >= 8
    texts = texts_of(chart)
    assert texts
    for place, (words, box) in enumerate(texts):
        assert box.x0 >= -1, words
        assert box.x1 <= chart.bbox.x1 + 1, words
        for others, other in texts[place + 1:]:
            over = min(box.x1, other.x1) - max(box.x0, other.x0), min(box.y1, other.y1) - max(box.y0, other.y0)
            # of labels that are set at an angle the boxes overlap, not the words
            assert min(over) < 1.5 or name.startswith("attributes"), (words, others, over)


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
