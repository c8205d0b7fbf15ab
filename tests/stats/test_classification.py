"""lesion.stats.classification against scikit-learn and the closed vectors of the protocol."""
import numpy as np
import pytest
from sklearn import metrics as sk

from lesion.stats import classification

LABELS = np.array([0, 0, 0, 0, 0, 1, 1, 1, 1, 1])
SCORES = np.array([.1, .4, .35, .8, .2, .9, .7, .3, .6, .85])


def draw(seed, n=300, ties=False):
    rng = np.random.default_rng(seed)
    labels = (rng.random(n) < 0.2).astype(int)
    scores = 1 / (1 + np.exp(1 - rng.normal(size=n) - 1.2 * labels))
    return labels, np.round(scores, 1) if ties else scores, rng.integers(0, 4, n)


def reference(labels, scores, threshold, weights):
    """The same metrics from scikit-learn's functions, one call each."""
    fpr, tpr, _ = sk.roc_curve(labels, scores, sample_weight=weights, drop_intermediate=False)
    scaled = sk.roc_auc_score(1 - labels, 1 - scores, max_fpr=0.2, sample_weight=weights)  # the challenge's own recipe
    low, high = 0.5 * 0.2 ** 2, 0.2
    out = {"auroc": sk.roc_auc_score(labels, scores, sample_weight=weights),
           "auprc": sk.average_precision_score(labels, scores, sample_weight=weights),
           "recall_spec90": tpr[fpr <= 0.1 + 1e-9].max(), "recall_spec95": tpr[fpr <= 0.05 + 1e-9].max(),
           "pauc": low + (high - low) * (scaled - 0.5) / 0.5,
           "brier": sk.brier_score_loss(labels, scores, sample_weight=weights)}
    for suffix, limit in (("50", 0.5), ("chosen", threshold)):
        called = scores >= limit
        out[f"recall_{suffix}"] = sk.recall_score(labels, called, sample_weight=weights)
        out[f"specificity_{suffix}"] = sk.recall_score(labels, called, sample_weight=weights, pos_label=0)
        out[f"precision_{suffix}"] = sk.precision_score(labels, called, sample_weight=weights)
    return out


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_equals_scikit_learn(seed, ties):
    """Every metric scikit-learn has, with and without equal scores, plain and under a bootstrap resample's weights."""
    labels, scores, weights = draw(seed, ties=ties)
    plain = classification.evaluate(labels, scores, 0.3)
    both = classification.evaluate(labels, scores, 0.3, np.stack([np.ones(len(labels)), weights]))
    for row, w in enumerate((None, weights)):
        for name, value in reference(labels, scores, 0.3, w).items():
            assert both[name][row] == pytest.approx(value, abs=1e-12), name
    assert all(plain[name][0] == pytest.approx(both[name][0], abs=1e-15) for name in classification.METRICS)


def test_weights_equal_repetition():
    """A tile of weight 3 counts as three tiles, in every metric (ECE has no scikit-learn reference for weights)."""
    labels, scores, weights = draw(9, n=60)
    weighted = classification.evaluate(labels, scores, 0.3, weights[None])
    repeated = classification.evaluate(np.repeat(labels, weights), np.repeat(scores, weights), 0.3)
    assert {n: v[0] for n, v in weighted.items()} == pytest.approx({n: v[0] for n, v in repeated.items()}, abs=1e-12)


def test_partial_auc_vector():
    """pAUC .08 and AUROC .80 on the protocol's vector; .2 for a perfect, .02 for an uninformative score."""
    value = classification.evaluate(LABELS, SCORES, 0.5)
    assert value["pauc"][0] == pytest.approx(0.08, abs=1e-12)
    assert value["auroc"][0] == pytest.approx(0.80, abs=1e-12)
    assert classification.evaluate(LABELS, LABELS.astype(float), 0.5)["pauc"][0] == pytest.approx(0.2)
    assert classification.evaluate(LABELS, np.full(10, 0.3), 0.5)["pauc"][0] == pytest.approx(0.02)


def test_ece_vector():
    """ECE by hand: bins (0, .1] and (.9, 1] hold two tiles each, gaps |0 - .075| and |.5 - .95|; mean .2625."""
    value = classification.evaluate(np.array([0, 0, 0, 1]), np.array([0.1, 0.05, 0.95, 0.95]), 0.5)
    assert value["ece"][0] == pytest.approx((2 * 0.075 + 2 * 0.45) / 4, abs=1e-12)
    assert classification.bin_of(np.array([0.0, 0.1, 0.1000001, 1.0])).tolist() == [0, 0, 1, 9]


