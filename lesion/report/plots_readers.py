"""Bars of what readers identified, as the published study drew them, with intervals.

Proven by tests/report/test_plots_readers.py.
"""
import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from lesion.report.plots import SETTINGS, WIDTH, label
from lesion.run.sheets import BLACK, BLUE, GREY, VERMILION
from lesion.stats import inference
from lesion.stats import readers as reader_study

KINDS = (("real", "real tiles called real", BLUE, ""), ("synthetic", "synthetic tiles called synthetic", VERMILION, "///"))


def rates(results: dict, everyone: bool) -> list[tuple[str, dict]]:
    """(name, {"real" and "synthetic": (share, low, high)}), shares of tiles identified: each reader (exact intervals) if
    `everyone`, all readers (the pooled estimate, for other readers and tiles) and the published study (exact, all answers in one
    heap). low and high are None where `results`, of lesion.stats.readers.analyse, has no interval."""
    rows = []
    for row in results["readers"] if everyone else []:
        rows.append((row["reader"], {kind: (row[f"{kind}_rate"], row[f"{kind}_low"], row[f"{kind}_high"]) for kind, *_ in KINDS}))
    count = len(results["readers"])
    pooled = {kind: results["pooled"][f"{kind}_rate"] for kind, *_ in KINDS}
    rows.append(("all readers" if everyone else f"{count} reader{'s'[:count != 1]}, here",
                 {kind: (row["estimate"], row["low"], row["high"]) for kind, row in pooled.items()}))
    hits, signals, false_alarms, noises = reader_study.PUBLISHED
    rows.append(("published study", {
        "real": (hits / signals, *inference.clopper_pearson(hits, signals)),
        "synthetic": (1 - false_alarms / noises, *inference.clopper_pearson(noises - false_alarms, noises))}))
    return rows


def identified(results: dict, everyone: bool = True, across: int = 8) -> Figure:
    """Bars: the share of real tiles called real and of synthetic tiles called synthetic, 95 % intervals, guessing dashed.

    results: of lesion.stats.readers.analyse; everyone: a pair of bars for each reader, `across` pairs side by side, else only
    all readers together and the published study.
    """
    rows = rates(results, everyone)
    lines = -(-len(rows) // across)
    with rc_context(SETTINGS):
        width = WIDTH if everyone and len(rows) > 3 else 3.5
        chart = Figure(figsize=(width, 1.8 * lines + 0.3), layout="constrained")
        for line, axis in enumerate(chart.subplots(lines, 1, squeeze=False)[:, 0]):
            some = rows[line * across:(line + 1) * across]
            for shift, (kind, words, colour, hatch) in zip((-0.2, 0.2), KINDS):
                values = [row[kind] for _, row in some]
                places = np.arange(len(some)) + shift
                axis.bar(places, [share for share, *_ in values], 0.38, color=colour, alpha=0.55, hatch=hatch, edgecolor=BLACK,
                         linewidth=0.7, label=words)
                for place, (share, low, high) in zip(places, values):
                    if low is not None:
                        axis.plot([place, place], [max(low, 0), min(high, 1)], color=BLACK, linewidth=1.4)
                    axis.text(place, 0.03, f"{100 * share:.3g}%", ha="center", va="bottom", fontsize=8,
                              bbox={"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.85})
            axis.axhline(0.5, color=GREY, linestyle="--", linewidth=1)
            axis.set(ylim=(0, 1.02), xlim=(-0.6, max(len(some), min(len(rows), across)) - 0.4), xticks=range(len(some)),
                     yticks=[0, 0.5, 1])
            axis.set_xticklabels([label(name).replace("published ", "published\n") if everyone else name for name, _ in some])
            axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            axis.set_ylabel("identified")
        handles, names = axis.get_legend_handles_labels()
        chart.legend(handles, names, loc="outside upper center", ncols=2 if width == WIDTH else 1, handletextpad=0.4,
                     borderpad=0)
        return chart
