"""Arms of an experiment compared on the same test tiles: intervals, one-factor contrasts, verdicts, subgroups, curves.

What is pooled and what is resampled: a figure of an arm is the mean over its training runs (seeds); its uncertainty has
two parts, other patients and another training run, put together by `inference.over_runs`. The covariance over patients
is DeLong's for differences of AUROC, for all else that of a bootstrap over patients, the same draws for all arms. Holm's
correction runs over the contrasts, metric by metric; the primary contrast, named beforehand, stands alone.
Nothing is decided, and no interval given, where the simulation (docs/PROTOCOL.md) shows that it would not hold.
Proven by tests/stats/test_comparison.py.
"""
import numpy as np

from lesion.stats import classification, inference

ALPHA = 0.05
FEW = 10  # a rate over fewer tiles or patients is not shown
PRIMARY_METRIC = "auroc"
SUPPORTED, HARMFUL, UNCLEAR = "supported", "harmful", "not distinguishable"
BETTER, WORSE = "better in this one run", "worse in this one run"
NO_VALUE, TOO_FEW = "cannot be computed", "no verdict"
SHIFTED = "shifted threshold"


def analyse(runs: dict, contrasts: dict, resamples: int = inference.RESAMPLES, seed: int = 0,
            primary: tuple[str, str] | None = None, everywhere: bool = False, progress=None) -> dict:
    """Figures of every arm and every contrast, as JSON-able numbers.

    runs: arm -> seed -> an object with labels [n] 0/1, scores [n], thresholds [n], patients [n] or None, folds [n] or None
    (cross-fitted: AUROC is then made within folds, everything else over all tiles at each fold's threshold), tested on the
    same tiles throughout (`lesion.classify.predictions.read_runs`). contrasts: (first, second) -> meaning; those whose
    arms have a seed in common are made, over the seeds in common. primary: the contrast named beforehand, whose AUROC is
    tested as it is; all other tests are exploratory and corrected by Holm. everywhere: also give the intervals that do
    not hold (`Metric.least`), for the simulation that shows it. progress: wraps the iterator over the arms, as tqdm does.
    """
    test = _Test(next(iter(next(iter(runs.values())).values())), resamples, seed, everywhere)
    drawn = {arm: {k: inference.bootstrap(test.labels, [run.scores], [run.thresholds], test.weights)
                   for k, run in seeds.items()}
             for arm, seeds in (progress(runs.items(), desc="bootstrap", unit="arm") if progress else runs.items())}
    pairs = [(pair, sorted(runs[pair[0]].keys() & runs[pair[1]].keys())) for pair in contrasts
             if pair[0] in runs and pair[1] in runs]
    rows = [_contrast(runs, drawn, pair, common, test) | {"meaning": contrasts[pair], "primary": pair == primary}
            for pair, common in pairs if common]
    _adjust(rows)
    return {"tiles": len(test.labels), "malignant": int(test.labels.sum()), "prevalence": float(test.labels.mean()),
            "patients": test.patients, "carriers": test.carriers, "healthy": test.healthy,
            "enough": test.judges(classification.METRICS["auroc"], 1), "resamples": resamples,
            "contrasts": rows, "arms": {arm: _arm(runs[arm], drawn[arm], test) for arm in runs}}


class _Test:
    """The test tiles: labels, how many patients carry malignant and benign ones, and the resamples of patients."""

    def __init__(self, run, resamples, seed, everywhere=False):
        self.labels, self.everywhere, self.folds = run.labels, everywhere, getattr(run, "folds", None)
        self.weights = inference.patient_resamples(run.labels, run.patients, resamples, seed)
        units = np.arange(len(run.labels)) if run.patients is None else run.patients
        self.patients = None if run.patients is None else len(np.unique(units))
        self.carriers, self.healthy = (len(np.unique(units[run.labels == value])) for value in (1, 0))
        masks = inference.folds_of(self.labels, self.folds)[0]
        self.fewest = [min(len(np.unique(units[mask & (run.labels == value)])) for mask in masks) for value in (1, 0)]

    def parts(self, metric: classification.Metric, values: list, drawn: np.ndarray) -> inference.Parts | None:
        """Parts of the variance of the mean of `values` [S] by their resamples [S, R]; None where there is no value or
        where no interval may be given."""
        if not self.judges(metric, len(values)) or np.isnan(values).any():
            return None
        units = self.units(metric)
        covariance = inference.resampled_covariance(drawn, units)
        return None if covariance is None else inference.over_runs(values, covariance, np.asarray(units - 1.0))

    def judges(self, metric: classification.Metric, runs: int) -> bool:
        """Whether the metric may have an interval here: enough patients, runs and malignant tiles."""
        holds = self.everywhere or (metric.least is not None and self.labels.sum() >= metric.least)
        fewest = self.fewest if metric is classification.METRICS["auroc"] else (self.carriers, self.healthy)
        return bool(holds) and inference.enough(*fewest, runs)

    def auroc(self, runs: list) -> tuple[list, inference.Parts | None]:
        """(AUROC of each run within folds, parts of their mean's variance or None) of runs on cross-fitted tiles."""
        if self.judges(classification.METRICS["auroc"], len(runs)):
            values, parts = inference.auroc_over_runs(self.labels, np.stack([run.scores for run in runs]), runs[0].patients, self.folds)
            return values.tolist(), parts
        masks, weights = inference.folds_of(self.labels, self.folds)
        return [float(sum(weight * classification.evaluate(run.labels[mask], run.scores[mask], 0.5)["auroc"][0]
                          for mask, weight in zip(masks, weights))) for run in runs], None

    def units(self, metric: classification.Metric) -> int:
        """How many patients the metric is a rate of."""
        return self.healthy if metric.rate_of == "benign" else self.carriers


