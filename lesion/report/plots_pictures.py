"""Figures about synthetic tiles: t-SNE, real beside synthetic, attributes, worst copies, learning curves.

Sets are told apart by colour, marker and words (lesion.report.plots); every function returns a matplotlib figure.
Proven by tests/report/test_plots_pictures.py.
"""
import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from lesion.report.plots import SETTINGS, WIDTH, grid_of, label
from lesion.run.sheets import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION

REAL, BENIGN = (BLUE, "o"), (GREY, "o")
SETS = ((VERMILION, "^"), (ORANGE, "s"), (PURPLE, "v"), (GREEN, "P"), (SKY, "D"))  # synthetic sets, in order
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "++")


def tsne(features: np.ndarray, seed: int = 0) -> np.ndarray:
    """t-SNE (van der Maaten & Hinton 2008) of features [M,D], standardised: positions [M,2]; perplexity 30 or
    (M-1)/3."""
    from sklearn.manifold import TSNE
    spread = features.std(0)
    scaled = (features - features.mean(0)) / np.where(spread > 0, spread, 1)
    perplexity = min(30.0, (len(features) - 1) / 3)
    return TSNE(perplexity=perplexity, init="pca", learning_rate="auto", random_state=seed).fit_transform(scaled)


def scatter(panels: list[dict], columns: int = 2) -> Figure:
    """t-SNE maps side by side. panels: title, parts = [(name, positions [M,2], (colour, marker))], the first part
    below."""
    with rc_context(SETTINGS):
        lines, columns = grid_of(len(panels), columns)
        chart = Figure(figsize=(3.5 * columns + 0.2, 3.7 * lines), layout="constrained")
        axes = chart.subplots(lines, columns, squeeze=False).ravel()
        for axis in axes[len(panels):]:
            axis.axis("off")
        for axis, panel in zip(axes, panels):
            for name, positions, (colour, marker) in panel["parts"]:
                axis.scatter(*positions.T, s=16, c=colour, marker=marker, alpha=0.7, linewidths=0, label=label(name))
            axis.set(xticks=[], yticks=[], title=panel["title"])
            wide = max(len(name) for name, *_ in panel["parts"]) > 18
            axis.legend(loc="upper center", bbox_to_anchor=(0.5, 0), ncols=1 if wide else 2, handletextpad=0.1)
        return chart


def grid(rows: list[tuple[str, np.ndarray]]) -> Figure:
    """Tiles in named rows. rows: (name, images_u8 [M,R,R,3]); at most as many columns as the widest row has tiles."""
    with rc_context(SETTINGS):
        columns = max(len(images) for _, images in rows)
        chart = Figure(figsize=(0.95 * columns, 1.13 * len(rows)))
        side, left = 0.94 / columns, 0.02
        for line, (name, images) in enumerate(rows):
            top = 1 - (line + 1) / len(rows)
            chart.text(left, top + 0.87 / len(rows), name, fontsize=9, va="bottom")
            for column, image in enumerate(images):
                axis = chart.add_axes((left + column * 0.96 / columns, top, side, 0.84 / len(rows)))
                axis.imshow(image)
                axis.axis("off")
        return chart


def steps(frames: np.ndarray, shown: int = 6) -> Figure:
    """A few frames of a denoising GIF side by side, the first and the last among them, for paper: of its first tile, the left
    square. frames: uint8 [N,H,W,3]."""
    with rc_context(SETTINGS):
        frames = frames[:, :, :frames.shape[1]]
        chosen = np.unique(np.linspace(0, len(frames) - 1, shown).round().astype(int))
        height, width = frames.shape[1:3]
        chart = Figure(figsize=(WIDTH, WIDTH / len(chosen) * height / width))
        for place, number in enumerate(chosen):
            axis = chart.add_axes(((place + 0.01) / len(chosen), 0, 0.98 / len(chosen), 1))
            axis.imshow(frames[number])
            axis.axis("off")
        return chart


