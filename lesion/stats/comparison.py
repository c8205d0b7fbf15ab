"""Arms of an experiment compared on the same test tiles: intervals, one-factor contrasts, verdicts, subgroups, curves.

What is pooled and what is resampled: a figure of an arm is the mean over its training seeds; its uncertainty has two
parts, other patients (bootstrap over patients) and another training run (bootstrap over seeds), drawn together, the
same draws for all arms. AUROC differences are tested by DeLong's test with both parts. Holm's correction runs over the
contrasts, metric by metric. Proven by tests/stats/test_comparison.py.
"""
import numpy as np

from lesion.stats import classification, inference

ALPHA = 0.05
FEW = 10  # a rate over fewer tiles is not shown
POWER_REACH = 2.80  # 1.96 + 0.84: standard errors of a difference found in 80 % of repetitions at p < .05
SUPPORTED, HARMFUL, UNCLEAR, NO_VALUE = "supported", "harmful", "not distinguishable", "no value"


def analyse(runs: dict, contrasts: dict, resamples: int = inference.RESAMPLES, seed: int = 0, progress=None) -> dict:
    """Figures of every arm and every contrast, as JSON-able numbers.

    runs: arm -> seed -> an object with labels [n] 0/1, scores [n], thresholds [n], patients [n] or None, tested on the
    same tiles throughout (`lesion.classify.predictions.read_runs`). contrasts: (first, second) -> meaning; those whose arms have
    a seed in common are made, over the seeds in common. progress: wraps the iterator over the arms, as tqdm does.
    """
    first = next(iter(next(iter(runs.values())).values()))
    labels, patients = first.labels, first.patients
    weights = inference.patient_resamples(labels, patients, resamples, seed)
    units = np.arange(len(labels)) if patients is None else patients
    carriers, healthy = (len(np.unique(units[labels == value])) for value in (1, 0))
    drawn = {arm: {k: inference.bootstrap(labels, [run.scores], [run.thresholds], weights) for k, run in seeds.items()}
             for arm, seeds in (progress(runs.items(), desc="bootstrap", unit="arm") if progress else runs.items())}
    pairs = [(pair, sorted(runs[pair[0]].keys() & runs[pair[1]].keys())) for pair in contrasts
             if pair[0] in runs and pair[1] in runs]
    rows = [_contrast(runs, drawn, pair, common, carriers, resamples, seed) | {"meaning": contrasts[pair]}
            for pair, common in pairs if common]
    _adjust(rows)
    return {"tiles": len(labels), "malignant": int(labels.sum()), "prevalence": float(labels.mean()),
            "patients": None if patients is None else int(len(np.unique(patients))), "carriers": carriers,
            "resamples": resamples, "contrasts": rows,
            "arms": {arm: _arm(runs[arm], drawn[arm], carriers, healthy, resamples, seed) for arm in runs}}


def _arm(seeds, drawn, carriers, healthy, resamples, seed):
    weights = inference.seed_resamples(len(seeds), resamples, seed)
    plain = [classification.evaluate(run.labels, run.scores, run.thresholds) for run in seeds.values()]
    metrics = {}
    for name, metric in classification.METRICS.items():
        values = np.array([value[name][0] for value in plain])
        distribution = inference.mean_over_seeds(np.concatenate([drawn[k][name] for k in seeds]), weights)
        mean, rate_of = values.mean(), healthy if metric.rate_of == "benign" else carriers
        low, high = inference.interval(mean, distribution, carriers, metric.ceiling, rate_of) or (None, None)
        metrics[name] = {"mean": _number(mean), "low": low, "high": high, "per_seed": [*map(_number, values)]}
    counts = {name: _mean_counts([classification.confusion(run.labels, run.scores, run.thresholds if chosen else 0.5)
                                  for run in seeds.values()]) for name, chosen in (("50", False), ("chosen", True))}
    return {"seeds": list(seeds), "metrics": metrics, "confusion": counts,
            "threshold": float(np.mean([run.thresholds.mean() for run in seeds.values()]))}


def _mean_counts(counts):
    return {key: float(np.mean([count[key] for count in counts])) for key in counts[0]}


def _contrast(runs, drawn, pair, common, carriers, resamples, seed):
    one, two = ([runs[arm][k] for k in common] for arm in pair)
    weights = inference.seed_resamples(len(common), resamples, seed)
    values = [[classification.evaluate(run.labels, run.scores, run.thresholds) for run in side] for side in (one, two)]
    metrics = {}
    for name in classification.METRICS:
        per_seed = [float(b[name][0] - a[name][0]) for a, b in zip(*values)]
        distribution = inference.mean_over_seeds(
            np.concatenate([drawn[pair[1]][k][name] - drawn[pair[0]][k][name] for k in common]), weights)
        low, high = inference.difference_interval(distribution, carriers) or (None, None)
        metrics[name] = {"difference": _number(np.mean(per_seed)), "low": low, "high": high,
                         "p": inference.p_value(distribution, carriers), "per_seed": [*map(_number, per_seed)],
                         "test": "bootstrap"}
    delong = inference.delong_test(one[0].labels, *(np.stack([run.scores for run in side]) for side in (one, two)),
                                   patients=one[0].patients)
    metrics["auroc"] |= {key: delong[key] for key in ("difference", "low", "high", "p", "se", "df")}
    metrics["auroc"]["test"] = "DeLong"
    return {"first": pair[0], "second": pair[1], "seeds": common, "metrics": metrics,
            "detectable_auroc": POWER_REACH * delong["se"], "mcnemar": _mcnemar(one, two)}