def test_ece_of_bins_that_lean_both_ways():
    """Too sure in one bin, not sure enough in the other: |.5 - .95| and |.5 - .05|, which do not cancel."""
    value = classification.evaluate(np.array([0, 1, 0, 1]), np.array([0.05, 0.05, 0.95, 0.95]), 0.5)
    assert value["ece"][0] == pytest.approx(0.45, abs=1e-12)


def test_calibrated_scores_have_small_ece():
    """Labels drawn with the score as probability: ECE near 0, and near .2 when the scores are shifted by .2."""
    rng = np.random.default_rng(0)
    scores = rng.random(20000) * 0.7
    labels = (rng.random(20000) < scores).astype(int)
    assert classification.evaluate(labels, scores, 0.5)["ece"][0] < 0.015
    assert classification.evaluate(labels, scores + 0.2, 0.5)["ece"][0] == pytest.approx(0.2, abs=0.01)


def test_confusion_and_precision_without_positives():
    """Counts by hand; precision has no value, not zero, when nothing is called malignant."""
    assert classification.confusion(LABELS, SCORES, 0.5) == {"tp": 4, "fn": 1, "fp": 1, "tn": 4}
    assert classification.confusion(LABELS, SCORES, 0.8) == {"tp": 2, "fn": 3, "fp": 1, "tn": 4}
    assert np.isnan(classification.evaluate(LABELS, SCORES, 0.95)["precision_chosen"][0])


def test_threshold_maximises_youden():
    """The chosen threshold is the best of all by brute force, and of equals the highest."""
    for seed in range(5):
        labels, scores, _ = draw(seed, ties=seed > 2)
        candidates = np.unique(scores)
        youden = [sum(np.mean((scores >= t) == c, where=labels == c) for c in (0, 1)) for t in candidates]
        best = candidates[np.flatnonzero(np.isclose(youden, max(youden)))[-1]]
        assert classification.choose_threshold(labels, scores) == best
    assert classification.choose_threshold(np.array([0, 1, 0, 1]), np.array([0.1, 0.2, 0.3, 0.4])) == 0.4  # J is .5 at .4 and at .2


def test_threshold_per_tile():
    """Tiles of different folds keep their own threshold."""
    mixed = classification.evaluate(LABELS, SCORES, np.where(np.arange(10) % 2, 0.5, 0.3))
    assert mixed["recall_chosen"][0] == pytest.approx(np.mean([0.9 >= .5, .7 >= .3, .3 >= .5, .6 >= .3, .85 >= .5]))


def test_curves_pass_through_scikit_learns():
    """ROC and PR points are scikit-learn's, and the ROC area is the AUROC."""
    labels, scores, _ = draw(3)
    fpr, tpr = classification.roc_curve(labels, scores)
    expected = sk.roc_curve(labels, scores, drop_intermediate=False)
    assert np.allclose(np.interp(fpr[0], expected[0], expected[1]) >= tpr[0] - 1e-12, True)
    assert np.trapezoid(tpr[0], fpr[0]) == pytest.approx(sk.roc_auc_score(labels, scores))
    recall, precision = classification.pr_curve(labels, scores)
    expected = set(zip(*(np.round(v, 12) for v in sk.precision_recall_curve(labels, scores)[:2])))
    assert set(zip(np.round(precision[0], 12), np.round(recall[0], 12))) <= expected


def test_reliability_bins():
    """Bins of equal count, in order of score, that hold every tile; observed is the share malignant."""
    labels, scores, _ = draw(4, n=500)
    rows = classification.reliability(labels, scores)
    assert [row["n"] for row in rows] == [50] * 10
    assert sum(row["malignant"] for row in rows) == labels.sum()
    lowest = np.argsort(scores)[:50]
    assert rows[0]["observed"] == labels[lowest].mean()
    assert rows[0]["mean_score"] == pytest.approx(scores[lowest].mean())


@pytest.mark.parametrize(("labels", "scores", "words"), [
    ([0, 0, 0], [.1, .2, .3], "one class"),
    ([0, 1, 1], [.1, np.nan, .3], "not finite"),
    ([0, 1, 2], [.1, .2, .3], "must be 0"),
    ([0, 1, 1], [.1, 1.2, .3], "0..1"),
    ([0, 1], [.1, .2, .3], "same length"),
    ([], [], "one class"),
])
def test_bad_input(labels, scores, words):
    """One class, NaN, other labels, logits for probabilities, lists of different lengths, nothing: ValueError."""
    with pytest.raises(ValueError, match=words):
        classification.evaluate(np.array(labels), np.array(scores), 0.5)


def test_resample_of_one_class_is_refused():
    """Weights that leave a class out give no ROC curve: an error, not a NaN."""
    with pytest.raises(ValueError, match="one class"):
        classification.evaluate(LABELS, SCORES, 0.5, LABELS[None])
