"""Figures of the report: told apart without colour (line style, marker, words), readable in print, PNG and SVG.

Colours are those of lesion.run.sheets; no figure is wider than the text of a printed page (WIDTH), so that its type prints
at its size. Every function returns a matplotlib figure; `save` writes it. Proven by tests/report/test_page.py.
"""
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from lesion.run import files
from lesion.run.sheets import BLACK, BLUE, GREY, VERMILION

WIDTH = 7.2  # inches: A4 less its margins
SETTINGS = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10,
            "axes.labelsize": 10, "xtick.labelsize": 9, "ytick.labelsize": 9, "legend.fontsize": 9,
            "legend.frameon": False, "svg.hashsalt": "lesion", "savefig.dpi": 160,
            "axes.facecolor": "none", "text.parse_math": False}  # a folder may be called a$b{c


def save(figure: Figure, folder: Path, stem: str) -> None:
    """Write `folder`/`stem`.svg, whose ground is the page's, and .png, white (not for narrow/, which only the page shows);
    atomically, and the same figure gives the same bytes."""
    with rc_context(SETTINGS):
        for ending, metadata, ground in (("png", {"Software": None}, "white"), ("svg", {"Date": None, "Creator": None}, "none")):
            if not (ending == "png" and stem.startswith("narrow/")):
                with files.atomic_path(Path(folder) / f"{stem}.{ending}") as path:
                    figure.savefig(path, format=ending, metadata=metadata, facecolor=ground)


def label(name: str) -> str:
    """A set's or a reader's name as matplotlib shows it: it leaves names that begin with "_" out of a legend."""
    return f" {name}" if name.startswith("_") else name


