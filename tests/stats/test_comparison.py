"""lesion.stats.comparison: pairing, pooling over seeds, verdicts, Holm, subgroups, bands."""
import json
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import special, stats

from lesion.stats import classification, comparison, inference

CONTRASTS = {("A1", "S2"): "added", ("O1", "S2"): "in place"}

JUDGED = {name for name, metric in classification.METRICS.items() if metric.least is not None}


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
        runs = simulate(0.0, seeds=3, malignant=40, benign=120, rng_seed=rng_seed)
        results = comparison.analyse(runs, CONTRASTS, resamples=200)
        assert results["contrasts"][0]["metrics"]["auroc"]["p"] is not None
        for name in called:
            called[name] += results["contrasts"][0]["metrics"][name]["verdict"] != comparison.UNCLEAR
    assert max(called.values()) <= 7  # 7 or more of binomial(60, .05) has probability .03


def test_contrasts_use_common_seeds_and_holm():
    """Seeds not in both arms are left out of a contrast; p is adjusted over the contrasts that were made, but for the
    primary contrast's AUROC, which stands alone and does not count among the others."""
    runs = simulate(0.4)
    runs["O1"] = {0: runs["A1"][0], 7: runs["A1"][1]}
    results = comparison.analyse(runs, CONTRASTS, resamples=300)
    first, second = results["contrasts"]
    assert first["seeds"] == [0, 1, 2]
    assert second["seeds"] == [0]
    for name in JUDGED:
        raw = [row["metrics"][name]["p"] for row in (first, second)]
        assert [row["metrics"][name]["p_holm"] for row in (first, second)] == pytest.approx(inference.holm(raw))
    alone = comparison.analyse(runs, CONTRASTS, resamples=300, primary=("O1", "S2"))["contrasts"]
    assert [row["primary"] for row in alone] == [False, True]
    for row in alone:
        assert row["metrics"]["auroc"]["p_holm"] == row["metrics"]["auroc"]["p"]
        assert row["metrics"]["brier"]["p_holm"] >= row["metrics"]["brier"]["p"]
    assert alone[0]["metrics"]["brier"]["p_holm"] == first["metrics"]["brier"]["p_holm"]
    assert comparison.analyse({"B0": runs["A1"]}, CONTRASTS, resamples=50)["contrasts"] == []


def test_verdict_takes_the_adjusted_p():
    """Two contrasts with the same p between .025 and .05: alone each is supported, together neither is."""
    gain = 0.08
    runs = simulate(gain, noise=0.4, rng_seed=5)
    alone = comparison.analyse(runs, CONTRASTS, resamples=50)["contrasts"][0]["metrics"]["auroc"]
    assert 0.025 < alone["p"] < 0.05
    assert alone["verdict"] == comparison.SUPPORTED
    both = comparison.analyse(runs | {"O1": runs["A1"]}, CONTRASTS, resamples=50)["contrasts"]
    assert [row["metrics"]["auroc"]["p_holm"] for row in both] == pytest.approx([2 * alone["p"]] * 2)
    assert {row["metrics"]["auroc"]["verdict"] for row in both} == {comparison.UNCLEAR}
    assert both[0]["detectable_auroc"] > 1.05 * comparison.analyse(
        runs, CONTRASTS, resamples=50)["contrasts"][0]["detectable_auroc"], "what is found at .05 / 2 is larger"


