"""How well scores tell malignant from benign tiles: every figure of the report, for one set of weights or thousands.

One pass over the sorted scores serves the plain value (weights of one) and all bootstrap resamples at once (a row of
weights each), so both are the same arithmetic. Definitions are scikit-learn's where it has them (AUROC, average
precision, Brier); ECE follows Guo et al. 2017 (arXiv:1706.04599, eq. 3), the partial AUC the ISIC 2024 challenge.
Proven by tests/stats/test_classification.py against scikit-learn and closed vectors.
"""
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Metric:
    """What there is to know of a figure beside its value; `evaluate` computes it."""
    title: str
    figure_title: str = ""        # in a narrow figure; "" = the title
    ceiling: float = 1.0          # it lies in 0 .. ceiling
    lower_is_better: bool = False
    rate_of: str = "malignant"    # which tiles it counts: its uncertainty is over the patients who have them
    least: int | None = 28        # malignant tiles from which its interval and test hold (docs/PROTOCOL.md); None: never


METRICS = {
    "auroc": Metric("AUROC"),
    "auprc": Metric("AUPRC"),
    "recall_50": Metric("recall at 0.5"),
    "specificity_50": Metric("specificity at 0.5", rate_of="benign"),
    "precision_50": Metric("precision at 0.5"),
    "recall_chosen": Metric("recall at the chosen threshold", "recall at chosen\nthreshold"),
    "specificity_chosen": Metric("specificity at the chosen threshold", "specificity at\nchosen threshold",
                                 rate_of="benign"),
    "precision_chosen": Metric("precision at the chosen threshold"),
    "recall_spec90": Metric("recall at 90 % specificity", "recall at 90 %\nspecificity", least=50),
    "recall_spec95": Metric("recall at 95 % specificity", least=50),
    "pauc": Metric("pAUC (TPR ≥ 80 %)", ceiling=0.2, least=None),
    "brier": Metric("Brier score", lower_is_better=True),
    "ece": Metric("ECE", lower_is_better=True, least=None),
}
# Where a figure is shown, in order: beside the published study's, in the further table, among the differences, and in
# the picture and the sentences about them.
SHOWN = {
    "published": ("recall_50", "auroc", "auprc"),
    "further": ("recall_chosen", "specificity_chosen", "precision_chosen", "specificity_50", "precision_50",
                "recall_spec90", "recall_spec95", "pauc", "brier", "ece"),
    "differences": ("auroc", "auprc", "recall_50", "specificity_50", "recall_chosen", "specificity_chosen",
                    "recall_spec90", "pauc", "brier", "ece"),
    "key": ("auroc", "auprc", "recall_spec90", "recall_chosen", "specificity_chosen"),
}
ECE_BINS = 10
_ROWS = 256  # weight rows worked on at once: bounds the memory to a few arrays of 256 x n float64


