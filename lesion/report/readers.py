"""The reader study in the report: can readers tell real tiles from synthetic ones?

The numbers and the verdict are lesion.stats.readers's. Proven by tests/report/test_report_readers.py.
"""
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from lesion.report import page, plots, plots_readers
from lesion.report.page import heading, number, p_value, paragraph, table
from lesion.run import sheets
from lesion.stats import readers as reader_study

METHOD = (
    "Readers saw the tiles one at a time at a fixed size, in an order of their own, all encoded alike, and answered "
    "on a scale from 1, surely synthetic, to 6, surely real; 4 and above counts as real.",
    "d' is the distance between real and synthetic in standard deviations, c the lean to say synthetic (Green & "
    "Swets 1966, log-linear correction of Hautus 1995). The pooled rows hold for other readers and other tiles alike "
    "(Obuchowski & Rockette 1995, degrees of freedom of Hillis 2007), shares and areas on the logit scale; under "
    f"{reader_study.LEAST} readers are too few for an interval. A reader's p is the exact binomial, two-sided, "
    "corrected over readers by Holm.",
    "That readers \"could not tell\" is said only where two one-sided tests find d' within the margin: a missing "
    "difference is not equivalence.",
)


def build(folder: Path) -> tuple[list[dict], dict, dict]:
    """(blocks, results, figures: stem -> matplotlib figure) for a study folder, from its journals.

    ValueError if the folder is damaged or no reader has answered enough; a damaged line costs that answer and is named.
    """
    from lesion.web import study_folder  # the annex that wrote the folder, asked only where there is one
    study, answers, problems = study_folder.read_answers(folder)
    results = reader_study.analyse(**study_folder.as_arrays(study, answers))
    results |= {"settings": study["settings"], "provenance": study["provenance"], "skipped_lines": problems}
    settings = study["settings"]
    shown = (f"{settings['count']} real and {settings['count']} synthetic {settings['label']} tiles of "
             f"{settings['resolution']} px (split of the real ones: {settings['split']}; seed {settings['seed']}), "
             f"{len(answers)} answers of {len({row['reader'] for row in answers})} reader(s).")
    left_out = [f"Left out, too few answers: {line}." for line in results["left_out"]]
    blocks = [heading("Can readers tell real from synthetic?"), paragraph(results["verdict"], lead=True),
              *(paragraph(text) for text in (shown, *left_out, *problems)), _picture(results), _bars(results), _readers(results),
              _pooled(results)]
    if results["agreement"]["pairs"]:
        blocks.append(_agreement(results))
    if results["malignancy"]:
        blocks.append(_malignancy(results))
    return [*blocks, heading("How it was done", 3), *map(paragraph, METHOD)], results, {
        "readers": draw(results), "narrow/readers": draw(results, narrow=True),
        "identified-readers": plots_readers.identified(results),
        "narrow/identified-readers": plots_readers.identified(results, across=3)}


def _interval(row: dict, name: str, digits: int = 2) -> str:
    """"0.41 [0.16, 0.66]" of figure `name` in a reader's row; of a pooled figure: report.interval."""
    row = {"mean": row[name], "low": row[f"{name}_low"], "high": row[f"{name}_high"]}
    return page.interval(row, digits=digits)


def _share(middle: float, low: float | None, high: float | None) -> str:
    """"66% [52%, 78%]", without the brackets where there is no interval."""
    return f"{middle:.0%}" if low is None else f"{middle:.0%} [{low:.0%},\u00a0{high:.0%}]"


