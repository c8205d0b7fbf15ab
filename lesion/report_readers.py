"""The reader study in the report: verdict, tables, figure, and how they were made.

The figures are lesion.metrics.reader_study's. Proven by tests/test_report_readers.py.
"""
from pathlib import Path

import numpy as np

from lesion.metrics import reader_study
from lesion.web import study_folder

BLUE, RED, GREY = "#0072B2", "#D55E00", "#555555"  # Okabe & Ito: told apart by the colour-blind
METHOD = (
    "Readers saw the tiles one at a time at a fixed size, in an order of their own, all encoded alike, and answered "
    "on a scale from 1, surely synthetic, to 6, surely real; 4 and above counts as real.",
    "d' is the distance between real and synthetic in standard deviations, c the lean to say synthetic (Green & "
    "Swets 1966, log-linear correction of Hautus 1995). The pooled rows hold for other readers and other tiles alike "
    "(Obuchowski & Rockette 1995, degrees of freedom of Hillis 2007). A reader's p is the exact binomial, two-sided, "
    "corrected over readers by Holm.",
    "That readers \"could not tell\" is said only where two one-sided tests find d' within the margin: a missing "
    "difference is not equivalence.",
)


def build(folder: Path) -> dict:
    """The section's parts: `results` (lesion.metrics.reader_study.analyse), `paragraphs`, `tables` of (caption, header,
    rows of text). ValueError if the folder is damaged or no reader has answered enough."""
    study, answers, problems = study_folder.read_answers(folder)
    results = reader_study.analyse(**study_folder.as_arrays(study, answers))
    settings = study["settings"]
    shown = (f"{settings['count']} real and {settings['count']} synthetic {settings['label']} tiles of "
             f"{settings['resolution']} px (split of the real ones: {settings['split']}; seed {settings['seed']}), "
             f"{len(answers)} answers of {len({row['reader'] for row in answers})} reader(s).")
    left_out = [f"Left out, too few answers: {line}." for line in results["left_out"]]
    tables = [_readers(results), _pooled(results)]
    if results["agreement"]["pairs"]:
        tables.append(_agreement(results))
    if results["malignancy"]:
        tables.append(_malignancy(results))
    return {"results": results | {"settings": settings, "provenance": study["provenance"]}, "tables": tables,
            "paragraphs": [results["verdict"], shown, *left_out, *problems, *METHOD]}


def _interval(row: dict, name: str = "", percent: bool = False) -> str:
    """"0.41 [0.16, 0.66]" of a pooled figure, or of figure `name` in a reader's row."""
    values = [row[f"{name}_low"], row[f"{name}_high"]] if name else [row["low"], row["high"]]
    middle = row[name if name in row else f"{name}_rate"] if name else row["estimate"]
    if percent:
        return f"{middle:.0%} [{max(values[0], 0):.0%}, {min(values[1], 1):.0%}]"
    return f"{middle:.2f} [{values[0]:.2f}, {values[1]:.2f}]"


def _p(value: float) -> str:
    if value < 0.0001:
        return "< .0001"
    return f"{value:.4f}"[1:] if value < 0.01 else f"{value:.3f}"[1:] if value < 0.9995 else "1"


def _readers(results: dict) -> tuple:
    header = ["reader", "real tiles right", "synthetic tiles right", "all right", "p", "p (Holm)", "d'", "c",
              "ROC area", "s a tile"]
    rows = []
    for row in results["readers"]:
        counts = f"{row['hits']} of {row['signals']}", f"{row['noises'] - row['false_alarms']} of {row['noises']}"
        rows.append([row["reader"], f"{counts[0]}, {_interval(row, 'real', True)}",
                     f"{counts[1]}, {_interval(row, 'synthetic', True)}", _interval(row, "correct", True), _p(row["p"]),
                     _p(row["p_holm"]), _interval(row, "d_prime"), f"{row['criterion']:.2f}", _interval(row, "area"),
                     f"{row['seconds']:.1f}" if row.get("seconds") is not None else "–"])
    published = reader_study.together(*reader_study.PUBLISHED)
    for name, heap in (("all answers, uncorrected", results["total"]), ("published study, all answers", published)):
        spotted = heap["noises"] - heap["false_alarms"]
        rows.append([name, f"{heap['hits']} of {heap['signals']}, {heap['hits'] / heap['signals']:.1%}",
                     f"{spotted} of {heap['noises']}, {spotted / heap['noises']:.1%}", f"{heap['accuracy']:.1%}",
                     _p(heap["p"]), "", f"{heap['d_prime']:.3f}", f"{heap['criterion']:.3f}", "", ""])
    return "Each reader, with 95 % intervals; below, answers in one heap as independent, as published", header, rows