@pytest.mark.parametrize("seeds", [1, 3])
def test_a_patients_tiles_count_once(seeds):
    """Every tile photographed three times is no more certain: with patients every interval and p, DeLong's and the
    bootstrap's, of arms and of differences, is the same; with tiles for patients they are narrower."""
    once, thrice, apart = {}, {}, {}
    for arm, runs in simulate(0.3, seeds=seeds).items():
        for seed, run in runs.items():
            units = np.arange(len(run.labels))
            once.setdefault(arm, {})[seed] = make(run.labels, run.scores, units)
            labels, scores = np.repeat(run.labels, 3), np.repeat(run.scores, 3)
            thrice.setdefault(arm, {})[seed] = make(labels, scores, np.repeat(units, 3))
            apart.setdefault(arm, {})[seed] = make(labels, scores)
    results = [comparison.analyse(runs, CONTRASTS, resamples=300) for runs in (once, thrice, apart)]
    assert [r["carriers"] for r in results] == [60, 60, 180]
    for part in (lambda r: r["contrasts"][0]["metrics"], lambda r: r["arms"]["A1"]["metrics"]):
        one, three, naive = map(part, results)
        for name in JUDGED:
            assert [three[name][key] for key in ("low", "high")] == pytest.approx([one[name]["low"], one[name]["high"]])
            assert three[name].get("p") == pytest.approx(one[name].get("p"))
            if seeds == 1:
                assert naive[name]["high"] - naive[name]["low"] < 0.8 * (one[name]["high"] - one[name]["low"]), name


def test_intervals_change_sign_with_the_arms():
    """The other way round, every difference, interval and run's difference is the negative; p stays."""
    runs = simulate(0.5)
    there, back = (comparison.analyse(pair, CONTRASTS, resamples=300)["contrasts"][0]["metrics"]
                   for pair in (runs, {"A1": runs["S2"], "S2": runs["A1"]}))
    for name in JUDGED:
        one, two = there[name], back[name]
        assert (one["low"], one["high"]) == pytest.approx((-two["high"], -two["low"])), name
        assert one["low"] < one["difference"] < one["high"]
        assert one["per_seed"] == pytest.approx([-value for value in two["per_seed"]])
        assert one["p"] == pytest.approx(two["p"])
    assert there["auroc"]["low"] > 0


def test_differences_are_paired():
    """The Brier score's difference is a mean over tiles of paired differences: the bootstrap's interval has the width of
    their closed form, stratified by class (t with 59 degrees of freedom), not that of two arms apart or of their sum."""
    runs = simulate(0.1, seeds=1, noise=0.1)
    one, two = (runs[arm][0] for arm in ("A1", "S2"))
    gaps = (two.scores - two.labels) ** 2 - (one.scores - one.labels) ** 2
    variance = sum(gaps[one.labels == value].var() * (one.labels == value).sum() for value in (0, 1)) / 460 ** 2 * 60 / 59
    cell = comparison.analyse(runs, CONTRASTS, resamples=2000)["contrasts"][0]["metrics"]["brier"]
    assert cell["difference"] == pytest.approx(gaps.mean())
    assert cell["high"] - cell["low"] == pytest.approx(2 * stats.t.ppf(0.975, 59) * np.sqrt(variance), rel=0.08)


def test_arms_have_logit_intervals():
    """An arm's interval is symmetric about its mean on the logit scale (pAUC: of its share of .2), and only there."""
    metrics = comparison.analyse(simulate(0.3), CONTRASTS, resamples=300, everywhere=True)["arms"]["A1"]["metrics"]
    for name in JUDGED | {"pauc"}:
        ceiling = 0.2 if name == "pauc" else 1.0
        low, mean, high = (special.logit(metrics[name][key] / ceiling) for key in ("low", "mean", "high"))
        assert high - mean == pytest.approx(mean - low, rel=1e-6), name
        assert high - mean > 0.01


