"""Figures of the report: told apart without colour (line style, marker, words), readable in print, PNG and SVG.

Colours are Okabe & Ito's. Every function returns a matplotlib figure; `save` writes it. Proven by tests/test_plots.py.
"""
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from lesion.run import files

BLUE, VERMILION, GREEN, ORANGE, SKY, PURPLE, BLACK = (
    "#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9", "#CC79A7", "#000000")
GREY = "#666666"
ARM_STYLE = {"B0": (GREY, "D"), "A1": (SKY, "o"), "W1": (ORANGE, "s"), "S2": (VERMILION, "^"), "S2w": (PURPLE, "v"),
             "O1": (GREEN, "P")}
SETTINGS = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10,
            "axes.labelsize": 10, "legend.frameon": False, "svg.hashsalt": "lesion", "savefig.dpi": 160}


def save(figure: Figure, folder: Path, stem: str) -> None:
    """Write `folder`/`stem`.png and .svg, atomically; the same figure gives the same bytes."""
    with rc_context(SETTINGS):
        for ending, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
            with files.atomic_path(Path(folder) / f"{stem}.{ending}") as path:
                figure.savefig(path, format=ending, metadata=metadata, facecolor="white")


def curves(pairs: list[tuple[str, dict, str, dict]], prevalence: float) -> Figure:
    """ROC (upper row) and precision-recall curves (lower), one column a contrast, with 95 % bands.

    pairs: (name, bands, name, bands) with bands of `lesion.stats.comparison.curve_bands`; the first of a pair is
    dashed blue, the second solid vermilion.
    """
    with rc_context(SETTINGS):
        chart = Figure(figsize=(3.3 * max(len(pairs), 1) + 0.4, 6.4), layout="constrained")
        axes = chart.subplots(2, len(pairs), squeeze=False, sharex="row", sharey="row")
        for column, (first, one, second, two) in enumerate(pairs):
            for name, bands, colour, line in ((first, one, BLUE, "--"), (second, two, VERMILION, "-")):
                for row, kind in enumerate(("roc", "pr")):
                    x, middle, low, high = bands[kind]
                    axes[row, column].fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
                    axes[row, column].plot(x, middle, line, color=colour, linewidth=1.8, label=name)
            axes[0, column].plot([0, 1], [0, 1], ":", color=GREY, linewidth=1)
            axes[1, column].axhline(prevalence, linestyle=":", color=GREY, linewidth=1)
            axes[0, column].set(title=f"{first} and {second}", xlabel="false positive rate")
            axes[1, column].set(xlabel="recall", ylim=(0, 1.02))
            axes[0, column].legend(loc="lower right")
            axes[1, column].legend(loc="best")
        axes[0, 0].set_ylabel("recall (true positive rate)")
        axes[1, 0].set_ylabel("precision")
        return chart


def forest(rows: list[dict], metrics: dict[str, str]) -> Figure:
    """Differences of the contrasts with 95 % intervals, one panel a metric, each on its own scale.

    rows: contrasts of `lesion.stats.comparison.analyse`; metrics: name -> title. Filled marks are verdicts.
    """
    with rc_context(SETTINGS):
        chart = Figure(figsize=(2.1 * len(metrics) + 1.2, 0.45 * len(rows) + 1.4), layout="constrained")
        axes = chart.subplots(1, len(metrics), squeeze=False, sharey=True)[0]
        for axis, (name, title) in zip(axes, metrics.items()):
            axis.axvline(0, color=GREY, linewidth=1, linestyle=":")
            for place, row in enumerate(rows):
                cell = row["metrics"][name]
                if cell["low"] is None:
                    continue
                sure = cell["verdict"] in ("supported", "harmful")
                axis.plot([cell["low"], cell["high"]], [place, place], color=BLACK, linewidth=1.6)
                axis.plot(cell["difference"], place, "o", color=VERMILION if sure else "white", markeredgecolor=BLACK,
                          markersize=7)
            reach = max([abs(row["metrics"][name][end] or 0) for row in rows for end in ("low", "high")] + [0.01]) * 1.1
            axis.set(title=title, xlim=(-reach, reach))
            axis.locator_params(axis="x", nbins=4)
            axis.tick_params(axis="x", labelsize=8)
        axes[0].set(yticks=range(len(rows)), yticklabels=[f"{row['first']} → {row['second']}" for row in rows],
                    ylim=(len(rows) - 0.5, -0.5))
        chart.supxlabel("difference (second arm minus first)", fontsize=9)
        return chart


def confusion(arms: dict[str, dict], title: str) -> Figure:
    """Confusion matrices side by side, shaded by the share of the true class.

    arms: name -> {tp, fn, fp, tn}, means over seeds. Rows are the truth, columns what the classifier says.
    """
    with rc_context(SETTINGS | {"axes.spines.left": False, "axes.spines.bottom": False}):
        chart = Figure(figsize=(3.4 * len(arms), 3.3), layout="constrained")
        for axis, (name, counts) in zip(chart.subplots(1, len(arms), squeeze=False)[0], arms.items()):
            table = np.array([[counts["tp"], counts["fn"]], [counts["fp"], counts["tn"]]])
            share = table / table.sum(1, keepdims=True)
            axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
            for (row, column), value in np.ndenumerate(table):
                text = f"{value:.0f}" if value == round(value) else f"{value:.1f}"
                axis.text(column, row, f"{text}\n{share[row, column]:.0%}", ha="center", va="center", fontsize=12,
                          color="white" if share[row, column] > 0.55 else "black")
            axis.set(title=name, xticks=[0, 1], yticks=[0, 1], xticklabels=["malignant", "benign"], xlabel="classifier",
                     yticklabels=["malignant", "benign"])
            axis.tick_params(length=0)
            axis.set_yticklabels(["malignant", "benign"], rotation=90, va="center")
        chart.axes[0].set_ylabel("truth")
        chart.suptitle(title, fontsize=10)
        return chart


def calibration(arms: dict[str, list[dict]]) -> Figure:
    """Observed share of malignant tiles against the mean score, in bins of equal count; one small panel an arm.

    arms: name -> rows of `lesion.stats.classification.reliability` with low and high (exact binomial) added. Both
    axes are logarithmic: most scores are small. Bins without a malignant tile stand at the bottom, hollow.
    """
    with rc_context(SETTINGS):
        columns = min(3, len(arms))
        lines = -(-len(arms) // columns)
        chart = Figure(figsize=(3.0 * columns + 0.4, 2.8 * lines + 0.3), layout="constrained")
        axes = chart.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
        floor = 10 ** np.floor(np.log10(min(0.5 / max(row["n"] for row in rows) for rows in arms.values())))
        left = min(max(row["mean_score"], 1e-4) for rows in arms.values() for row in rows) / 2
        for axis, (name, rows) in zip(axes.flat, arms.items()):
            axis.plot([left, 1], [left, 1], ":", color=GREY, linewidth=1)
            for row in rows:
                x, y = max(row["mean_score"], left), max(row["observed"], floor)
                if row["low"] is not None:
                    axis.plot([x, x], [max(row["low"], floor), row["high"]], color=BLUE, linewidth=1.2)
                axis.plot(x, y, "o", color=BLUE if row["malignant"] else "white", markeredgecolor=BLUE, markersize=5)
            axis.set(xscale="log", yscale="log", title=name, ylim=(floor * 0.8, 1.2), xlim=(left, 1.2))
        for axis in axes.flat[len(arms):]:
            axis.set_visible(False)
        chart.supxlabel("mean score (probability of malignant)", fontsize=10)
        chart.supylabel("observed share malignant", fontsize=10)
        return chart