def _readers(results: dict) -> dict:
    header = ["reader", "real tiles right", "synthetic tiles right", "all right", "p", "p (Holm)", "d'", "c",
              "ROC area", "s a tile"]
    rows = []
    for row in results["readers"]:
        real, synthetic, correct = (_share(*(row[f"{name}_{end}"] for end in ("rate", "low", "high")))
                                    for name in ("real", "synthetic", "correct"))
        rows.append([row["reader"], f"{row['hits']} of {row['signals']}, {real}",
                     f"{row['noises'] - row['false_alarms']} of {row['noises']}, {synthetic}", correct,
                     p_value(row["p"]), p_value(row["p_holm"]), _interval(row, "d_prime"),
                     number(row["criterion"], 2), _interval(row, "area"),
                     number(row["seconds"], 1) + (" (too fast)" if row["hasty"] else "")])
    published = reader_study.together(*reader_study.PUBLISHED)
    for name, heap in (("all answers, uncorrected", results["total"]), ("published study, all answers", published)):
        spotted = heap["noises"] - heap["false_alarms"]
        rows.append([name, f"{heap['hits']} of {heap['signals']}, {heap['hits'] / heap['signals']:.1%}",
                     f"{spotted} of {heap['noises']}, {spotted / heap['noises']:.1%}", f"{heap['accuracy']:.1%}",
                     p_value(heap["p"]), "", number(heap["d_prime"]), number(heap["criterion"]), "", ""])
    return table("Each reader, with 95 % intervals; below, all answers in one heap as if independent, the way "
                 "published tables have them (d' and c of the raw rates).", header, rows)


def _pooled(results: dict) -> dict:
    names = {"d_prime": "d'", "criterion": "c", "area": "ROC area", "real_rate": "real tiles right",
             "synthetic_rate": "synthetic tiles right", "correct": "right, mean of both"}
    rows = []
    for name, text in names.items():
        row = results["pooled"][name]
        is_share = name in ("real_rate", "synthetic_rate", "correct")
        rows.append([text, _share(row["estimate"], row["low"], row["high"]) if is_share else
                     page.interval(row, "estimate", 2), number(row["df"], 1), number(row["reader_sd"], 2)])
    same = results["equivalence"]
    rows.append([f"d' within ±{same['margin']:g} (TOST)", f"p = {p_value(same['p'])}", "", ""])
    said = f"under {reader_study.LEAST} readers are too few for an interval" if same["power"] is None else \
        f"if d' were 0, a study like this would show equivalence with a chance of {same['power']:.0%}"
    return table(f"All readers: mean and 95 % interval for other readers and other tiles; {said}.",
                 ["figure", "estimate", "degrees of freedom", "sd between readers"], rows)


def _agreement(results: dict) -> dict:
    found = results["agreement"]
    rows = [[f"{pair['first']} and {pair['second']}", str(pair["tiles"]), number(pair["kappa"], 2)]
            for pair in found["pairs"]]
    if len(rows) > 10:
        values = [pair["kappa"] for pair in found["pairs"] if pair["kappa"] is not None]
        quantiles = np.quantile(values, [0, 0.5, 1]) if values else [None] * 3
        rows = [[f"{len(rows)} pairs: lowest, median, highest", "", ", ".join(number(value, 2) for value in quantiles)]]
    if found["fleiss"] is not None:
        rows.append(["all (Fleiss)", str(found["tiles_by_all"]), number(found["fleiss"], 2)])
    return table("Agreement between readers on real or synthetic: Cohen's kappa.", ["readers", "tiles", "kappa"], rows)


def _malignancy(results: dict) -> dict:
    found = results["malignancy"]
    rows = [[row["reader"], f"{row['real']:.0%}", f"{row['synthetic']:.0%}", f"{row['real'] - row['synthetic']:+.0%}"]
            for row in found["readers"]]
    difference = found["difference"]
    pooled = [_share(*(found[name][key] for key in ("estimate", "low", "high"))) for name in ("real", "synthetic")]
    rows.append(["mean", *pooled,
                 f"{difference['estimate']:+.0%}" + (
                     "" if difference["low"] is None else f" [{difference['low']:+.0%}, {difference['high']:+.0%}]")])
    return table("Tiles called malignant.", ["reader", "real", "synthetic", "difference"],
                 [[cell.replace("-", "−") if column else cell for column, cell in enumerate(row)] for row in rows])


def _picture(results: dict) -> dict:
    pooled = results["pooled"]
    alt = (f"Dots with intervals for {len(results['readers'])} reader(s) and their mean: real tiles called real "
           f"{pooled['real_rate']['estimate']:.0%}, synthetic tiles called synthetic "
           f"{pooled['synthetic_rate']['estimate']:.0%}, d' {pooled['d_prime']['estimate']:.2f}.")
    return page.figure("readers", "What each reader identified (left; exact 95 % intervals, guessing: 50 %) and how "
                         "far apart the classes were for them (right; the grey band is the margin of the equivalence "
                         "test). The mean over readers stands below the line, with its interval for other readers and "
                         "tiles.", alt)


