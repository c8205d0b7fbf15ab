"""The first page: the answer, its certainty, limits, what was not done; nothing that the sections do not say."""
import numpy as np
import pytest
from made_runs import results_of, write_run

from lesion.report import classification, front, plots
from lesion.stats import readers as reader_study

ABOUT = [("Made", "2026-01-31"), ("Command", "python evaluate.py")]


def flat(rows):
    return [block for row in rows for cell in row for block in cell]


def text_of(chart):
    return [text.get_text() for axis in chart.axes for text in [*axis.texts, *axis.get_yticklabels()]]


@pytest.fixture
def arms(tmp_path):
    gains = {"A1": 0.0, "W1": 0.0, "S2": 2.0, "S2w": 0.1, "O1": 0.0}
    write_run(tmp_path, gains)
    return results_of(tmp_path)


def test_the_answer_comes_first_then_its_certainty(arms):
    """The lead is the classifier's finding; the picture has the three contrasts with difference, interval and verdict of the
    statistics, filled where there is a verdict."""
    rows, figures = front.build({"classification": arms}, {"classification": []}, ABOUT)
    first, *_ = flat(rows)
    assert first == {"kind": "paragraph", "text": classification.finding(arms), "lead": True}
    said = text_of(figures["answer"])
    cells = {(row["first"], row["second"]): row["metrics"]["auroc"] for row in arms["contrasts"]}
    for pair in front.CONTRASTS:
        assert f"{pair[0]} → {pair[1]}" in said
        assert any(words.startswith(front.page.difference(cells[pair])) and words.endswith(cells[pair]["verdict"]) for words in said)
    marks = [line.get_markerfacecolor() for line in figures["answer"].axes[0].lines if line.get_marker() == "o"]
    assert [colour == plots.VERMILION for colour in marks] == [
        cells[pair]["verdict"] in ("supported", "harmful") for pair in front.CONTRASTS]
    assert True in [colour == plots.VERMILION for colour in marks]
    assert ("Made", "2026-01-31") in next(block for block in flat(rows) if block["kind"] == "facts")["rows"]
    assert any(block["kind"] == "contents" for block in flat(rows))


def test_what_was_not_run_is_said(tmp_path):
    """An arm that was not run stands in the picture as such; parts that are not there stand among the limits; without an
    interval the words say why."""
    write_run(tmp_path, {"A1": 0.0, "S2": 0.0}, seeds=2)
    results = results_of(tmp_path)
    rows, figures = front.build({"classification": results}, {"classification": []}, ABOUT)
    said = text_of(figures["answer"])
    assert said.count("not run") == 2
    assert any("too few seeds for an interval" in words for words in said)
    limits = next(block for block in flat(rows) if block["kind"] == "bullets")["items"]
    assert "Not in this report: a look at the synthetic tiles and a reader study." in limits


def test_readers_alone_do_not_answer_for_the_classifier():
    """Without arms the lead says that the question was not tested, then the readers' verdict, once."""
    ratings, is_real = reader_study.simulate(np.random.default_rng(3), 3, 12, 1.0)
    results = reader_study.analyse(["a", "b", "c"], ratings, is_real) | {"skipped_lines": []}
    rows, figures = front.build({"readers": results}, {"readers": []}, ABOUT)
    texts = [block.get("text", "") for block in flat(rows)]
    assert texts[0].startswith("Whether synthetic tiles help a classifier was not tested here.")
    assert sum(results["verdict"] in text for text in texts) == 1
    assert set(figures) == {"identified"}


def test_a_long_list_of_limits_leaves_room(arms):
    """At most seven limits on the first page, and a line that says how many more there are."""
    arms["run"] = {"notes": [f"note {number}" for number in range(12)]}
    rows, _ = front.build({"classification": arms}, {"classification": []}, ABOUT)
    items = next(block for block in flat(rows) if block["kind"] == "bullets")["items"]
    assert len(items) == front.LIMITS + 1
    assert items[-1] == f"{len(front._limits({'classification': arms})) - front.LIMITS} more in the parts that follow."
