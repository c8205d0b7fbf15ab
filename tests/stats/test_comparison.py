"""lesion.stats.comparison: pairing, pooling over seeds, verdicts, Holm, subgroups, bands."""
from types import SimpleNamespace

import numpy as np
import pytest

from lesion.stats import classification, comparison, inference

CONTRASTS = {("A1", "S2"): "added", ("O1", "S2"): "in place"}


def make(labels, scores, patients=None, threshold=0.4):
    return SimpleNamespace(labels=labels, scores=scores, patients=patients, thresholds=np.full(len(labels), threshold))


def simulate(gain, seeds=3, malignant=60, benign=400, noise=0.3, rng_seed=0):
    """Two arms tested on the same tiles; the second separates the classes by `gain` more."""
    rng = np.random.default_rng(rng_seed)
    labels = (np.arange(malignant + benign) < malignant).astype(int)
    shared = rng.normal(size=len(labels))
    runs = {"A1": {}, "S2": {}}
    for seed in range(seeds):
        for arm, more in (("A1", 0), ("S2", gain)):
            logits = (1.2 + more) * labels - 1.5 + shared + noise * rng.normal(size=len(labels))
            runs[arm][seed] = make(labels, 1 / (1 + np.exp(-logits)))
    return runs


def test_a_real_gain_is_supported_and_a_loss_harmful():
    """A large true difference is supported; the same contrast the other way round is harmful; signs and means agree."""
    runs = simulate(1.0)
    results = comparison.analyse(runs, CONTRASTS, resamples=400)
    cell = results["contrasts"][0]["metrics"]["auroc"]
    arms = results["arms"]
    assert cell["verdict"] == comparison.SUPPORTED
    means = [arms[name]["metrics"]["auroc"]["mean"] for name in ("A1", "S2")]
    assert cell["difference"] == pytest.approx(means[1] - means[0])
    assert cell["low"] > 0
    turned = comparison.analyse({"A1": runs["S2"], "S2": runs["A1"]}, CONTRASTS, resamples=400)
    back = turned["contrasts"][0]["metrics"]["auroc"]
    assert back["verdict"] == comparison.HARMFUL
    assert back["difference"] == pytest.approx(-cell["difference"])
    brier = results["contrasts"][0]["metrics"]["brier"]
    assert (brier["difference"] < 0) == (brier["verdict"] == comparison.SUPPORTED)


def test_null_contrasts_are_rarely_called():
    """Two arms of the same recipe: over 60 simulated experiments no more are called different than 5 % allows."""
    called = {"auroc": 0, "auprc": 0, "recall_chosen": 0}
    for rng_seed in range(60):
        runs = simulate(0.0, seeds=2, malignant=40, benign=120, rng_seed=rng_seed)
        results = comparison.analyse(runs, CONTRASTS, resamples=200)
        for name in called:
            called[name] += results["contrasts"][0]["metrics"][name]["verdict"] != comparison.UNCLEAR
    assert max(called.values()) <= 7  # 7 or more of binomial(60, .05) has probability .03


def test_contrasts_use_common_seeds_and_holm():
    """Seeds not in both arms are left out of a contrast; p is adjusted over the contrasts that were made."""
    runs = simulate(0.4)
    runs["O1"] = {0: runs["A1"][0], 7: runs["A1"][1]}
    results = comparison.analyse(runs, CONTRASTS, resamples=300)
    first, second = results["contrasts"]
    assert first["seeds"] == [0, 1, 2]
    assert second["seeds"] == [0]
    for name in classification.METRICS:
        raw = [row["metrics"][name]["p"] for row in (first, second)]
        assert [row["metrics"][name]["p_holm"] for row in (first, second)] == pytest.approx(inference.holm(raw))
    assert comparison.analyse({"B0": runs["A1"]}, CONTRASTS, resamples=50)["contrasts"] == []


def test_more_spread_between_seeds_widens_the_interval():
    """Training noise counts: noisier seeds give a wider interval of the difference at the same mean."""
    calm = comparison.analyse(simulate(0.3, noise=0.05), CONTRASTS, resamples=400)["contrasts"][0]
    wild = comparison.analyse(simulate(0.3, noise=1.5), CONTRASTS, resamples=400)["contrasts"][0]
    for name in ("auroc", "auprc"):
        width = [row["metrics"][name]["high"] - row["metrics"][name]["low"] for row in (calm, wild)]
        assert width[1] > 1.5 * width[0]
    assert wild["detectable_auroc"] > calm["detectable_auroc"]


def test_identical_arms_differ_in_nothing():
    """The same predictions in both arms: differences 0 with p 1, McNemar's tables diagonal."""
    runs = simulate(0.0)
    results = comparison.analyse({"A1": runs["A1"], "S2": runs["A1"]}, CONTRASTS, resamples=100)
    row = results["contrasts"][0]
    assert {cell["difference"] for cell in row["metrics"].values()} == {0.0}
    assert {cell["verdict"] for cell in row["metrics"].values()} == {comparison.UNCLEAR}
    assert row["mcnemar"]["chosen"]["malignant"]["first_only"] == 0
    assert row["mcnemar"]["50"]["benign"]["p"] == 1.0