def test_figures_by_hand():
    """Ten benign and four malignant tiles. ECE with bins that lean both ways: |1 - .55| 1 + |2 - .45 x 4| + ... over 14
    (a signed sum would cancel); recall at 90 % specificity takes the threshold at which specificity is exactly .9."""
    labels = np.array([1] * 4 + [0] * 10)
    scores = np.array([.95, .65, .55, .15, .65, .15, .15, .05, .05, .05, .05, .05, .05, .05])
    runs = {"A1": {0: make(labels, scores)}, "S2": {0: make(labels, scores)}}
    found = comparison.analyse(runs, CONTRASTS, resamples=50)["arms"]["A1"]["metrics"]
    # bins: .05 x 7 (0 malignant), .15 x 3 (1), .55 x 1 (1), .65 x 2 (1), .95 x 1 (1)
    assert found["ece"]["mean"] == pytest.approx((.35 + abs(1 - .45) + .45 + abs(1 - 1.3) + .05) / 14)
    assert found["recall_spec90"]["mean"] == 0.75, "one false alarm in ten is 90 %: .65 and .55 count"
    assert found["recall_spec95"]["mean"] == 0.25
    assert found["auroc"]["low"] is None


def test_nothing_is_decided_where_it_would_not_hold():
    """Under ten patients with malignant tiles, or with two runs: the numbers and no interval, p or verdict, whatever the
    gain; with one run "in this one run"; ECE and pAUC never."""
    few, some = simulate(3.0, malignant=9), simulate(3.0, malignant=27)
    two = simulate(3.0, seeds=2)
    for runs in (few, some, two):
        results = comparison.analyse(runs, CONTRASTS, resamples=100)
        row = results["contrasts"][0]
        assert row["metrics"]["auroc"]["difference"] > 0.05
        for cell in row["metrics"].values():
            assert (cell["low"], cell["high"], cell["p"]) == (None, None, None)
            assert cell["verdict"] == comparison.TOO_FEW
        assert row["detectable_auroc"] is None
        assert {metric["low"] for metric in results["arms"]["S2"]["metrics"].values()} == {None}
        if runs is not some:
            assert np.isnan(comparison.curve_bands(runs["A1"], resamples=20)["roc"][2]).all()
    tiles = {arm: {k: make(run.labels, run.scores, np.where(run.labels, np.arange(460) // 7, np.arange(460)))
                   for k, run in seeds.items()} for arm, seeds in simulate(3.0).items()}
    results = comparison.analyse(tiles, CONTRASTS, resamples=100)
    assert results["carriers"] == 9
    assert results["contrasts"][0]["metrics"]["auroc"]["verdict"] == comparison.TOO_FEW
    one = comparison.analyse(simulate(3.0, seeds=1), CONTRASTS, resamples=100)["contrasts"][0]["metrics"]
    assert (one["auroc"]["verdict"], one["ece"]["verdict"]) == (comparison.BETTER, comparison.TOO_FEW)
    some = comparison.analyse(simulate(3.0, malignant=40), CONTRASTS, resamples=100)["contrasts"][0]["metrics"]
    assert (some["auroc"]["verdict"], some["pauc"]["verdict"]) == (comparison.SUPPORTED, comparison.TOO_FEW)


def test_degenerate_scores_cannot_be_judged():
    """Constant arms, a perfect arm against a constant one, perfect arms: no p, interval or detectable difference."""
    labels = (np.arange(200) < 50).astype(int)
    kinds = {"constant": np.full(200, 0.5), "perfect": labels * 1.0}
    for one, two in (("constant", "constant"), ("constant", "perfect"), ("perfect", "perfect")):
        runs = {"A1": {k: make(labels, kinds[one]) for k in range(3)}, "S2": {k: make(labels, kinds[two]) for k in range(3)}}
        results = comparison.analyse(runs, CONTRASTS, resamples=60)
        row = results["contrasts"][0]
        cell = row["metrics"]["auroc"]
        assert (cell["low"], cell["p"], cell["verdict"]) == (None, None, comparison.NO_VALUE)
        assert row["detectable_auroc"] is None
        assert results["arms"]["A1"]["metrics"]["brier"]["low"] is None or one == "perfect"
    constant = comparison.analyse({"A1": {0: make(labels, kinds["constant"])}}, {}, resamples=60)["arms"]["A1"]["metrics"]
    assert constant["auroc"]["mean"] == 0.5
    assert constant["auroc"]["low"] is None, "never varying scores leave no error to judge by"


def test_one_malignant_test_tile():
    """All figures are there, nothing is judged, nothing fails."""
    runs = simulate(0.3, malignant=1, benign=60)
    results = comparison.analyse(runs, CONTRASTS, resamples=40)
    assert results["arms"]["A1"]["metrics"]["auroc"]["mean"] is not None
    assert {cell["verdict"] for cell in results["contrasts"][0]["metrics"].values()} <= {
        comparison.TOO_FEW, comparison.NO_VALUE}
    assert len(comparison.curve_bands(runs["A1"], resamples=20)["pr"]) == 4


def test_a_shifted_threshold_is_not_support():
    """Scores raised without better ranking: recall and specificity at 0.5 say "shifted threshold", neither supported nor
    harmful; with a better ranking recall may be supported."""
    runs = simulate(0.0)
    shifted = {seed: make(run.labels, special.expit(special.logit(run.scores) + 1.0)) for seed, run in runs["S2"].items()}
    cells = comparison.analyse({"A1": runs["A1"], "S2": shifted}, CONTRASTS, resamples=200)["contrasts"][0]["metrics"]
    assert cells["auroc"]["verdict"] == comparison.UNCLEAR
    assert (cells["recall_50"]["verdict"], cells["specificity_50"]["verdict"]) == (comparison.SHIFTED,) * 2
    assert cells["recall_50"]["p_holm"] < 0.05
    back = comparison.analyse({"A1": shifted, "S2": runs["A1"]}, CONTRASTS, resamples=200)["contrasts"][0]["metrics"]
    assert (back["recall_50"]["verdict"], back["specificity_50"]["verdict"]) == (comparison.SHIFTED,) * 2
    better = comparison.analyse(simulate(1.5), CONTRASTS, resamples=200)["contrasts"][0]["metrics"]
    assert better["recall_50"]["verdict"] == comparison.SUPPORTED


def test_more_spread_between_seeds_widens_the_interval():
    """Training noise counts: noisier seeds give a wider interval of the difference at the same mean."""
    calm = comparison.analyse(simulate(0.3, noise=0.05), CONTRASTS, resamples=400)["contrasts"][0]
    wild = comparison.analyse(simulate(0.3, noise=1.5), CONTRASTS, resamples=400)["contrasts"][0]
    for name in ("auroc", "auprc"):
        width = [row["metrics"][name]["high"] - row["metrics"][name]["low"] for row in (calm, wild)]
        assert width[1] > 1.5 * width[0]
    assert wild["detectable_auroc"] > calm["detectable_auroc"]


def test_identical_arms_differ_in_nothing():
    """The same predictions in both arms: differences 0 that no error can be computed of, McNemar's tables diagonal."""
    runs = simulate(0.0)
    results = comparison.analyse({"A1": runs["A1"], "S2": runs["A1"]}, CONTRASTS, resamples=100)
    row = results["contrasts"][0]
    assert {cell["difference"] for cell in row["metrics"].values()} == {0.0}
    assert {cell["p"] for cell in row["metrics"].values()} == {None}
    assert {cell["verdict"] for name, cell in row["metrics"].items() if name in JUDGED} == {comparison.NO_VALUE}
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
    (None, None, False, comparison.NO_VALUE), (0.1, None, False, comparison.NO_VALUE)])
