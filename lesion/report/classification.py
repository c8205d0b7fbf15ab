"""The classifier section of the report: what is supported, what is not, and the numbers behind it.

Every sentence is derived from the numbers of `lesion.stats.comparison.analyse`; the rules that turn a number into a
word are `comparison.verdict` and `finding`. Proven by tests/report/test_evaluate_script.py.
"""
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lesion.classify import predictions
from lesion.classify.arms import ARMS, CONTRASTS
from lesion.report import plots
from lesion.report.page import difference, figure, heading, interval, number, p_value, paragraph, table
from lesion.run import files
from lesion.stats import classification, comparison
from lesion.tiles.seen import tile_id

KEY = (("O1", "S2"), ("A1", "S2"), ("W1", "S2w"))  # which contrast the headline rests on: the first that was run
METHOD = (
    "A figure is the mean over training seeds. Its interval holds two uncertainties, drawn together {resamples:,} "
    "times: other {unit} (bootstrap, stratified by class{whole}) and other training runs (bootstrap over seeds). AUROC "
    "is compared by DeLong's test over {unit} and seeds, everything else by the bootstrap, the same draws for both "
    "arms; p is corrected over the contrasts by Holm, metric by metric. A contrast is called supported or harmful "
    "where the corrected p is below .05, else not distinguishable. AUROC is the primary figure; the other metrics are "
    "not corrected against each other. The chosen threshold maximises recall + specificity on validation tiles.")


def build(folder: Path, data: Path | None, shown: tuple[str, str] = ("W1", "S2"),
          progress: Callable | None = None) -> tuple[list[dict], dict, dict]:
    """(blocks, results, figures: stem -> matplotlib figure) for a run folder of classify.py.

    data: the prepared set, for the subgroups (None: left out). shown: the two arms whose confusion matrices are drawn.
    ValueError if the predictions are damaged, of different tests, or of other tiles than `data`'s.
    """
    runs = predictions.read_runs(folder)
    args = json.loads((folder / "args.json").read_text()) if (folder / "args.json").is_file() else {}
    results = comparison.analyse(runs, CONTRASTS, progress=progress)
    results["subgroups"] = comparison.subgroups(runs, groups_of(data, runs)) if data else []
    results["run"] = {key: args.get(key) for key in ("arch", "weights", "image_size", "epochs", "batch_size", "lr",
                                                     "augmentation", "weight_power", "ratio", "max_benign", "folds",
                                                     "counts", "notes", "checked", "data_sha256", "synthetic_sha256",
                                                     "provenance")}
    figures = draw(runs, results, tuple(arm for arm in shown if arm in runs))
    return _blocks(results, figures, args), results, figures


def groups_of(data: Path, runs: dict) -> dict[str, np.ndarray]:
    """attribute -> group of each test tile: skin tone, lighting and diagnosis, where the data set knows them.

    ValueError if the predictions are of tiles that the data set does not hold, or labels differ.
    """
    first = next(iter(next(iter(runs.values())).values()))
    rows = {tile_id(row): row for row in files.read_manifest(data)}
    for name, label in zip(first.ids, first.labels):
        if name not in rows or rows[name].get("label") != ("malignant" if label else "benign"):
            raise ValueError(f"--data {data} does not hold the test tile {name} with that label: these are predictions "
                             "of another data set")
    known = [rows[name] for name in first.ids]
    columns = {
        "skin tone": [(row.get("attributes") or {}).get("skin_tone") for row in known],
        "lighting": [(row.get("metadata") or {}).get("tbp_tile_type") for row in known],
        "diagnosis": [(row.get("metadata") or {}).get("iddx_3") for row in known]}
    return {name: np.array([str(value or "") for value in values]) for name, values in columns.items() if any(values)}


# ---------------------------------------------------------------------------------------------- words