def check(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`labels` [n] as int64 of 0 and 1 with both present, `scores` [n] as finite float64 in [0, 1]; else ValueError."""
    labels, scores = np.asarray(labels), np.asarray(scores, dtype=np.float64)
    if labels.ndim != 1 or labels.shape != scores.shape:
        raise ValueError(f"labels {labels.shape} and scores {scores.shape} must be two lists of the same length")
    if not np.isin(labels, (0, 1)).all():
        raise ValueError("labels must be 0 (benign) or 1 (malignant)")
    if labels.min(initial=1) == 1 or labels.max(initial=0) == 0:
        raise ValueError(f"{len(labels)} tiles of one class only: both benign and malignant tiles are needed")
    if not np.isfinite(scores).all():
        raise ValueError(f"{np.count_nonzero(~np.isfinite(scores))} scores are not finite: the model has diverged")
    if scores.min() < 0 or scores.max() > 1:
        raise ValueError(f"scores run from {scores.min():g} to {scores.max():g}: probabilities in 0..1 are needed")
    return labels.astype(np.int64), scores


def evaluate(labels: np.ndarray, scores: np.ndarray, threshold: float | np.ndarray,
             weights: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Every metric of `METRICS`, name -> [R] float64.

    labels [n] 0/1 (1 = malignant), scores [n] in [0, 1], threshold: a number or [n] (one a tile, when models of several
    folds are pooled); a tile is called malignant when score >= threshold. weights [R, n]: how often each tile counts in
    each of R resamples, both classes present in each; default one row of ones. Precision is NaN where nothing is called
    malignant: it has no value there. Raises ValueError as `check` does.
    """
    labels, scores = check(labels, scores)
    weights = np.ones((1, len(labels))) if weights is None else weights
    parts = [_evaluate(labels, scores, threshold, weights[i:i + _ROWS].astype(np.float64))
             for i in range(0, len(weights), _ROWS)]
    return {name: np.concatenate([part[name] for part in parts]) for name in METRICS}


def _evaluate(labels, scores, threshold, weights):
    _, tp, fp = _sweep(labels, scores, weights)
    malignant, benign = labels == 1, labels == 0
    called, chosen = scores >= 0.5, scores >= threshold
    bins = np.eye(ECE_BINS)[bin_of(scores)]
    columns = np.column_stack([malignant, benign, malignant & called, benign & called, malignant & chosen,
                               benign & chosen, (scores - labels) ** 2, bins * (labels - scores)[:, None]])
    sums = weights @ columns.astype(np.float64)  # one product for everything that is a weighted sum over tiles
    total = sums[:, 0] + sums[:, 1]
    return {
        **_ranking(tp, fp),
        **_rates("50", *sums[:, :2].T, *sums[:, 2:4].T),
        **_rates("chosen", *sums[:, :2].T, *sums[:, 4:6].T),
        "brier": sums[:, 6] / total,
        # n_b |accuracy_b - confidence_b| is the absolute sum of (label - score) over the bin
        "ece": np.abs(sums[:, 7:]).sum(1) / total,
    }


def _rates(suffix, malignant, benign, tp, fp):
    precision = np.divide(tp, tp + fp, out=np.full_like(tp, np.nan), where=tp + fp > 0)
    return {f"recall_{suffix}": tp / malignant, f"specificity_{suffix}": 1 - fp / benign,
            f"precision_{suffix}": precision}


def _sweep(labels, scores, weights):
    """The score [T] and the true and false positives [R, T + 1] (first column 0) as the threshold falls.

    Only thresholds at which a malignant tile has just been or is next to be called are kept: between two of them recall
    stands still, so no metric can change its value there, and with few malignant tiles T is small.
    """
    order = np.argsort(-scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=np.inf))  # equal scores are called together
    malignant = labels[order] == 1
    holds_malignant = np.add.reduceat(malignant.astype(np.int64), starts) > 0
    starts = starts[holds_malignant | np.append(True, holds_malignant[:-1])]
    ends = np.append(starts[1:], len(order)) - 1
    weights = weights[:, order]
    tp = np.cumsum(np.add.reduceat(np.where(malignant, weights, 0.0), starts, axis=1), axis=1)
    fp = np.cumsum(np.add.reduceat(np.where(malignant, 0.0, weights), starts, axis=1), axis=1)
    if not (tp[:, -1].all() and fp[:, -1].all()):
        raise ValueError("a resample holds one class only: both benign and malignant tiles are needed")
    return scores[order][ends], np.pad(tp, ((0, 0), (1, 0))), np.pad(fp, ((0, 0), (1, 0)))


def _ranking(tp, fp):
    """The metrics that need the order of the scores only."""
    recall, fpr = tp / tp[:, -1:], fp / fp[:, -1:]
    called = (tp + fp)[:, 1:]
    precision = np.divide(tp[:, 1:], called, out=np.zeros_like(called), where=called > 0)
    steps = np.diff(fpr, axis=1)
    return {
        "auroc": (steps * (recall[:, 1:] + recall[:, :-1])).sum(1) / 2,
        "auprc": (np.diff(recall, axis=1) * precision).sum(1),
        "recall_spec90": _recall_at(recall, fpr, 0.90),
        "recall_spec95": _recall_at(recall, fpr, 0.95),
        "pauc": _partial_area(recall, steps, 0.80),
    }