def _arm(seeds, drawn, test):
    plain = [classification.evaluate(run.labels, run.scores, run.thresholds) for run in seeds.values()]
    metrics = {}
    for name, metric in classification.METRICS.items():
        values = [float(value[name][0]) for value in plain]
        parts = test.parts(metric, values, np.concatenate([drawn[k][name] for k in seeds]))
        if name == "auroc" and test.folds is not None:
            values, parts = test.auroc(list(seeds.values()))
        mean, found = float(np.mean(values)), None
        if parts is not None:
            found = inference.interval(mean, parts, test.units(metric), metric.ceiling)
        low, high = found or (None, None)
        metrics[name] = {"mean": _number(mean), "low": low, "high": high, "per_seed": [*map(_number, values)]}
    counts = {name: _mean_counts([classification.confusion(run.labels, run.scores, run.thresholds if chosen else 0.5)
                                  for run in seeds.values()]) for name, chosen in (("50", False), ("chosen", True))}
    return {"seeds": list(seeds), "metrics": metrics, "confusion": counts,
            "threshold": float(np.mean([run.thresholds.mean() for run in seeds.values()]))}


def _mean_counts(counts):
    return {key: float(np.mean([count[key] for count in counts])) for key in counts[0]}


def _contrast(runs, drawn, pair, common, test):
    one, two = ([runs[arm][k] for k in common] for arm in pair)
    values = [[classification.evaluate(run.labels, run.scores, run.thresholds) for run in side] for side in (one, two)]
    metrics = {}
    for name, metric in classification.METRICS.items():
        per_seed = [float(b[name][0] - a[name][0]) for a, b in zip(*values)]
        if name == "auroc" and test.folds is not None:
            per_seed = np.subtract(test.auroc(two)[0], test.auroc(one)[0]).tolist()
        parts = test.parts(metric, per_seed,
                           np.concatenate([drawn[pair[1]][k][name] - drawn[pair[0]][k][name] for k in common]))
        metrics[name] = {"difference": _number(np.mean(per_seed)), "low": None, "high": None, "p": None,
                         "per_seed": [*map(_number, per_seed)], "test": "bootstrap", "too_few": parts is None}
        if parts is not None:
            difference = float(np.mean(per_seed))
            low, high = inference.difference_interval(difference, parts, metric.ceiling) or (None, None)
            metrics[name] |= {"low": low, "high": high, "p": inference.two_sided_p(difference, parts)}
    parts = None
    if test.judges(classification.METRICS["auroc"], len(common)):
        delong = inference.delong_test(test.labels, *(np.stack([run.scores for run in side]) for side in (one, two)),
                                       patients=one[0].patients, folds=test.folds)
        parts = delong["parts"]
        metrics["auroc"] |= {key: delong[key] for key in ("difference", "low", "high", "p", "se", "df")}
        metrics["auroc"] |= {"test": "DeLong", "too_few": False}
    return {"first": pair[0], "second": pair[1], "seeds": common, "metrics": metrics, "parts": parts,
            "mcnemar": _mcnemar(one, two)}


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
    """Holm over the contrasts for each metric (the primary one aside), the verdicts, and what could have been found."""
    for name, metric in classification.METRICS.items():
        family = [row for row in rows if row["metrics"][name]["p"] is not None
                  and not (row["primary"] and name == PRIMARY_METRIC)]
        adjusted = inference.holm([row["metrics"][name]["p"] for row in family])
        for row in rows:
            cell = row["metrics"][name]
            cell["p_holm"] = cell["p"]
        for row, p in zip(family, adjusted, strict=True):
            row["metrics"][name]["p_holm"] = p
        for row in rows:
            cell = row["metrics"][name]
            cell["verdict"] = TOO_FEW if cell.pop("too_few") and cell["difference"] is not None else \
                verdict(cell["difference"], cell["p_holm"], metric.lower_is_better, len(row["seeds"]))
        if name == PRIMARY_METRIC:
            for row in rows:
                parts, tests = row.pop("parts"), 1 if row["primary"] else max(len(family), 1)
                row["detectable_auroc"] = None if parts is None else inference.detectable(parts, ALPHA / tests)
    for row in rows:
        _call_shifts(row["metrics"])