def finding(results: dict) -> str:
    """The headline: what the key contrast's AUROC says, in words no stronger than its test."""
    rows = {(row["first"], row["second"]): row for row in results["contrasts"]}
    key = next((pair for pair in KEY if pair in rows), None)
    if key is None:
        return ("No two arms that differ in synthetic tiles alone were run: nothing is claimed about synthetic tiles "
                "here.")
    row = rows[key]
    cell = row["metrics"]["auroc"]
    than = {"O1": "than repeating the real malignant tiles does", "A1": "than leaving them out",
            "W1": "than leaving them out, under a weighted loss"}[key[0]]
    numbers = f"(AUROC of {key[1]} minus {key[0]}: {difference(cell)}, corrected p {p_value(cell['p_holm'])})"
    if cell["verdict"] == comparison.SUPPORTED:
        text = f"Supported: synthetic malignant tiles rank test tiles better {than} {numbers}."
    elif cell["verdict"] == comparison.HARMFUL:
        text = f"Harmful: synthetic malignant tiles rank test tiles worse {than} {numbers}."
    else:
        text = (f"Not distinguishable: these runs do not show that synthetic malignant tiles rank test tiles better or "
                f"worse {than} {numbers}. With {results['malignant']} malignant test tiles only a difference of about "
                f"{row['detectable_auroc']:.2f} or more would be found four times in five.")
    if key[0] != "O1":
        text += " O1, the control for the changed class balance, was not run: a gain could come from the balance alone."
    return text


def remarks(results: dict) -> list[str]:
    """What else the contrasts say: verdicts of the other metrics, and recall bought with specificity."""
    texts = []
    for row in results["contrasts"]:
        words = {}
        for name in classification.SHOWN["key"]:
            words.setdefault(row["metrics"][name]["verdict"], []).append(_title(name))
        texts.append(f"{row['first']} → {row['second']} ({row['meaning']}): "
                     + "; ".join(f"{word} for {_list(names)}" for word, names in words.items()) + ".")
        for limit, where in (("50", "at 0.5"), ("chosen", "at the chosen threshold")):
            recall, specificity = (row["metrics"][f"{name}_{limit}"] for name in ("recall", "specificity"))
            if recall["verdict"] == comparison.SUPPORTED and specificity["verdict"] == comparison.HARMFUL \
                    and row["metrics"]["auroc"]["verdict"] == comparison.UNCLEAR:
                texts.append(f"{row['second']} finds more malignant tiles than {row['first']} {where} (recall "
                             f"{difference(recall)}) and calls more benign tiles malignant (specificity "
                             f"{difference(specificity)}), while the ranking is not distinguishable: a shifted "
                             "threshold, not a better classifier.")
    return texts


def limits(results: dict) -> list[str]:
    """What a reader must know before quoting the numbers."""
    seeds = [len(arm["seeds"]) for arm in results["arms"].values()]
    texts = list(results["run"].get("notes") or [])
    if min(seeds) == 1:
        texts.append("At least one arm has a single training seed: a quick look, which says nothing of another run.")
    elif min(seeds) < 5:
        texts.append(f"{min(seeds)} training seeds (5 are the protocol's least for a table): the part of the intervals "
                     "that is due to training is itself uncertain.")
    if results["carriers"] < 50:
        texts.append(f"{results['malignant']} malignant test tiles: simulated at 28, the 95 % intervals of AUPRC and "
                     "pAUC hold the truth about 91 and 90 % of the time, those of AUROC and recall 94 % or more.")
    absent = [name for name in ARMS if name not in results["arms"]]
    if absent:
        texts.append(f"Not run: {_list(absent)}.")
    return [text[0].upper() + text[1:] + ("" if text.endswith(".") else ".") for text in texts]