def worst(synthetic: np.ndarray, training: np.ndarray, captions: list[str], is_copy: np.ndarray) -> Figure:
    """Pairs, nearest first: each synthetic tile (left) beside its nearest training tile (right), turned to the same
    view.

    synthetic, training: images_u8 [M,R,R,3]; captions [M] under the pairs; is_copy [M] bool: framed and named.
    """
    with rc_context(SETTINGS):
        columns = min(4, len(captions))
        lines = -(-len(captions) // columns)
        chart = Figure(figsize=(2.5 * columns, 1.62 * lines))
        cell, height = 1 / columns, 1 / lines
        for number, caption in enumerate(captions):
            x, y = (number % columns) * cell, 1 - (number // columns + 1) * height
            for part, image in enumerate((synthetic[number], training[number])):
                axis = chart.add_axes((x + (0.03 + 0.47 * part) * cell, y + 0.24 * height, 0.46 * cell, 0.72 * height))
                axis.imshow(image)
                axis.set(xticks=[], yticks=[])
                axis.spines[:].set(visible=True, linewidth=2.2 if is_copy[number] else 0.5,
                                   color=VERMILION if is_copy[number] else GREY)
            text = f"copy: {caption}" if is_copy[number] else caption
            chart.text(x + 0.03 * cell, y + 0.08 * height, text, fontsize=8.5,
                       weight="bold" if is_copy[number] else "normal")
        return chart


def attributes(counts: dict[str, dict[str, list[int]]], values: dict[str, tuple[str, ...]],
               titles: dict[str, str], columns: int = 2) -> Figure:
    """Share of each value of each attribute, real beside synthetic.

    counts: set name -> attribute -> tiles with each value; the first set is the real one. values: attribute -> names;
    titles: attribute -> heading.
    """
    with rc_context(SETTINGS):
        lines, columns = grid_of(len(values), columns)
        chart = Figure(figsize=(WIDTH / 2 * columns, 1.65 * lines + 0.4), layout="constrained")
        axes = chart.subplots(lines, columns, squeeze=False).ravel()
        for axis in axes[len(values):]:
            axis.axis("off")
        width = 0.8 / len(counts)
        for axis, (name, classes) in zip(axes, values.items()):
            for place, (set_name, found) in enumerate(counts.items()):
                total = max(1, sum(found[name]))
                colour = REAL[0] if place == 0 else SETS[(place - 1) % len(SETS)][0]
                axis.bar(np.arange(len(classes)) + (place - (len(counts) - 1) / 2) * width,
                         np.array(found[name]) / total, width * 0.92, color=colour, edgecolor=BLACK, linewidth=0.5,
                         hatch=HATCHES[place % len(HATCHES)], label=label(set_name))
            axis.set(title=titles[name], xticks=range(len(classes)))
            axis.set_xticklabels(classes, fontsize=8, rotation=20 if len(classes) > 3 else 0,
                                 ha="right" if len(classes) > 3 else "center")
            axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        handles, names = axes[0].get_legend_handles_labels()
        chart.legend(handles, names, loc="outside upper center", ncols=min(1 if columns == 1 else 4, len(names)), fontsize=9)
        return chart


def learning(runs: list[dict], columns: int = 2) -> Figure:
    """Validation loss (above) and share of copies (below, or beside for a single run) against the training step; `columns`
    runs side by side.

    runs: name, steps and losses [K] (validation), copies = [(step, rate, low, high)], best: the step of the least loss.
    A line marks `best`: tiles drawn from later checkpoints come from an over-trained LoRA.
    """
    with rc_context(SETTINGS):
        lines, across = grid_of(len(runs), columns)
        alone = len(runs) == 1 < columns
        chart = Figure(figsize=(WIDTH if alone else min(WIDTH, 3.6 * across), 2.4 if alone else 4.2 * lines), layout="constrained")
        axes = chart.subplots(1, 2).reshape(2, 1) if alone else chart.subplots(2 * lines, across, squeeze=False)
        uppers, lowers = axes[::2].ravel(), axes[1::2].ravel()
        for upper, lower, run in zip(uppers, lowers, runs):
            upper.plot(run["steps"], run["losses"], "-o", color=BLUE, markersize=4)
            upper.set_title(run["name"])
            if run["copies"]:
                step, rate, low, high = np.array(run["copies"], float).T
                error = np.maximum([rate - low, high - rate], 0)
                lower.errorbar(step, rate, error, color=VERMILION, marker="^", capsize=3, linewidth=1.5)
            else:
                lower.text(0.5, 0.5, "no tiles drawn\nfrom its checkpoints", transform=lower.transAxes, ha="center",
                           va="center", color=GREY)
            for axis in (upper, lower):
                axis.axvline(run["best"], color=GREY, linewidth=1, linestyle="--")
            upper.annotate("least loss", (run["best"], 1), xycoords=("data", "axes fraction"), xytext=(3, -9),
                           textcoords="offset points", fontsize=8, color=GREY)
            upper.set_ylabel("validation loss")
            lower.axhline(0.01, color=GREY, linewidth=1, linestyle=":")
            lower.set(xlabel="training step", xlim=upper.get_xlim(), ylabel="called copies\n(dotted: real tiles)")
            lower.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            upper.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            lower.yaxis.set_major_formatter(PercentFormatter(1))
        count = len(runs)
        losses, tops = [axis.get_ylim() for axis in uppers[:count]], [axis.get_ylim()[1] for axis in lowers[:count]]
        for axis in uppers[:count]:
            axis.set_ylim(min(low for low, _ in losses), max(high for _, high in losses))
        for axis in lowers[:count]:
            axis.set_ylim(0, max(tops))  # of all runs, once every interval is drawn
        for axis in [*uppers[count:], *lowers[count:]]:
            axis.axis("off")
        return chart
