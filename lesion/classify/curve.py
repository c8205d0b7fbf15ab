"""The learning curve of a cross-fitted experiment: AUROC by number of real malignant training tiles, and what synthetic ones add.

Folds are tested by different models, whose scores have different scales; so every figure is computed within a fold and averaged
with the folds' malignant tiles as weights. The folds' test tiles are disjoint: their variances add. That their training tiles
overlap is left out, as by all cross-fitting (the spread over training sets has no unbiased estimate: Bengio and Grandvalet 2004).
Proven by tests/classify/test_curve.py.
"""
import math
from pathlib import Path

import numpy as np

from lesion.classify import arms
from lesion.run import sheets
from lesion.stats import inference

PRIMARY = " to ".join(arms.PRIMARY)
STYLES = {"B0": (sheets.SKY, "v", "--"), "A1": (sheets.GREY, "o", "--"), "W1": (sheets.GREEN, "^", "--"),  # of arms in a chart
          "S2": (sheets.VERMILION, "s", "-"), "S2w": (sheets.ORANGE, "D", "-"), "O1": (sheets.BLUE, "<", "--")}


def point(size: int | None, ratio: float, real: float, folds: list[dict[str, list]]) -> dict:
    """The figures of one size and ratio: arms and contrasts.

    real: malignant training tiles a fold (mean); folds: for each fold, arm -> runs (predictions.Run), one a seed.
    """
    names = list(folds[0])
    return {"size": "all" if size is None else size, "ratio": ratio, "real": real,
            "arms": {name: auroc([fold[name] for fold in folds]) for name in names},
            "contrasts": {f"{a} to {b}": difference([fold[a] for fold in folds], [fold[b] for fold in folds])
                          for a, b in arms.CONTRASTS if a in names and b in names}}


def auroc(folds: list[list]) -> dict:
    """{"auroc", "low", "high", "seeds"} of one arm: folds hold its runs (predictions.Run), one a seed."""
    labels, scores, patients, number = joined(folds)
    values, parts = inference.auroc_over_runs(labels, scores, patients, number)
    carriers = np.count_nonzero(labels) if patients is None else len(np.unique(patients[labels == 1]))
    low, high = inference.interval(float(values.mean()), parts, carriers) or (math.nan, math.nan)
    return {"auroc": float(values.mean()), "low": low, "high": high, "seeds": len(values)}


def difference(first: list[list], second: list[list]) -> dict:
    """{"difference", "low", "high", "p"} of AUROC, second minus first, paired by tile and seed within each fold."""
    labels, scores, patients, number = joined(first)
    found = inference.delong_test(labels, scores, joined(second)[1], patients, number)
    return {key: found[key] for key in ("difference", "low", "high", "p")}


def joined(folds: list[list]) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray]:
    """labels [n], scores [S, n], patients [n] or None, fold [n] of all folds' test tiles."""
    known = all(runs[0].patients is not None for runs in folds)
    return (np.concatenate([runs[0].labels for runs in folds]),
            np.concatenate([np.stack([run.scores for run in runs]) for runs in folds], axis=1),
            np.concatenate([runs[0].patients for runs in folds]) if known else None,
            np.repeat(np.arange(len(folds)), [len(runs[0].labels) for runs in folds]))


def summary(points: list[dict]) -> dict:
    """Points in order of size, the p values of all but the primary contrast adjusted by Holm, and what the tiles are worth.

    Primary: O1 to S2 with all real tiles (the largest size), at the first ratio; every other contrast is exploratory.
    """
    points = sorted(points, key=lambda one: (one["real"], one["ratio"]))
    largest = max(one["real"] for one in points)
    primary = next((one for one in points if one["real"] == largest and PRIMARY in one["contrasts"]), None)
    others = [found for one in points for name, found in one["contrasts"].items() if one is not primary or name != PRIMARY]
    for found, adjusted in zip(others, inference.holm([found["p"] for found in others]) if others else []):
        found["p_holm"] = adjusted
    named = primary and {"size": primary["size"], "ratio": primary["ratio"], **primary["contrasts"][PRIMARY]}
    return {"points": points, "primary": named,
            "worth": [worth(one, points) for one in points if PRIMARY in one["contrasts"]]}