def setting(results: dict, args: dict) -> str:
    """One paragraph: the test, the training tiles, the network."""
    people = f" of {results['patients']} patients" if results["patients"] else ""
    text = (f"Tested on {results['tiles']:,} tiles{people} never trained on, {results['malignant']} of them malignant "
            f"({results['prevalence']:.1%}: the AUPRC of chance is {results['prevalence']:.3f}).")
    if args:
        counts = args["counts"][0]
        text += (f" DS1 holds {counts['train']['benign']:,} benign and {counts['train']['malignant']} malignant tiles, "
                 f"DS2 and O1 {counts['added']} malignant ones more; {counts['val']['benign']:,} benign and "
                 f"{counts['val']['malignant']} malignant tiles serve to choose the checkpoint and the threshold. "
                 f"{args['arch']}, {'from scratch' if args['weights'] == 'none' else 'from ' + str(args['weights'])}, "
                 f"{args['image_size']} px, {args['epochs']} epochs of DS1 at {args['batch_size']} tiles a step (the "
                 f"same number of steps in every arm), AdamW at {args['lr']:g}, augmentation: {args['augmentation']}.")
        if args.get("folds"):
            text += f" Cross-fitted over {args['folds']} folds of patients; the tile counts are those of the first."
    return text


def _list(words):
    words = [word.replace("\n", " ") for word in words]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _title(name):
    return classification.METRICS[name].figure_title or classification.METRICS[name].title


# ------------------------------------------------------------------------------------ tables, figures

def _blocks(results, figures, args):
    unit = "patients" if results["patients"] else "tiles"
    method = METHOD.format(resamples=results["resamples"], unit=unit,
                           whole=", each with all its tiles" if results["patients"] else "")
    blocks = [heading("Do synthetic tiles help the classifier?"), paragraph(finding(results), lead=True),
              *map(paragraph, remarks(results)), paragraph(setting(results, args)), *map(paragraph, limits(results)),
              heading("The arms", 3), _main_table(results), _more_table(results)]
    if results["contrasts"]:
        blocks += [heading("One factor at a time", 3), _contrast_table(results), _figure("contrasts", results),
                   _mcnemar_table(results)]
    blocks += [_figure(stem, results) for stem in ("curves", "confusion", "calibration") if stem in figures]
    if results["subgroups"]:
        blocks += [heading("Subgroups", 3), _subgroup_table(results)]
    blocks += [heading("How it was computed", 3), paragraph(method)]
    if args:
        made = args["provenance"]
        blocks.append(paragraph(f"Command: {made['command']}; lesion {made['lesion']} at {made['git_commit']}, torch "
                                f"{made['torch']}; data SHA-256 {args['data_sha256'][:16]}, synthetic tiles "
                                f"{(args['synthetic_sha256'] or 'none')[:16]}."))
    return blocks


def _main_table(results):
    header = ["arm", "training tiles", "seeds", "recall at 0.5", "AUROC", f"AUPRC (chance {results['prevalence']:.3f})",
              "published recall", "AUROC", "AUPRC (chance 0.038)"]
    rows = []
    for name, arm in results["arms"].items():
        published = ARMS[name].published
        rows.append([name, ARMS[name].meaning, str(len(arm["seeds"])),
                     *(interval(arm["metrics"][key]) for key in classification.SHOWN["published"]),
                     *(map(number, published, (2, 3, 3)) if published else ["–"] * 3)])
    return table("Results with 95 % intervals, beside the published study (79 malignant of 2,079 tiles held out). AUPRC does "
                 "not compare across test sets of another share malignant.", header, rows, text=(1,))


def _more_table(results):
    rows = [[classification.METRICS[name].title, *(interval(arm["metrics"][name]) for arm in results["arms"].values())]
            for name in classification.SHOWN["further"]]
    counts = [[f"{title}: found, missed; false alarms, let pass",
               *("{tp:.1f}, {fn:.1f}; {fp:.1f}, {tn:.1f}".format(**arm["confusion"][key])
                 for arm in results["arms"].values())]
              for key, title in (("50", "counts at 0.5"), ("chosen", "counts at the chosen threshold"))]
    rows.append(["chosen threshold", *(number(arm["threshold"]) for arm in results["arms"].values())])
    return table("Further figures: means over seeds with 95 % intervals (pAUC runs from 0 to .2, chance .02; a dash: "
                 "no value, as precision where nothing is called malignant)", ["", *results["arms"]], rows + counts)


