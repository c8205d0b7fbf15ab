"""The classifier section of the report: what is supported, what is not, and the numbers behind it.

Every sentence is derived from the numbers of `lesion.stats.comparison.analyse`; the rules that turn a number into a
word are `comparison.verdict` and `finding`. Proven by tests/report/test_evaluate_script.py.
"""
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lesion.classify import predictions
from lesion.classify.arms import ARMS, CONTRASTS, PRIMARY
from lesion.report import plots
from lesion.report.page import difference, figure, heading, interval, number, p_value, paragraph, table
from lesion.run import files
from lesion.stats import classification, comparison, inference
from lesion.tiles.seen import tile_id

KEY = (PRIMARY, ("A1", "S2"), ("W1", "S2w"))  # which contrast the headline rests on: the first that was run
METHOD = (
    "A figure is the mean over training seeds. Its interval holds for other {unit} and other training runs alike: the "
    "variance between runs and what other {unit} would change in all of them (covariances by DeLong for differences of "
    "AUROC, by {resamples:,} bootstrap resamples stratified by class{whole} for all else) are added as Obuchowski & "
    "Rockette (1995) add readers and cases, with a t reference. With one seed it holds for that one run. The primary "
    "contrast, named beforehand, is {primary} in AUROC; its p stands as it is. All others are exploratory, their p "
    "corrected over the contrasts by Holm, metric by metric, and not between metrics. A contrast is supported or harmful "
    "where that p is below .05 and at least 3 seeds were trained, else not distinguishable. No interval and no verdict is "
    "given where, by simulation, it would not hold (docs/PROTOCOL.md): under {least} patients with malignant or benign "
    "tiles, with 2 seeds, for ECE, and for some metrics with few malignant tiles. The chosen threshold maximises recall + "
    "specificity on validation tiles.")


def build(folder: Path, data: Path | None, shown: tuple[str, str] = ("W1", "S2"),
          progress: Callable | None = None) -> tuple[list[dict], dict, dict]:
    """(blocks, results, figures: stem -> matplotlib figure) for a run folder of classify.py.

    data: the prepared set, for the subgroups (None: left out). shown: the two arms whose confusion matrices are drawn.
    ValueError if the predictions are damaged, of different tests, or of other tiles than `data`'s.
    """
    runs = predictions.read_runs(folder)
    args = read_args(folder)
    results = comparison.analyse(runs, CONTRASTS, primary=PRIMARY, progress=progress)
    results["subgroups"] = comparison.subgroups(runs, groups_of(data, runs)) if data else []
    results["run"] = {key: args.get(key) for key in ("arch", "weights", "image_size", "epochs", "batch_size", "lr",
                                                     "augmentation", "weight_power", "ratio", "max_benign", "folds",
                                                     "counts", "notes", "checked", "data_sha256", "synthetic_sha256",
                                                     "provenance")}
    figures = draw(runs, results, tuple(arm for arm in shown if arm in runs))
    return _blocks(results, figures, args), results, figures


def read_args(folder: Path) -> dict:
    """args.json of classify.py, {} where there is none. ValueError where the report would miss something in it."""
    path, args = Path(folder) / "args.json", predictions.read_args(folder)
    if not path.is_file():
        return {}
    try:
        made = args["provenance"]
        numbers = [args["lr"], *(args[name] for name in ("image_size", "epochs", "batch_size"))]
        texts = [args[name] for name in ("arch", "augmentation", "data_sha256")]
        texts += [made[name] for name in ("command", "lesion", "torch")]
        whole = all(type(one) in (int, float) for one in numbers) and all(isinstance(one, str) for one in texts) and \
            {"counts", "synthetic_sha256", "weights"} <= args.keys() and "git_commit" in made
    except (KeyError, TypeError):
        whole = False
    if not whole:
        raise ValueError(f"{path} is damaged: it does not say how the run was made; restore it")
    return args


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
    text = _judged(row, results)
    if key != PRIMARY:
        text += (f" {PRIMARY[0]}, the control for the changed class balance, was not run: a gain could come from the balance "
                 "alone, and this contrast is exploratory.")
    return text