def _recall_at(recall, fpr, specificity):
    """The highest recall among thresholds whose specificity is at least the given one (attained, not interpolated)."""
    column = (fpr <= 1 - specificity + 1e-9).sum(1) - 1
    return np.take_along_axis(recall, column[:, None], 1)[:, 0]


def _partial_area(recall, steps, floor):
    """Area between the ROC curve (straight pieces) and TPR = floor: 0 .. 1 - floor, random (1 - floor)^2 / 2."""
    left, right = np.maximum(recall[:, :-1] - floor, 0), np.maximum(recall[:, 1:] - floor, 0)
    # a segment that crosses the floor contributes a triangle over the part of its step that lies above
    rise = np.diff(recall, axis=1)
    share = np.divide(right, rise, out=np.ones_like(rise), where=(left == 0) & (right > 0))
    return ((left + right) / 2 * steps * np.minimum(share, 1)).sum(1)


def confusion(labels: np.ndarray, scores: np.ndarray, threshold: float | np.ndarray) -> dict[str, int]:
    """Counts tp, fn, fp, tn with malignant as the positive class and score >= threshold called malignant."""
    labels, scores = check(labels, scores)
    called = scores >= threshold
    return {"tp": int((called & (labels == 1)).sum()), "fn": int((~called & (labels == 1)).sum()),
            "fp": int((called & (labels == 0)).sum()), "tn": int((~called & (labels == 0)).sum())}


def choose_threshold(labels: np.ndarray, scores: np.ndarray) -> float:
    """The score that maximises recall + specificity - 1 (Youden's J) on a validation part; of equals, the highest."""
    labels, scores = check(labels, scores)
    limits, tp, fp = _sweep(labels, scores, np.ones((1, len(labels))))
    return float(limits[np.argmax((tp / tp[:, -1:] - fp / fp[:, -1:])[0, 1:])])


def roc_curve(labels: np.ndarray, scores: np.ndarray,
              weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rates [R, T + 1], from (0, 0) to (1, 1), in straight pieces."""
    labels, scores = check(labels, scores)
    _, tp, fp = _sweep(labels, scores, np.ones((1, len(labels))) if weights is None else weights.astype(np.float64))
    return fp / fp[:, -1:], tp / tp[:, -1:]


def pr_curve(labels: np.ndarray, scores: np.ndarray,
             weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Recall and precision [R, T] as the threshold falls; precision is 1 where a resample calls nothing malignant."""
    labels, scores = check(labels, scores)
    _, tp, fp = _sweep(labels, scores, np.ones((1, len(labels))) if weights is None else weights.astype(np.float64))
    called = (tp + fp)[:, 1:]
    precision = np.divide(tp[:, 1:], called, out=np.ones_like(called), where=called > 0)
    return tp[:, 1:] / tp[:, -1:], precision


def bin_of(scores: np.ndarray, bins: int = ECE_BINS) -> np.ndarray:
    """Index of the equal-width bin ((b, b + 1] / bins, with 0 in the first) of each score in [0, 1]."""
    return np.clip(np.ceil(np.asarray(scores, dtype=np.float64) * bins).astype(np.int64) - 1, 0, bins - 1)


def reliability(labels: np.ndarray, scores: np.ndarray, bins: int = ECE_BINS) -> list[dict]:
    """Calibration by bins of equal *count*: with few malignant tiles nearly every score lies in one equal-width bin.

    One row a bin, in order of score: n, malignant, mean_score, observed (share malignant), inside ([n] bool). Equal
    scores stay together.
    """
    labels, scores = check(labels, scores)
    edges = np.unique(np.quantile(scores, np.arange(1, bins) / bins))
    index = np.searchsorted(edges, scores, side="left")
    rows = []
    for b in np.unique(index):
        inside = index == b
        rows.append({"n": int(inside.sum()), "malignant": int(labels[inside].sum()),
                     "mean_score": float(scores[inside].mean()), "observed": float(labels[inside].mean()),
                     "inside": inside})
    return rows