def _contrast_table(results):
    rows = []
    for row in results["contrasts"]:
        for name in classification.SHOWN["differences"]:
            cell = row["metrics"][name]
            rows.append([f"{row['first']} → {row['second']}", classification.METRICS[name].title, difference(cell),
                         p_value(cell["p"]), p_value(cell["p_holm"]), cell["verdict"]])
    return table("Differences, second arm minus first, with 95 % intervals; for Brier score and ECE less is better",
                 ["contrast", "metric", "difference", "p", "p (Holm)", "verdict"], rows, text=(1, 5))


def _mcnemar_table(results):
    rows = []
    for row in results["contrasts"]:
        for limit, where in (("50", "0.5"), ("chosen", "chosen")):
            for kind in ("malignant", "benign"):
                cell = row["mcnemar"][limit][kind]
                rows.append([f"{row['first']} → {row['second']}", kind, where,
                             *(str(cell[key]) for key in ("both", "first_only", "second_only", "neither")),
                             p_value(cell["p"])])
    return table("Test tiles decided rightly by both arms, by one, by neither (mean score over seeds; exact McNemar "
                 "test, not corrected)",
                 ["contrast", "tiles", "threshold", "both", "first only", "second only", "neither", "p"], rows,
                 text=(1, 2))


def _subgroup_table(results):
    arms = [name for name in ("A1", "W1", "S2", "O1") if name in results["arms"]] or list(results["arms"])
    rows = []
    for row in results["subgroups"]:
        cells = [_share(row["arms"][arm][name]) for name in ("recall", "specificity") for arm in arms]
        rows.append([row["attribute"], row["group"], str(row["n"]), str(row["malignant"]), *cells])
    return table(f"Recall and specificity at the chosen threshold by group (too few: under {comparison.FEW} tiles)",
                 ["by", "group", "n", "malignant", *(f"recall {arm}" for arm in arms),
                  *(f"specificity {arm}" for arm in arms)], rows, text=(1,))


def _share(row):
    return "too few" if row is None else interval(row, digits=2)


def draw(runs: dict, results: dict, shown: tuple[str, ...]) -> dict:
    """The section's figures: contrasts, curves, confusion, calibration (those for which there are arms)."""
    figures = {}
    pairs = [(row["first"], row["second"]) for row in results["contrasts"]]
    if pairs:
        titles = {name: _title(name) for name in classification.SHOWN["key"]}
        for stem, columns in (("contrasts", 3), ("narrow/contrasts", 1)):
            figures[stem] = plots.forest(results["contrasts"], titles, columns)
        bands = {arm: comparison.curve_bands(runs[arm]) for arm in dict.fromkeys(sum(pairs, ()))}
        for stem, columns in (("curves", 3), ("narrow/curves", 1)):
            figures[stem] = plots.curves([(a, bands[a], b, bands[b]) for a, b in pairs], results["prevalence"], columns)
    if shown:
        figures["confusion"] = plots.confusion({arm: results["arms"][arm]["confusion"]["chosen"] for arm in shown},
                                               "at the chosen threshold, means over seeds")
    rows = results["calibration"] = {arm: comparison.calibration(seeds) for arm, seeds in runs.items()}
    return figures | {"calibration": plots.calibration(rows), "narrow/calibration": plots.calibration(rows, columns=1)}


def _figure(stem, results):
    arms = " and ".join(dict.fromkeys(f"{row['first']} with {row['second']}" for row in results["contrasts"]))
    return figure(stem, *{
        "contrasts": ("Differences of the contrasts with 95 % intervals; filled: p < .05 after Holm's correction.",
                      "Dot-and-interval chart of the differences listed in the table above"),
        "curves": ("ROC (above) and precision-recall curves (below), means over seeds with pointwise 95 % bands; "
                   "dotted: chance.", f"ROC and precision-recall curves comparing {arms}"),
        "confusion": ("Confusion matrices: counts (means over seeds) and shares of each true class.",
                      "Confusion matrices side by side"),
        "calibration": ("Calibration of the mean score over seeds: ten bins of equal count, exact 95 % intervals; "
                        "dotted: perfect. Hollow: no malignant tile in the bin. A weighted loss and added malignant "
                        "tiles raise the scores by design.",
                        "Observed share malignant against mean score, one panel an arm"),
    }[stem])