def test_mcnemar_counts_by_hand():
    """Mean scores over seeds decide once a tile: malignant tiles .6 .6 .2 against .6 .2 .6 at 0.5."""
    labels = np.array([1, 1, 1, 0, 0, 0])
    one = {0: make(labels, np.array([.7, .5, .3, .1, .1, .6])), 1: make(labels, np.array([.5, .7, .1, .1, .1, .6]))}
    two = {0: make(labels, np.array([.6, .2, .6, .1, .6, .1])), 1: make(labels, np.array([.6, .2, .6, .1, .6, .1]))}
    table = comparison.analyse({"A1": one, "S2": two}, CONTRASTS, resamples=50)["contrasts"][0]["mcnemar"]["50"]
    assert table["malignant"] == {"both": 1, "first_only": 1, "second_only": 1, "neither": 0, "p": 1.0}
    assert table["benign"] == {"both": 1, "first_only": 1, "second_only": 1, "neither": 0, "p": 1.0}


def test_undefined_precision_is_none_not_nan():
    """An arm that calls nothing malignant has no precision: None in the results, a contrast without a verdict."""
    runs = simulate(0.2)
    runs["A1"] = {seed: make(run.labels, run.scores * 0.3, threshold=0.2) for seed, run in runs["A1"].items()}
    results = comparison.analyse(runs, CONTRASTS, resamples=100)
    assert results["arms"]["A1"]["metrics"]["precision_50"] == {"mean": None, "low": None, "high": None,
                                                                "per_seed": [None] * 3}
    assert results["arms"]["A1"]["metrics"]["recall_50"]["low"] == 0.0
    assert results["arms"]["A1"]["metrics"]["recall_50"]["high"] == pytest.approx(inference.clopper_pearson(0, 60)[1])
    assert results["contrasts"][0]["metrics"]["precision_50"]["verdict"] == comparison.NO_VALUE


@pytest.mark.parametrize(("difference", "p", "lower", "word"), [
    (0.1, 0.049, False, comparison.SUPPORTED), (-0.1, 0.049, False, comparison.HARMFUL),
    (0.1, 0.05, False, comparison.UNCLEAR), (-0.1, 0.01, True, comparison.SUPPORTED),
    (0.1, 0.01, True, comparison.HARMFUL), (0.0, 0.01, False, comparison.UNCLEAR),
    (None, None, False, comparison.NO_VALUE)])
def test_verdicts(difference, p, lower, word):
    """The rule from numbers to words, on both sides of .05 and for metrics where less is better."""
    assert comparison.verdict(difference, p, lower) == word


def test_subgroups_count_and_hide_small_groups():
    """n beside each group; rates over fewer than ten tiles are not shown; recall by hand."""
    runs = simulate(0.5)
    groups = {"skin tone": np.array(["light"] * 30 + ["dark"] * 5 + [""] * 425)}
    rows = {row["group"]: row for row in comparison.subgroups(runs, groups)}
    assert {name: (row["n"], row["malignant"]) for name, row in rows.items()} == {
        "light": (30, 30), "dark": (5, 5), "not known": (425, 25)}
    assert rows["dark"]["arms"]["A1"] == {"recall": None, "specificity": None, "auroc": None}
    light = rows["light"]["arms"]["S2"]
    expected = np.mean([(run.scores[:30] >= 0.4).mean() for run in runs["S2"].values()])
    assert light["recall"]["mean"] == pytest.approx(expected)
    assert (light["specificity"], light["auroc"]) == (None, None)
    assert rows["not known"]["arms"]["S2"]["auroc"] is not None


def test_bands_hold_the_curve():
    """The ROC's mean has the mean AUROC as area, runs from 0 to 1, and lies within its band; precision likewise."""
    runs = simulate(0.5)
    bands = comparison.curve_bands(runs["S2"], resamples=100)
    grid, tpr, low, high = bands["roc"]
    aurocs = [classification.evaluate(run.labels, run.scores, 0.5)["auroc"][0] for run in runs["S2"].values()]
    assert np.trapezoid(tpr, grid) == pytest.approx(np.mean(aurocs), abs=0.005)
    assert tpr[-1] == 1
    assert ((low <= tpr + 1e-9) & (tpr <= high + 1e-9)).mean() > 0.97
    recall, precision, low, high = bands["pr"]
    assert precision[-1] == pytest.approx(np.mean([60 / (run.scores >= run.scores[:60].min()).sum()
                                                   for run in runs["S2"].values()]))
    assert ((low <= precision + 1e-9) & (precision <= high + 1e-9)).mean() > 0.9