def test_verdicts(difference, p, lower, word):
    """The rule from numbers to words, on both sides of .05 and for metrics where less is better; one run is never more
    than "in this one run"."""
    assert comparison.verdict(difference, p, lower) == word
    one = {comparison.SUPPORTED: comparison.BETTER, comparison.HARMFUL: comparison.WORSE}.get(word, word)
    assert comparison.verdict(difference, p, lower, runs=1) == one


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
    assert light["recall"]["low"] < expected < light["recall"]["high"]
    assert (light["specificity"], light["auroc"]) == (None, None)
    assert rows["not known"]["arms"]["S2"]["auroc"] is not None


def test_subgroups_are_judged_over_patients():
    """40 tiles of each of 12 patients: the interval is that over patients, several times wider than over tiles; under
    ten patients there is none, however many tiles."""
    rng = np.random.default_rng(3)
    patients = np.concatenate([np.repeat(np.arange(12), 40), 12 + np.arange(300)])
    labels = (np.arange(780) < 480).astype(int)
    logits = np.where(labels, 1.5 * rng.normal(size=312)[patients], -2) + 0.5 * rng.normal(size=780)
    runs = {"A1": {k: make(labels, special.expit(logits + 0.1 * rng.normal(size=780)), patients, 0.5) for k in range(3)}}
    groups = {"site": np.where(patients < 9, "nine", "rest"), "all": np.full(780, "all")}
    rows = {row["group"]: row for row in comparison.subgroups(runs, groups)}
    assert rows["nine"]["malignant"] == 360
    assert rows["nine"]["arms"]["A1"]["recall"] is None
    found = rows["all"]["arms"]["A1"]["recall"]
    hits = np.stack([run.scores[labels == 1] >= 0.5 for run in runs["A1"].values()])
    assert (found["mean"], found["low"], found["high"]) == inference.rate_over_patients(hits, patients[labels == 1])
    low, high = inference.clopper_pearson(found["mean"] * 480, 480)
    assert found["high"] - found["low"] > 3 * (high - low)
    assert rows["all"]["patients"] == 312


