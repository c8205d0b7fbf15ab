"""Bars of identification rates: the shares and intervals of the statistics, the published study named as such."""
import numpy as np
import pytest

from lesion.report import plots, plots_readers
from lesion.stats import readers as reader_study


@pytest.fixture
def results():
    ratings, is_real = reader_study.simulate(np.random.default_rng(3), 5, 12, 1.0)
    return reader_study.analyse(["a$b{", "_b", "c", "d", "e"], ratings, is_real)


def test_bars_are_the_rates(results):
    """A pair a reader, one for all, one for the published study: 66.5 % and 49.5 % with their exact intervals."""
    axis = plots_readers.identified(results).axes[0]
    real, synthetic = ([bar.get_height() for bar in bars] for bars in axis.containers)
    assert np.allclose(real[:5], [row["real_rate"] for row in results["readers"]])
    assert np.allclose(synthetic[:5], [row["synthetic_rate"] for row in results["readers"]])
    assert np.allclose([real[5], synthetic[5]], [results["pooled"][f"{kind}_rate"]["estimate"] for kind in ("real", "synthetic")])
    assert (real[6], synthetic[6]) == (0.665, 0.495)
    assert axis.get_xticklabels()[6].get_text() == "published\nstudy"
    assert np.allclose(axis.lines[6].get_ydata(), [0.5950, 0.7300], atol=0.002)  # exact, 133 of 200
    assert axis.containers[0][0].get_hatch() != axis.containers[1][0].get_hatch()


def test_no_interval_is_no_line_and_none_leaves_the_axis(results):
    """Where the statistics give no interval none is drawn, and none is drawn beyond 0 and 100 %."""
    results["pooled"]["real_rate"] |= {"low": None, "high": None}
    results["pooled"]["synthetic_rate"] |= {"low": -0.2, "high": 1.3}
    axis = plots_readers.identified(results, everyone=False).axes[0]
    lines = [line.get_ydata() for line in axis.lines if line.get_linestyle() == "-"]
    assert len(lines) == 3  # all readers: synthetic alone; the published study: both
    assert max(np.max(line) for line in lines) == 1
    assert min(np.min(line) for line in lines) == 0


def test_many_readers_and_odd_names(results, tmp_path):
    """Names that matplotlib would read as mathematics or leave out are drawn; many readers fill several rows."""
    results["readers"] = (results["readers"] * 3)[:12]
    chart = plots_readers.identified(results, across=8)
    assert len(chart.axes) == 2
    plots.save(chart, tmp_path, "many")
    labels = [text.get_text().strip() for axis in chart.axes for text in axis.get_xticklabels()]
    assert labels[:2] == ["a$b{", "_b"]