def _pooled(results: dict) -> tuple:
    names = {"d_prime": ("d'", False), "criterion": ("c", False), "area": ("ROC area", False),
             "real_rate": ("real tiles right", True), "synthetic_rate": ("synthetic tiles right", True),
             "correct": ("right, mean of both", True)}
    rows = []
    for name, (text, percent) in names.items():
        pooled = results["pooled"][name]
        rows.append([text, _interval(pooled, percent=percent), "–" if pooled["df"] is None else f"{pooled['df']:.1f}",
                     "–" if pooled["reader_sd"] is None else f"{pooled['reader_sd']:.2f}"])
    same = results["equivalence"]
    rows.append([f"d' within ±{same['margin']:g} (TOST)", f"p = {_p(same['p'])}", "",
                 f"power {same['power']:.0%} if d' is 0"])
    return "All readers: mean and 95 % interval for other readers and other tiles", \
        ["figure", "estimate", "degrees of freedom", "sd between readers"], rows


def _agreement(results: dict) -> tuple:
    found = results["agreement"]
    rows = [[f"{pair['first']} and {pair['second']}", str(pair["tiles"]), _kappa(pair["kappa"])]
            for pair in found["pairs"]]
    if len(rows) > 10:
        values = [pair["kappa"] for pair in found["pairs"] if pair["kappa"] is not None]
        rows = [["pairs: lowest, median, highest", str(len(rows)), ", ".join(
            _kappa(float(value)) for value in np.quantile(values, [0, 0.5, 1])) if values else "–"]]
    if found["fleiss"] is not None:
        rows.append(["all (Fleiss)", str(found["tiles_by_all"]), _kappa(found["fleiss"])])
    return "Agreement between readers on real or synthetic: Cohen's kappa", ["readers", "tiles", "kappa"], rows


def _kappa(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _malignancy(results: dict) -> tuple:
    found = results["malignancy"]
    rows = [[row["reader"], f"{row['real']:.0%}", f"{row['synthetic']:.0%}", f"{row['real'] - row['synthetic']:+.0%}"]
            for row in found["readers"]]
    difference = found["difference"]
    rows.append(["mean", _interval(found["real"], percent=True), _interval(found["synthetic"], percent=True),
                 f"{difference['estimate']:+.0%} [{difference['low']:+.0%}, {difference['high']:+.0%}]"])
    return "Tiles called malignant", ["reader", "real", "synthetic", "difference"], rows


def figure(results: dict):
    """Left: share of real and of synthetic tiles each reader identified (exact 95 % intervals); right: d' with the
    equivalence margin shaded. The pooled estimate stands below the readers. Returns a matplotlib figure."""
    from matplotlib.figure import Figure
    readers = results["readers"]
    height = 1.5 + 0.38 * (len(readers) + 1)
    chart = Figure(figsize=(8.5, height), layout="constrained")
    rates, distance = chart.subplots(1, 2, sharey=True, width_ratios=[3, 2])
    places = np.arange(len(readers))
    bottom = len(readers) + 0.3
    for name, label, colour, marker, shift in (("real", "real tile called real", BLUE, "o", -0.13),
                                               ("synthetic", "synthetic tile called synthetic", RED, "s", 0.13)):
        pooled = results["pooled"][f"{name}_rate"]
        middle = np.array([row[f"{name}_rate"] for row in readers] + [pooled["estimate"]])
        low = np.array([row[f"{name}_low"] for row in readers] + [max(pooled["low"], 0)])
        high = np.array([row[f"{name}_high"] for row in readers] + [min(pooled["high"], 1)])
        reach = 100 * np.array([middle - low, high - middle])
        rates.errorbar(100 * middle, np.append(places, bottom) + shift, xerr=reach, fmt=marker, color=colour,
                       markersize=5, linewidth=1.4, label=label)
    rates.axvline(50, color=GREY, linestyle="--", linewidth=1)
    rates.set(xlim=(0, 100), xlabel="identified, %", yticks=[*places, bottom],
              yticklabels=[*(row["reader"] for row in readers), "all readers"], ylim=(bottom + 0.5, -0.5))
    rates.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False, fontsize=9, handletextpad=0.4)
    margin, pooled = results["equivalence"]["margin"], results["pooled"]["d_prime"]
    distance.axvspan(-margin, margin, color="#999999", alpha=0.25, linewidth=0, label=f"margin ±{margin:g}")
    distance.axvline(0, color=GREY, linestyle="--", linewidth=1)
    middle = np.array([row["d_prime"] for row in readers])
    reach = np.array([[row["d_prime"] - row["d_prime_low"], row["d_prime_high"] - row["d_prime"]] for row in readers]).T
    distance.errorbar(middle, places, xerr=reach, fmt="o", color="black", markersize=5, linewidth=1.4)
    distance.errorbar([pooled["estimate"]], [bottom], xerr=[[pooled["estimate"] - pooled["low"]],
                                                            [pooled["high"] - pooled["estimate"]]],
                      fmt="D", color="black", markersize=6, linewidth=2)
    distance.set(xlabel="d' (0: cannot tell)")
    distance.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False, fontsize=9)
    for axes in (rates, distance):
        axes.axhline(bottom - 0.65, color=GREY, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    return chart