def test_calibration_is_judged_over_patients():
    """Bins as `reliability` makes them of the mean score, each with the interval over the patients in it."""
    runs = simulate(0.3)["A1"]
    rows = comparison.calibration(runs)
    scores = np.mean([run.scores for run in runs.values()], axis=0)
    assert [row["n"] for row in rows] == [46] * 10
    lowest = np.argsort(scores)[:46]
    assert (rows[0]["low"], rows[0]["high"]) == inference.rate_over_patients(runs[0].labels[lowest] == 1, lowest)[1:]
    together = {k: make(run.labels, run.scores, np.arange(460) % 6) for k, run in runs.items()}
    assert {row["low"] for row in comparison.calibration(together)} == {None}
    json.dumps(rows)


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


def test_folds_are_never_ranked_together():
    """Cross-fitted runs whose folds have scales of their own: arms, contrast and verdict in AUROC as if they had not."""
    runs = simulate(0.6, malignant=60, benign=240)
    folds = np.arange(300) % 2
    plain = comparison.analyse({arm: {seed: add(run, folds, 1.0) for seed, run in seeds.items()} for arm, seeds in runs.items()},
                               CONTRASTS, resamples=200)
    scaled = comparison.analyse({arm: {seed: add(run, folds, 0.3) for seed, run in seeds.items()} for arm, seeds in runs.items()},
                                CONTRASTS, resamples=200)
    for found in (plain, scaled):
        (cell,), arms = [row["metrics"]["auroc"] for row in found["contrasts"]], found["arms"]
        assert cell["difference"] == pytest.approx(arms["S2"]["metrics"]["auroc"]["mean"] - arms["A1"]["metrics"]["auroc"]["mean"])
        assert cell["p"] is not None
    keys = ("difference", "low", "high", "p", "verdict", "per_seed")
    one, two = ([found["contrasts"][0]["metrics"]["auroc"][key] for key in keys] for found in (plain, scaled))
    assert one == two
    assert plain["arms"]["A1"]["metrics"]["auroc"] == scaled["arms"]["A1"]["metrics"]["auroc"]


def add(run, folds, scale):
    return SimpleNamespace(**{**vars(run), "scores": np.where(folds == 1, run.scores * scale, run.scores), "folds": folds})