def _judged(row, results):
    cell, runs = row["metrics"]["auroc"], len(row["seeds"])
    than = {"O1": "than repeating the real malignant tiles does", "A1": "than leaving them out",
            "W1": "than leaving them out, under a weighted loss"}[row["first"]]
    p = "p" if row["primary"] else "corrected p"
    numbers = f"(AUROC of {row['second']} minus {row['first']}: {difference(cell)}, {p} {p_value(cell['p_holm'])})"
    what = "synthetic malignant tiles rank test tiles"
    if cell["verdict"] == comparison.SUPPORTED:
        return f"Supported: {what} better {than} {numbers}."
    if cell["verdict"] == comparison.HARMFUL:
        return f"Harmful: {what} worse {than} {numbers}."
    if cell["verdict"] in (comparison.BETTER, comparison.WORSE):
        word = "better" if cell["verdict"] == comparison.BETTER else "worse"
        return (f"In this one run {what} {word} {than} {numbers}. One training run cannot support a claim about the next: "
                f"at least {inference.LEAST_RUNS} are needed.")
    numbers = f"(AUROC of {row['second']} minus {row['first']}: {difference(cell)})"
    if cell["verdict"] == comparison.TOO_FEW:
        return (f"Too few for a verdict: {_too_few(results, runs)}, so whether {what} better or worse {than} is not judged "
                f"{numbers}.")
    if cell["verdict"] == comparison.NO_VALUE:
        return (f"Cannot be computed: the scores leave no error to judge by, as where an arm's scores never vary or rank the "
                f"test tiles perfectly, or both arms rank them alike; whether {what} better {than} is open {numbers}.")
    text = (f"Not distinguishable: {'this one run does' if runs == 1 else 'these runs do'} not show that {what} better or "
            f"worse {than} {numbers[:-1]}, {p} {p_value(cell['p_holm'])}).")
    if row["detectable_auroc"]:
        again = "one training run" if runs == 1 else f"{runs} training runs"
        text += (f" With {results['malignant']} malignant test tiles and {again} only a difference of about "
                 f"{row['detectable_auroc']:.2f} or more would be found four times in five.")
    return text


def _too_few(results, runs):
    least = inference.LEAST_PATIENTS
    for what, count in (("malignant", results["carriers"]), ("benign", results["healthy"])):
        if count < least:
            return (f"test tiles that are {what} come from {count} {'patient' if count == 1 else 'patients'} and at least "
                    f"{least} are needed")
    least = classification.METRICS["auroc"].least
    if results["malignant"] < least:
        return f"there are {results['malignant']} malignant test tiles and at least {least} are needed"
    return f"{runs} training runs tell too little of the next ones (one run is judged as it is, else at least " \
           f"{inference.LEAST_RUNS} are needed)"


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
            if recall["verdict"] == comparison.SHIFTED:
                more, less = ("more", "more") if recall["difference"] > 0 else ("fewer", "fewer")
                texts.append(f"{row['second']} finds {more} malignant tiles than {row['first']} {where} (recall "
                             f"{difference(recall)}) and calls {less} benign tiles malignant (specificity "
                             f"{difference(specificity)}), while the ranking is not distinguishable: a shifted "
                             f"threshold, not a {'better' if recall['difference'] > 0 else 'worse'} classifier.")
    return texts