def _mcnemar(one, two):
    """McNemar's table on malignant and on benign tiles, for decisions by the mean score over seeds at 0.5 and at the
    mean chosen threshold: one decision a tile, as the test needs."""
    labels, out = one[0].labels, {}
    for name in ("50", "chosen"):
        right = []
        for side in (one, two):
            limit = 0.5 if name == "50" else np.mean([run.thresholds for run in side], axis=0)
            right.append((np.mean([run.scores for run in side], axis=0) >= limit) == (labels == 1))
        out[name] = {kind: inference.mcnemar(right[0][labels == value], right[1][labels == value])
                     for kind, value in (("malignant", 1), ("benign", 0))}
    return out


def _adjust(rows):
    """Holm over the contrasts for each metric, and the verdict."""
    for name, metric in classification.METRICS.items():
        cells = [row["metrics"][name] for row in rows]
        tested = [cell for cell in cells if cell["p"] is not None]
        for cell, p in zip(tested, inference.holm([cell["p"] for cell in tested])):
            cell["p_holm"] = p
        for cell in cells:
            cell.setdefault("p_holm", None)
            cell["verdict"] = verdict(cell["difference"], cell["p_holm"], metric.lower_is_better)


def verdict(difference: float | None, p_holm: float | None, lower_is_better: bool = False) -> str:
    """"supported" if the second arm is better with adjusted p < .05, "harmful" if worse, else "not distinguishable"."""
    if difference is None or p_holm is None:
        return NO_VALUE
    if p_holm >= ALPHA or difference == 0:
        return UNCLEAR
    return SUPPORTED if (difference > 0) != lower_is_better else HARMFUL


def _number(value):
    """A float for JSON; None where there is no value (NaN is not JSON)."""
    return None if np.isnan(value) else float(value)


# -------------------------------------------------------------------------------------------- subgroups

def subgroups(runs: dict, groups: dict[str, np.ndarray]) -> list[dict]:
    """Recall and specificity at the chosen threshold, and AUROC, of every arm within groups of test tiles.

    groups: attribute -> [n] group names ("" = not known) in the order of the runs' ids. One row a group with tiles: n,
    malignant, and per arm the mean over seeds with exact binomial intervals; None where fewer than FEW tiles carry it.
    """
    first = next(iter(next(iter(runs.values())).values()))
    rows = []
    for attribute, names in groups.items():
        for name in dict.fromkeys(sorted(names, key=str)):
            inside = names == name
            malignant, benign = inside & (first.labels == 1), inside & (first.labels == 0)
            rows.append({"attribute": attribute, "group": str(name) or "not known", "n": int(inside.sum()),
                         "malignant": int(malignant.sum()),
                         "arms": {arm: {"recall": _rate(seeds, malignant, True),
                                        "specificity": _rate(seeds, benign, False),
                                        "auroc": _auroc(seeds, inside, malignant, benign)}
                                  for arm, seeds in runs.items()}})
    return rows


def _rate(seeds, where, called):
    if where.sum() < FEW:
        return None
    share = np.mean([((run.scores >= run.thresholds) == called)[where].mean() for run in seeds.values()])
    low, high = inference.clopper_pearson(share * where.sum(), where.sum())
    return {"mean": float(share), "low": low, "high": high}


def _auroc(seeds, inside, malignant, benign):
    if min(malignant.sum(), benign.sum()) < FEW:
        return None
    return float(np.mean([classification.evaluate(run.labels[inside], run.scores[inside], 0.5)["auroc"][0]
                          for run in seeds.values()]))


# ----------------------------------------------------------------------------------------------- curves

def curve_bands(seeds: dict, resamples: int = 300, seed: int = 0, points: int = 201) -> dict:
    """ROC and PR curves of an arm, averaged over its seeds, with pointwise 95 % bands over patients and seeds.

    Returns {"roc": (fpr, tpr, low, high), "pr": (recall, precision, low, high)}, each [points]: at each false positive
    rate the mean recall, at each recall the mean of the best precision that still attains it.
    """
    first = next(iter(seeds.values()))
    grid = np.linspace(0, 1, points)
    weights = inference.patient_resamples(first.labels, first.patients, resamples, seed)
    over = inference.seed_resamples(len(seeds), resamples, seed)
    out = {}
    for name, draw in (("roc", _roc_on), ("pr", _pr_on)):
        middle = np.mean([draw(run, None, grid)[0] for run in seeds.values()], axis=0)
        bands = np.einsum("srp,rs->rp", np.stack([draw(run, weights, grid) for run in seeds.values()]), over)
        out[name] = (grid, middle, *np.quantile(bands, [0.025, 0.975], axis=0))
    return out


def _roc_on(run, weights, grid):
    """True positive rate [R, points] at each false positive rate (straight between points)."""
    fpr, tpr = classification.roc_curve(run.labels, run.scores, weights)
    return np.stack([np.interp(grid, f, t) for f, t in zip(fpr, tpr)])


def _pr_on(run, weights, grid):
    """Highest precision [R, points] of the thresholds whose recall is at least each of the grid."""
    recall, precision = classification.pr_curve(run.labels, run.scores, weights)
    best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    return np.stack([b[np.minimum(np.searchsorted(r, grid - 1e-12), len(r) - 1)] for r, b in zip(recall, best)])