def test_few_malignant_tiles_in_a_fold_give_no_interval():
    """45 malignant tiles in five folds, nine of each: numbers for AUROC, no verdict."""
    runs = simulate(0.6, malignant=45, benign=255)
    runs = {arm: {seed: add(run, np.arange(300) % 5, 1.0) for seed, run in seeds.items()} for arm, seeds in runs.items()}
    cell = comparison.analyse(runs, CONTRASTS, resamples=200)["contrasts"][0]["metrics"]["auroc"]
    assert cell["verdict"] == comparison.TOO_FEW
    assert cell["low"] is None
    assert cell["difference"] is not None


def test_counts_and_decisions_at_both_thresholds_by_hand():
    """At 0.5 and at each seed's own threshold (.15, .07): confusion counts are means over seeds; McNemar decides by the mean score at
    the mean threshold; the threshold that is told is the seeds' mean."""
    labels = np.array([1, 1, 1, 0, 0, 0])
    one = {0: make(labels, np.array([.7, .5, .3, .1, .1, .6]), threshold=.15),
           1: make(labels, np.array([.5, .7, .1, .1, .1, .6]), threshold=.07)}
    two = {k: make(labels, np.array([.6, .2, .6, .1, .6, .1]), threshold=.15) for k in range(2)}
    found = comparison.analyse({"A1": one, "S2": two}, CONTRASTS, resamples=50)
    assert found["arms"]["A1"]["confusion"] == {"50": {"tp": 2, "fn": 1, "fp": 1, "tn": 2}, "chosen": {"tp": 3, "fn": 0, "fp": 2, "tn": 1}}
    assert found["arms"]["A1"]["threshold"] == pytest.approx(0.11)
    table = found["contrasts"][0]["mcnemar"]["chosen"]
    assert table["malignant"] == {"both": 3, "first_only": 0, "second_only": 0, "neither": 0, "p": 1.0}
    assert [table["benign"][key] for key in ("both", "first_only", "second_only")] == [1, 1, 1]


def test_each_metric_is_over_the_patients_of_its_class():
    """60 patients with malignant and 11 with benign tiles: specificity has 10 degrees of freedom, recall 59; AUROC needs both."""
    labels = (np.arange(170) < 60).astype(int)
    patients = np.where(labels == 1, np.arange(170), 1000 + np.arange(170) % 11)
    scores = np.random.default_rng(0).random(170) * 0.5 + 0.4 * labels
    test = comparison._Test(make(labels, scores, patients), 50, 0)
    assert [test.units(classification.METRICS[name]) for name in ("recall_50", "specificity_50", "auroc")] == [60, 11, 60]
    assert test.fewest == [60, 11]
    few = comparison._Test(make(labels, scores, np.where(labels == 1, np.arange(170), 1000 + np.arange(170) % 9)), 50, 0)
    assert not few.judges(classification.METRICS["auroc"], 1)


def test_bands_are_critical_standard_errors_wide():
    """One run: the band of each curve reaches t (59 degrees of freedom) standard errors of its bootstrap to each side; precision is
    the best of the thresholds that attain the recall."""
    run = simulate(0.5, seeds=1)["S2"][0]
    grid, middle, low, high = comparison.curve_bands({0: run}, resamples=200, points=11)["roc"]
    drawn = comparison._roc_on(run, comparison._Test(run, 200, 0).weights, grid)
    half = stats.t.ppf(0.975, 59) * drawn.std(0, ddof=1) * np.sqrt(60 / 59)
    inside = (middle - half > 0) & (middle + half < 1) & (half > 0)
    assert inside.sum() > 2
    assert high[inside] - middle[inside] == pytest.approx(half[inside])
    assert middle[inside] - low[inside] == pytest.approx(half[inside])
    grid, precision, *_ = comparison.curve_bands({0: run}, resamples=20, points=11)["pr"]
    called = run.scores >= np.unique(run.scores)[:, None]
    recall, value = (called & (run.labels == 1)).sum(1) / 60, (called & (run.labels == 1)).sum(1) / called.sum(1)
    assert precision == pytest.approx([value[recall >= at - 1e-12].max() for at in grid])
