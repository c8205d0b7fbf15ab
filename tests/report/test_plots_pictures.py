"""Figures of synthetic tiles: the right marks in the right places, both formats, readable without colour."""
import numpy as np
import pytest

from lesion.report import plots, plots_pictures


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)


def figures(images):
    rng = np.random.default_rng(1)
    part = [("real", rng.normal(size=(20, 2)), plots_pictures.REAL), ("made", rng.normal(size=(9, 2)), plots_pictures.SETS[0])]
    return {
        "scatter": plots_pictures.scatter([{"title": "AUC 0.9", "parts": part}] * 2),
        "grid": plots_pictures.grid([("real", images), ("made", images[:3])]),
        "worst": plots_pictures.worst(images, images, [f"{i}" for i in range(6)], np.arange(6) < 2),
        "attributes": plots_pictures.attributes({"real": {"size": [1, 3]}, "made": {"size": [2, 2]}},
                                                {"size": ("small", "large")}, {"size": "Size"}),
        "learning": plots_pictures.learning([{"name": "run", "steps": [0, 10], "losses": [1.0, 0.5], "best": 10,
                                              "copies": [(10, 0.2, 0.1, 0.3)]}]),
    }


def test_every_figure_is_written_as_png_and_svg(tmp_path, images):
    """Both files of all five figures exist, and a second drawing gives the same bytes."""
    for stem, figure in figures(images).items():
        plots.save(figure, tmp_path, stem)
        first = (tmp_path / f"{stem}.svg").read_bytes()
        assert (tmp_path / f"{stem}.png").stat().st_size > 3000
        plots.save(figures(images)[stem], tmp_path, stem)
        assert (tmp_path / f"{stem}.svg").read_bytes() == first


def test_grid_shows_the_very_pixels(images):
    """Tiles stand in order, unchanged, under their row's name."""
    chart = plots_pictures.grid([("real", images), ("made", images[:3])])
    shown = [axis.images[0].get_array() for axis in chart.axes]
    np.testing.assert_array_equal(shown, np.concatenate([images, images[:3]]))
    assert [text.get_text() for text in chart.texts] == ["real", "made"]


def test_worst_names_copies_in_words(images):
    """Synthetic left of training; a copy says so in its caption, not by its frame alone."""
    chart = plots_pictures.worst(images, images[::-1], [f"tile {i}" for i in range(6)], np.arange(6) == 1)
    np.testing.assert_array_equal(chart.axes[2].images[0].get_array(), images[1])
    np.testing.assert_array_equal(chart.axes[3].images[0].get_array(), images[4])
    assert chart.axes[2].get_position().x0 < chart.axes[3].get_position().x0
    assert [text.get_text() for text in chart.texts][:2] == ["tile 0", "copy: tile 1"]


def test_attributes_are_shares_told_apart_by_hatching(images):
    """Bars are shares of the set's tiles; two sets differ in hatch as well as colour; an empty set has no bars."""
    axis = figures(images)["attributes"].axes[0]
    assert [bar.get_height() for bar in axis.patches] == [0.25, 0.75, 0.5, 0.5]
    assert axis.patches[0].get_hatch() != axis.patches[2].get_hatch()
    empty = plots_pictures.attributes({"real": {"size": [0, 0]}}, {"size": ("small", "large")}, {"size": "Size"})
    assert [bar.get_height() for bar in empty.axes[0].patches] == [0, 0]


def test_scatter_uses_a_marker_a_set(images):
    """Real and synthetic points have different markers and a name each; all points are drawn."""
    axis = figures(images)["scatter"].axes[0]
    real, made = axis.collections
    assert len(real.get_offsets()) == 20
    assert len(made.get_offsets()) == 9
    assert real.get_paths()[0].vertices.shape != made.get_paths()[0].vertices.shape
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["real", "made"]


def test_tsne_keeps_two_clusters_apart_and_repeats():
    """Well separated groups stay separated, the same seed gives the same map, few tiles do not break it."""
    rng = np.random.default_rng(2)
    features = np.concatenate([rng.normal(0, 1, (30, 5)), rng.normal(12, 1, (30, 5))])
    positions = plots_pictures.tsne(features)
    centres = positions[:30].mean(0), positions[30:].mean(0)
    nearer = [np.linalg.norm(p - centres[0]) < np.linalg.norm(p - centres[1]) for p in positions]
    assert nearer == [True] * 30 + [False] * 30
    np.testing.assert_array_equal(positions, plots_pictures.tsne(features))
    assert plots_pictures.tsne(features[:6]).shape == (6, 2)


def test_learning_marks_the_least_loss_and_says_when_there_is_nothing(images):
    """The dashed line stands at the best step in both panels; a run without drawn tiles says so."""
    chart = figures(images)["learning"]
    assert [line.get_xdata()[0] for axis in chart.axes for line in axis.lines if line.get_linestyle() == "--"] == [10, 10]
    none = plots_pictures.learning([{"name": "run", "steps": [0, 10], "losses": [1.0, 0.5], "best": 10, "copies": []}])
    assert any("no tiles drawn" in text.get_text() for axis in none.axes for text in axis.texts)


def test_learning_shows_whole_intervals():
    """The axis of the copies, shared by the columns, holds the widest interval of any of them."""
    run = {"name": "run", "steps": [0, 10], "losses": [1.0, 0.5], "best": 10}
    chart = plots_pictures.learning([run | {"copies": [(10, 0.01, 0.0, 0.02)]}, run | {"copies": [(10, 0.1, 0.0, 0.4)]}])
    assert chart.axes[-1].get_ylim()[0] == 0
    assert chart.axes[-1].get_ylim()[1] >= 0.4


def test_steps_show_the_first_and_the_last_frame():
    """Six of 25 frames, evenly spaced, noise first and the picture last."""
    frames = np.repeat(np.arange(25, dtype=np.uint8), 8 * 8 * 3).reshape(25, 8, 8, 3)
    assert [axis.images[0].get_array()[0, 0, 0] for axis in plots_pictures.steps(frames).axes] == [0, 5, 10, 14, 19, 24]