def limits(results: dict) -> list[str]:
    """What a reader must know before quoting the numbers."""
    seeds = [len(arm["seeds"]) for arm in results["arms"].values()]
    texts = list(results["run"].get("notes") or [])
    if min(seeds) == 1:
        texts.append("At least one arm has a single training seed: a quick look, which says nothing of another run.")
    elif min(seeds) < inference.LEAST_RUNS:
        texts.append(f"{min(seeds)} training seeds are too few for an interval over runs (at least {inference.LEAST_RUNS} "
                     "are needed): only the numbers are given.")
    elif min(seeds) < 5:
        texts.append(f"{min(seeds)} training seeds (5 are the protocol's least for a table): the part of the intervals "
                     "that is due to training is itself uncertain.")
    if not results["enough"]:
        texts.append(f"{_too_few(results, 1)} for an interval or a verdict: only the numbers are given.")
    else:
        without = [metric.title for metric in classification.METRICS.values()
                   if metric.least and results["malignant"] < metric.least]
        if without:
            texts.append(f"{results['malignant']} malignant test tiles: no interval is given for {_list(without)}, which "
                         "simulated at such numbers does not hold the truth 93 to 97 % of the time.")
    texts.append("ECE and pAUC have no interval: ECE's estimate is too high by an amount that no resampling tells, and pAUC's "
                 "interval, simulated, holds the truth less often than it says.")
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
            unit = "patients" if results["patients"] else "tiles, near copies together"
            text += (f" Cross-fitted over {args['folds']} folds of {unit}; the tile counts are those of the first. AUROC is made "
                     "within each fold, whose models share no scale, and averaged by malignant tiles.")
    return text


def _list(words):
    words = [word.replace("\n", " ") for word in words]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _title(name):
    return classification.METRICS[name].figure_title or classification.METRICS[name].title


# ------------------------------------------------------------------------------------ tables, figures

def _blocks(results, figures, args):
    unit = "patients" if results["patients"] else "tiles"
    method = METHOD.format(resamples=results["resamples"], unit=unit, primary=" → ".join(PRIMARY),
                           least=inference.LEAST_PATIENTS,
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
              "published recall", "published AUROC", "published AUPRC (chance 0.038)"]
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
            title = classification.METRICS[name].title
            if row["primary"] and name == comparison.PRIMARY_METRIC:
                title += " (primary)"
            rows.append([f"{row['first']} → {row['second']}", title, difference(cell),
                         p_value(cell["p"]), p_value(cell["p_holm"]), cell["verdict"]])
    return table("Differences, second arm minus first, with 95 % intervals; for Brier score and ECE less is better. The "
                 "primary test is not corrected, the others are exploratory",
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
                 "test, not corrected, which takes tiles for independent and these seeds as they are)",
                 ["contrast", "tiles", "threshold", "both", "first only", "second only", "neither", "p"], rows,
                 text=(1, 2))


def _subgroup_table(results):
    arms = [name for name in ("A1", "W1", "S2", "O1") if name in results["arms"]] or list(results["arms"])
    rows = []
    for row in results["subgroups"]:
        cells = [_share(row["arms"][arm][name]) for name in ("recall", "specificity") for arm in arms]
        rows.append([row["attribute"], row["group"], str(row["n"]), str(row["malignant"]), *cells])
    return table(f"Recall and specificity at the chosen threshold by group , with 95 % intervals "
                 f"over patients (too few: under {comparison.FEW} patients)",
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
        "contrasts": ("Differences of the contrasts with 95 % intervals; filled: supported or harmful.",
                      "Dot-and-interval chart of the differences listed in the table above"),
        "curves": ("ROC (above) and precision-recall curves (below), means over seeds with pointwise 95 % bands; "
                   "dotted: chance.", f"ROC and precision-recall curves comparing {arms}"),
        "confusion": ("Confusion matrices: counts (means over seeds) and shares of each true class.",
                      "Confusion matrices side by side"),
        "calibration": ("Calibration of the mean score over seeds: ten bins of equal count, 95 % intervals over patients; "
                        "dotted: perfect. Hollow: no malignant tile in the bin. A weighted loss and added malignant "
                        "tiles raise the scores by design.",
                        "Observed share malignant against mean score, one panel an arm"),
    }[stem])