def worth(one: dict, points: list[dict]) -> dict:
    """How many further real malignant training tiles would give what S2 adds to O1 at this point: {"real", "ratio", "tiles", "low",
    "high"}; None where the curve of O1 does not reach so far, or the gain is not told from none.

    Read off O1's curve at the same ratio, straight lines over log(number): where it is as high as O1 here plus the gain.
    """
    curve = [(other["real"], other["arms"]["O1"]["auroc"]) for other in points if other["ratio"] == one["ratio"]]
    gain = one["contrasts"][PRIMARY]

    def tiles(extra: float) -> float | None:
        goal = one["arms"]["O1"]["auroc"] + extra
        for (n0, y0), (n1, y1) in zip(curve, curve[1:]):
            if n0 >= one["real"] and y0 <= goal <= y1 and y1 > y0:
                return math.exp(math.log(n0) + (goal - y0) / (y1 - y0) * math.log(n1 / n0)) - one["real"]
        return None

    found = gain["low"] > 0
    return {"real": one["real"], "ratio": one["ratio"], "detectable": found, "tiles": tiles(gain["difference"]) if found else None,
            "low": tiles(gain["low"]) if found else None, "high": tiles(gain["high"]) if found else None}


def lines(found: dict) -> list[str]:
    """The table that the command prints."""
    text = [f"{'real':>6}{'ratio':>7}  arm   AUROC [95 %]            contrast    difference [95 %]        p (Holm)"]
    for one in found["points"]:
        left = [f"{name:6}{arm['auroc']:.3f} [{arm['low']:.3f}, {arm['high']:.3f}]" for name, arm in one["arms"].items()]
        right = [f"{name:12}{c['difference']:+.3f} [{c['low']:+.3f}, {c['high']:+.3f}]  {c.get('p_holm', c['p']):.3f}"
                     + ("" if "p_holm" in c else " (primary, unadjusted)") for name, c in one["contrasts"].items()]
        for i in range(max(len(left), len(right))):
            head = f"{one['real']:6.0f}{one['ratio']:7g}" if i == 0 else " " * 13
            text.append(f"{head}  {left[i] if i < len(left) else '':28}  {right[i] if i < len(right) else ''}".rstrip())
    for row in found["worth"]:
        said = f"about {row['tiles']:.0f} further real tiles" if row["tiles"] is not None else \
            "more than the curve reaches" if row["detectable"] else "none detectable"
        text.append(f"what synthetic tiles are worth at {row['real']:.0f} real ones, ratio {row['ratio']:g}: {said}")
    return text


def draw(found: dict, path: Path) -> None:
    """The learning curve as a picture: AUROC with intervals by real malignant training tiles, a line an arm, a panel a ratio."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from lesion.run import files
    ratios = sorted({one["ratio"] for one in found["points"]})
    figure = Figure(figsize=(max(3.6 * len(ratios), 4.4), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(ratios), sharey=True, squeeze=False)[0]
    for panel, ratio in zip(panels, ratios):
        points = [one for one in found["points"] if one["ratio"] == ratio]
        for number, name in enumerate(points[0]["arms"]):
            y = np.array([one["arms"][name]["auroc"] for one in points])
            reach = np.abs([[one["arms"][name][end] for one in points] for end in ("low", "high")] - y)
            x = np.array([one["real"] for one in points]) * 1.03 ** (number - (len(points[0]["arms"]) - 1) / 2)  # side by side
            color, marker, line = STYLES[name]
            panel.errorbar(x, y, reach, marker=marker, color=color, linestyle=line, capsize=2, linewidth=1.2, markersize=5,
                           label=f"{name}: {arms.ARMS[name].meaning}")
        panel.set(xscale="log", xlabel="real malignant training tiles a fold", title=f"synthetic or repeated : real = {ratio:g} : 1",
                  xlim=(0.7 * min(one["real"] for one in points), 1.4 * max(one["real"] for one in points)))
        panel.set_xticks([one["real"] for one in points], [f"{one['real']:.0f}" for one in points], minor=False)
        panel.minorticks_off()
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("AUROC within folds [95 %]")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png", metadata={"Software": None})