def _bars(results: dict) -> dict:
    said = "; ".join(f"{name}: real {row['real'][0]:.0%}, synthetic {row['synthetic'][0]:.0%}"
                     for name, row in plots_readers.rates(results, True))
    return page.figure("identified-readers", "The same rates as bars, as the published study drew its own: real tiles "
                         "called real and synthetic tiles called synthetic, 95 % intervals; dashed: guessing.",
                         f"Bars of identification rates. {said}.")


def _end(pooled, end):
    """An end of the pooled interval; the estimate itself, no bar, where there is none."""
    return pooled["estimate"] if pooled[end] is None else pooled[end]


def draw(results: dict, narrow: bool = False) -> Figure:
    """Left: share of real and of synthetic tiles each reader identified; right: d', the equivalence margin shaded.
    The pooled estimate stands below the readers; `narrow` puts d' below the shares. results: of
    lesion.stats.readers.analyse."""
    readers = results["readers"]
    places, bottom = np.arange(len(readers)), len(readers) + 0.3
    with rc_context(plots.SETTINGS):
        height = 1.5 + 0.38 * (len(readers) + 1)
        chart = Figure(figsize=(3.6, 2 * height) if narrow else (plots.WIDTH, height), layout="constrained")
        rates, distance = chart.subplots(2, 1, sharey=True) if narrow else \
            chart.subplots(1, 2, sharey=True, width_ratios=[3, 2])
        for name, label, colour, marker, shift in (
                ("real", "real tile called real", sheets.BLUE, "o", -0.13),
                ("synthetic", "synthetic tile called synthetic", sheets.VERMILION, "s", 0.13)):
            pooled = results["pooled"][f"{name}_rate"]
            middle = 100 * np.array([*(row[f"{name}_rate"] for row in readers), pooled["estimate"]])
            low = 100 * np.array([*(row[f"{name}_low"] for row in readers), _end(pooled, "low")])
            high = 100 * np.array([*(row[f"{name}_high"] for row in readers), _end(pooled, "high")])
            rates.errorbar(middle, np.append(places, bottom) + shift, xerr=[middle - low, high - middle], fmt=marker,
                           color=colour, markersize=5, linewidth=1.4, label=label)
        rates.axvline(50, color=sheets.GREY, linestyle="--", linewidth=1)
        rates.set(xlim=(0, 100), xlabel="identified, %", yticks=[*places, bottom], ylim=(bottom + 0.5, -0.5),
                  yticklabels=[*(row["reader"] for row in readers), "all readers"])
        rates.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=1 if narrow else 2, handletextpad=0.4)
        margin, pooled = results["equivalence"]["margin"], results["pooled"]["d_prime"]
        distance.axvspan(-margin, margin, color=sheets.GREY, alpha=0.2, linewidth=0, label=f"margin ±{margin:g}")
        distance.axvline(0, color=sheets.GREY, linestyle="--", linewidth=1)
        middle = np.array([*(row["d_prime"] for row in readers), pooled["estimate"]])
        low = np.array([*(row["d_prime_low"] for row in readers), _end(pooled, "low")])
        high = np.array([*(row["d_prime_high"] for row in readers), _end(pooled, "high")])
        distance.errorbar(middle[:-1], places, xerr=[(middle - low)[:-1], (high - middle)[:-1]], fmt="o",
                          color=sheets.BLACK, markersize=5, linewidth=1.4)
        distance.errorbar(middle[-1:], [bottom], xerr=[(middle - low)[-1:], (high - middle)[-1:]], fmt="D",
                          color=sheets.BLACK, markersize=6, linewidth=2)
        distance.set(xlabel="d' (0: cannot tell)")
        distance.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0))
        for axes in (rates, distance):
            axes.axhline(bottom - 0.65, color=sheets.GREY, linewidth=0.6)
        return chart