def _call_shifts(metrics):
    """Recall gained for specificity, or the reverse, where the ranking is not distinguishable: neither better nor worse."""
    if metrics["auroc"]["verdict"] != UNCLEAR:
        return
    better, worse = (SUPPORTED, BETTER), (HARMFUL, WORSE)
    for suffix in ("50", "chosen"):
        cells = [metrics[f"{name}_{suffix}"] for name in ("recall", "specificity")]
        said = [cell["verdict"] for cell in cells]
        if any(said[i] in better and said[1 - i] in worse for i in (0, 1)):
            for cell in cells:
                cell["verdict"] = SHIFTED


def verdict(difference: float | None, p_holm: float | None, lower_is_better: bool = False, runs: int = 3) -> str:
    """"supported" if the second arm is better with adjusted p < .05, "harmful" if worse, else "not distinguishable".

    One run supports nothing about another: there it is "better" or "worse in this one run". "cannot be computed"
    without a difference or a p (no value, or no error to judge by).
    """
    if difference is None or p_holm is None:
        return NO_VALUE
    if p_holm >= ALPHA or difference == 0:
        return UNCLEAR
    if (difference > 0) != lower_is_better:
        return SUPPORTED if runs >= inference.LEAST_RUNS else BETTER
    return HARMFUL if runs >= inference.LEAST_RUNS else WORSE


def _number(value):
    """A float for JSON; None where there is no value (NaN is not JSON)."""
    return None if np.isnan(value) else float(value)


# ------------------------------------------------------------------------------------ subgroups, calibration

def subgroups(runs: dict, groups: dict[str, np.ndarray]) -> list[dict]:
    """Recall and specificity at the chosen threshold, and AUROC, of every arm within groups of test tiles.

    groups: attribute -> [n] group names ("" = not known) in the order of the runs' ids. One row a group with tiles: n,
    malignant, and per arm the mean over seeds with intervals over patients (`inference.rate_over_patients`); None where
    fewer than FEW tiles, or tiles of fewer than FEW patients, carry it.
    """
    first = next(iter(next(iter(runs.values())).values()))
    units = _units(first)
    rows = []
    for attribute, names in groups.items():
        for name in dict.fromkeys(sorted(names, key=str)):
            inside = names == name
            malignant, benign = inside & (first.labels == 1), inside & (first.labels == 0)
            rows.append({"attribute": attribute, "group": str(name) or "not known", "n": int(inside.sum()),
                         "malignant": int(malignant.sum()), "patients": len(np.unique(units[inside])),
                         "arms": {arm: {"recall": _rate(seeds, malignant, True),
                                        "specificity": _rate(seeds, benign, False),
                                        "auroc": _auroc(seeds, inside, malignant, benign)}
                                  for arm, seeds in runs.items()}})
    return rows


def _units(run):
    return np.arange(len(run.labels)) if run.patients is None else run.patients


def _rate(seeds, where, called):
    first = next(iter(seeds.values()))
    units = _units(first)[where]
    if len(np.unique(units)) < FEW:
        return None
    hits = np.stack([((run.scores >= run.thresholds) == called)[where] for run in seeds.values()])
    return dict(zip(("mean", "low", "high"), inference.rate_over_patients(hits, units), strict=True))


def _auroc(seeds, inside, malignant, benign):
    if min(malignant.sum(), benign.sum()) < FEW:
        return None
    return float(np.mean([classification.evaluate(run.labels[inside], run.scores[inside], 0.5)["auroc"][0]
                          for run in seeds.values()]))


def calibration(seeds: dict) -> list[dict]:
    """Rows of `classification.reliability` of the mean score over seeds, with low and high, the 95 % interval over
    patients of the observed share (None with too few)."""
    first = next(iter(seeds.values()))
    rows = classification.reliability(first.labels, np.mean([run.scores for run in seeds.values()], axis=0))
    for row in rows:
        inside = row.pop("inside")
        _, row["low"], row["high"] = inference.rate_over_patients(first.labels[inside] == 1, _units(first)[inside])
    return rows


# ----------------------------------------------------------------------------------------------- curves

def curve_bands(seeds: dict, resamples: int = 300, seed: int = 0, points: int = 201) -> dict:
    """ROC and PR curves of an arm, averaged over its seeds, with pointwise 95 % bands for other patients and runs.

    Returns {"roc": (fpr, tpr, low, high), "pr": (recall, precision, low, high)}, each [points]: at each false positive
    rate the mean recall, at each recall the mean of the best precision that still attains it. The band is NaN where no
    interval may be given (`inference.enough`).
    """
    test = _Test(next(iter(seeds.values())), resamples, seed)
    grid = np.linspace(0, 1, points)
    out = {}
    for name, draw in (("roc", _roc_on), ("pr", _pr_on)):
        values = np.stack([draw(run, None, grid)[0] for run in seeds.values()])
        middle, half = values.mean(0), np.full(points, np.nan)
        if inference.enough(test.carriers, test.healthy, len(seeds)):
            drawn = np.stack([draw(run, test.weights, grid) for run in seeds.values()])
            covariance = inference.resampled_covariance(drawn, test.carriers)
            parts = inference.over_runs(values, covariance, np.full(points, test.carriers - 1.0))
            half = inference.critical(parts) * np.sqrt(sum(variance for variance, _ in parts))
        out[name] = (grid, middle, np.clip(middle - half, 0, 1), np.clip(middle + half, 0, 1))
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