def grid_of(count: int, columns: int) -> tuple[int, int]:
    """(rows, columns) of `count` panels, at most `columns` side by side."""
    columns = max(1, min(columns, count))
    return -(-count // columns), columns


def curves(pairs: list[tuple[str, dict, str, dict]], prevalence: float, columns: int = 3) -> Figure:
    """ROC (upper row) and precision-recall curves (lower) of each contrast, with 95 % bands; `columns` contrasts side by
    side, the others below.

    pairs: (name, bands, name, bands) with bands of `lesion.stats.comparison.curve_bands`; the first of a pair is
    dashed blue, the second solid vermilion.
    """
    with rc_context(SETTINGS):
        lines, columns = grid_of(len(pairs), columns)
        chart = Figure(figsize=(min(WIDTH, 2.6 * columns + 0.6), 4.9 * lines), layout="constrained")
        axes = chart.subplots(2 * lines, columns, squeeze=False, sharey=True)
        for place, (first, one, second, two) in enumerate(pairs):
            line, column = divmod(place, columns)
            upper, lower = axes[2 * line, column], axes[2 * line + 1, column]
            for name, bands, colour, style in ((first, one, BLUE, "--"), (second, two, VERMILION, "-")):
                for axis, kind in ((upper, "roc"), (lower, "pr")):
                    x, middle, low, high = bands[kind]
                    axis.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
                    axis.plot(x, middle, style, color=colour, linewidth=1.8, label=name)
            upper.plot([0, 1], [0, 1], ":", color=GREY, linewidth=1)
            lower.axhline(prevalence, linestyle=":", color=GREY, linewidth=1)
            upper.set(title=f"{first} and {second}", xlabel="false positive rate", ylim=(0, 1.02))
            lower.set(xlabel="recall")
            upper.legend(loc="lower right")
            lower.legend(loc="best")
            for axis in (upper, lower):
                axis.set(xticks=[0, 0.5, 1], xticklabels=["0", "0.5", "1"])
            if column == 0:
                upper.set_ylabel("recall (true positive rate)")
                lower.set_ylabel("precision")
        for axis in axes[-2:, len(pairs) - (lines - 1) * columns:].flat:
            axis.set_visible(False)
        return chart


def forest(rows: list[dict], metrics: dict[str, str], columns: int = 3) -> Figure:
    """Differences of the contrasts with 95 % intervals, one panel a metric, each on its own scale.

    rows: contrasts of `lesion.stats.comparison.analyse`; metrics: name -> title. Filled marks are verdicts.
    """
    with rc_context(SETTINGS):
        lines, columns = grid_of(len(metrics), columns)
        chart = Figure(figsize=(min(WIDTH, 2.0 * columns + 1.2), (0.34 * len(rows) + 1.0) * lines + 0.3), layout="constrained")
        axes = chart.subplots(lines, columns, squeeze=False, sharey=True)
        for axis, (name, title) in zip(axes.flat, metrics.items()):
            axis.axvline(0, color=GREY, linewidth=1, linestyle=":")
            for place, row in enumerate(rows):
                _interval(axis, place, row["metrics"][name])
            axis.set(title=title, xlim=_reach(row["metrics"][name] for row in rows))
            axis.xaxis.set_major_locator(MaxNLocator(4, symmetric=True))
        for axis in axes.flat[len(metrics):]:
            axis.set_visible(False)
        axes[0, 0].set(yticks=range(len(rows)), yticklabels=[f"{row['first']} → {row['second']}" for row in rows],
                       ylim=(len(rows) - 0.5, -0.5))
        chart.supxlabel("difference (second arm minus first)", fontsize=9)
        return chart


def _interval(axis, place, cell):
    """A difference and its interval at height `place`; filled: a verdict. Without an interval, the mark alone."""
    if cell["difference"] is None:
        return
    if cell["low"] is not None:
        axis.plot([cell["low"], cell["high"]], [place, place], color=BLACK, linewidth=1.6)
    sure = cell["verdict"] in ("supported", "harmful")
    axis.plot(cell["difference"], place, "o", color=VERMILION if sure else "white", markeredgecolor=BLACK, markersize=7)


def _reach(cells):
    """Limits of an axis, 0 in its middle, that hold every interval."""
    ends = [abs(cell[end]) for cell in cells for end in ("low", "high", "difference") if cell[end] is not None]
    reach = max([*ends, 0.01]) * 1.12
    return -reach, reach


def answer(rows: list[tuple[str, str, dict | None]]) -> Figure:
    """The certainty of the answer as one picture: AUROC differences of the contrasts with their 95 % intervals, each said in
    words above its line. rows: (contrast, words, cell of `comparison.analyse` or None where an arm was not run)."""
    with rc_context(SETTINGS):
        chart = Figure(figsize=(3.5, 0.48 * len(rows) + 0.62), layout="constrained")
        axis = chart.subplots()
        axis.axvline(0, color=GREY, linewidth=1, linestyle=":")
        for place, (_, words, cell) in enumerate(rows):
            if cell:
                _interval(axis, place, cell)
            axis.text(0.5, place - 0.22, words, transform=axis.get_yaxis_transform(), ha="center", va="bottom", fontsize=8.5)
        low, high = _reach(cell for *_, cell in rows if cell)
        axis.set(yticks=range(len(rows)), yticklabels=[name for name, *_ in rows], ylim=(len(rows) - 0.6, -0.7),
                 xlim=(low, high), xlabel="← worse    AUROC difference    better →")
        axis.xaxis.set_major_locator(MaxNLocator(5, symmetric=True))
        axis.spines.left.set_visible(False)
        axis.tick_params(axis="y", length=0)
        return chart


def confusion(arms: dict[str, dict], title: str) -> Figure:
    """Confusion matrices side by side, shaded by the share of the true class.

    arms: name -> {tp, fn, fp, tn}, means over seeds. Rows are the truth, columns what the classifier says.
    """
    with rc_context(SETTINGS | {"axes.spines.left": False, "axes.spines.bottom": False}):
        chart = Figure(figsize=(1.65 * len(arms) + 0.2, 2.1), layout="constrained")
        axes = chart.subplots(1, len(arms), squeeze=False, sharey=True)[0]
        for axis, (name, counts) in zip(axes, arms.items()):
            table = np.array([[counts["tp"], counts["fn"]], [counts["fp"], counts["tn"]]])
            share = table / np.maximum(table.sum(1, keepdims=True), 1e-12)
            axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
            for (row, column), value in np.ndenumerate(table):
                text = f"{value:.0f}" if value == round(value) else f"{value:.1f}"
                axis.text(column, row, f"{text}\n{share[row, column]:.0%}", ha="center", va="center",
                          color="white" if share[row, column] > 0.55 else "black")
            axis.set(title=name, xticks=[0, 1], yticks=[0, 1], xticklabels=["malignant", "benign"], xlabel="classifier")
            axis.tick_params(length=0, labelsize=8.5)
            axis.set_yticklabels(["malignant", "benign"], rotation=90, va="center")
        axes[0].set_ylabel("truth")
        chart.suptitle(title, fontsize=9)
        return chart


def calibration(arms: dict[str, list[dict]], columns: int = 3) -> Figure:
    """Observed share of malignant tiles against the mean score, in bins of equal count; one small panel an arm.

    arms: name -> rows of `lesion.stats.classification.reliability` with low and high (exact binomial) added. Both
    axes are logarithmic: most scores are small. Bins without a malignant tile stand at the bottom, hollow.
    """
    with rc_context(SETTINGS):
        lines, columns = grid_of(len(arms), columns)
        chart = Figure(figsize=(min(WIDTH, 2.3 * columns + 0.4), 2.2 * lines + 0.3), layout="constrained")
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
            for line, low in ((axis.xaxis, left), (axis.yaxis, floor)):
                line.set_major_locator(LogLocator(subs=(1.0,) if low < 0.002 else (1.0, 3.0) if low < 0.05 else (1.0, 2.0, 5.0)))
                line.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
                line.set_minor_formatter(NullFormatter())
        for axis in axes.flat[len(arms):]:
            axis.set_visible(False)
        chart.supxlabel("mean score (probability of malignant)", fontsize=10)
        chart.supylabel("observed share malignant", fontsize=10)
        return chart
