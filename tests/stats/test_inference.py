"""lesion.stats.inference: pROC's published values, closed forms, textbook examples, coverage by simulation."""
import time

import asah
import numpy as np
import pytest
from scipy import stats

from lesion.stats import classification, inference


def simulate(rng, malignant, benign, tiles=1, shared=0.0, gain=0.0):
    """Two models' scores of one test set: labels, first, second, patients. `tiles` a patient, all of one class,
    whose scores share a part `shared` of their variance; both models share half of the rest."""
    count = malignant + benign
    labels = np.repeat((np.arange(count) < malignant).astype(int), tiles)
    patients = np.repeat(np.arange(count), tiles)
    common = np.sqrt(shared) * rng.normal(size=count)[patients]
    tile = np.sqrt((1 - shared) / 2) * rng.normal(size=len(labels))
    own = np.sqrt((1 - shared) / 2) * rng.normal(size=(2, len(labels)))
    first, second = 1 / (1 + np.exp(2 - 1.5 * labels - common - tile - own - gain * labels * [[0], [1]]))
    return labels, first, second, patients


# -------------------------------------------------------------------------------------------- DeLong

@pytest.mark.parametrize(("first", "second", "statistic", "p", "low", "high"), [
    ("WFNS", "S100B", 2.20898359144091, 0.0271757822291882, 0.0104061769564846, 0.174214419249478),
    ("WFNS", "NDKA", 2.79777591868904, 0.00514557970691098, 0.0634011709339876, 0.3600405634833566),
    ("NDKA", "S100B", -1.39077002573558, 0.164295175223054, -0.2876917446341914, 0.0488706064228094),
])
def test_delong_equals_proc(first, second, statistic, p, low, high):
    """roc.test(aSAH$outcome, ...) as pROC publishes it and pins it in its own tests (first minus second): the statistic,
    and with its normal reference p and the interval. Our own reference is a t with the degrees of freedom of 41
    patients with a poor and 72 with a good outcome: a little wider, on the same side of .05."""
    result = inference.delong_test(asah.OUTCOME, getattr(asah, second), getattr(asah, first))
    assert result["statistic"] == pytest.approx(statistic, rel=1e-9)
    assert 2 * stats.norm.sf(abs(result["statistic"])) == pytest.approx(p, rel=1e-9)
    half = stats.norm.ppf(0.975) * result["se"]
    assert (result["difference"] - half, result["difference"] + half) == pytest.approx((low, high), rel=1e-9)
    assert 40 <= result["df"] <= 40 + 71
    assert result["low"] < low
    assert result["high"] > high
    assert p < result["p"] < 1.4 * p + 0.005


def test_delong_variance_equals_proc():
    """pROC prints AUC .8237, .7314, .6120 and the 95 % intervals .7485-.8988, .6301-.8326, .5012-.7227 for aSAH."""
    aurocs, covariance = inference.delong(asah.OUTCOME, np.stack([asah.WFNS, asah.S100B, asah.NDKA]))
    half = 1.959963985 * np.sqrt(np.diag(covariance))
    assert aurocs[:2] == pytest.approx([0.8236789, 0.7313686], abs=5e-8)
    assert aurocs - half == pytest.approx([0.7485349, 0.6301182, 0.501245], abs=5e-7)
    assert aurocs + half == pytest.approx([0.8988228, 0.8326189, 0.722671], abs=5e-7)


def test_delong_with_patients_of_several_tiles():
    """Every tile photographed three times adds nothing: with patients the covariance stays, without it is a third."""
    labels, first, second, _ = simulate(np.random.default_rng(0), 30, 60)
    _, once = inference.delong(labels, np.stack([first, second]))
    thrice = [np.repeat(v, 3) for v in (labels, first, second)]
    _, grouped = inference.delong(thrice[0], np.stack(thrice[1:]), np.repeat(np.arange(90), 3))
    _, naive = inference.delong(thrice[0], np.stack(thrice[1:]))
    assert grouped == pytest.approx(once, rel=1e-12)
    assert naive == pytest.approx(once / 3, rel=0.05)


def test_delong_over_patients_equals_jackknife():
    """With mixed patients (both classes, several tiles) the covariance agrees with leave-one-patient-out."""
    rng = np.random.default_rng(1)
    patients = rng.integers(0, 80, 400)
    labels = (rng.random(400) < 0.3).astype(int)
    u = rng.normal(size=80)[patients]
    scores = np.stack([1 / (1 + np.exp(-(labels + u + rng.normal(size=400)))) for _ in range(2)])
    _, covariance = inference.delong(labels, scores, patients)
    left_out = np.stack([inference.delong(labels[keep], scores[:, keep])[0]
                         for keep in (patients != q for q in np.unique(patients))])
    n = len(left_out)
    jackknife = (n - 1) ** 2 / n * np.cov(left_out.T)
    assert covariance == pytest.approx(jackknife, rel=0.05)


def test_delong_over_seeds():
    """The mean over runs by hand: variance s^2 / S of the runs' differences plus the mean DeLong covariance of two runs.
    The same run three times is one run with the spread of training known to be 0; unequal numbers are refused."""
    labels, first, second, _ = simulate(np.random.default_rng(2), 40, 100, gain=0.3)
    one = inference.delong_test(labels, first, second)
    same = inference.delong_test(labels, np.stack([first] * 3), np.stack([second] * 3))
    assert (same["difference"], same["se"], same["p"]) == pytest.approx((one["difference"], one["se"], one["p"]), rel=1e-9)
    third = simulate(np.random.default_rng(3), 40, 100)[1]
    arms = np.stack([first, first, first]), np.stack([second, first, third])
    aurocs, covariance = inference.delong(labels, np.concatenate(arms))
    contrast = np.hstack([-np.eye(3), np.eye(3)])
    own = contrast @ covariance @ contrast.T
    expected = (contrast @ aurocs).var(ddof=1) / 3 + (own[0, 1] + own[0, 2] + own[1, 2]) / 3
    assert own[0, 2] > 0
    found = inference.delong_test(labels, *arms)
    assert found["se"] ** 2 == pytest.approx(expected, rel=1e-9)
    assert 2 < found["df"] < 40
    with pytest.raises(ValueError, match="same in both"):
        inference.delong_test(labels, np.stack([first] * 2), second)


def test_no_error_is_neither_certainty_nor_absence():
    """The same ranking in both arms, or a perfect arm against a constant one: no p, no interval, nothing detectable."""
    labels, first, _, _ = simulate(np.random.default_rng(2), 40, 100)
    for one, two, difference in ((first, first, 0.0), (np.full(140, 0.5), labels * 1.0, 0.5)):
        found = inference.delong_test(labels, one, two)
        assert found["difference"] == pytest.approx(difference)
        assert (found["p"], found["low"], found["high"], found["statistic"]) == (None, None, None, None)
        assert inference.detectable(found["parts"]) is None


# ------------------------------------------------------------------------------ patients and training runs

def test_over_runs_by_hand():
    """Three runs .2 .5 .8 (variance .09) whose covariances over patients are .01, .02 and .03: .09 / 3 and .02; one run
    keeps its own variance; a negative mean covariance counts as none."""
    covariance = np.array([[.05, .01, .02], [.01, .06, .03], [.02, .03, .07]])
    (runs, df_runs), (shared, df) = inference.over_runs(np.array([.2, .5, .8]), covariance, np.asarray(9.0))
    assert (runs, df_runs, shared, df) == pytest.approx((0.03, 2, 0.02, 9))
    assert inference.over_runs(np.array([.2]), covariance[:1, :1], np.asarray(9.0)) == [(.05, 9)]
    assert inference.over_runs(np.array([.2, .5, .8]), -covariance, np.asarray(9.0))[1][0] == 0


def test_critical_value_by_hand():
    """Variances 3 and 1 on 2 and 20 degrees of freedom: Satterthwaite's 16 / (9/2 + 1/20) = 3.516, Cochran's weighted t;
    half way between. One part: Student's t itself."""
    parts = [(np.asarray(3.0), np.asarray(2.0)), (np.asarray(1.0), np.asarray(20.0))]
    assert inference.satterthwaite(parts) == pytest.approx(16 / 4.55)
    expected = (stats.t.ppf(.975, 16 / 4.55) + (3 * stats.t.ppf(.975, 2) + stats.t.ppf(.975, 20)) / 4) / 2
    assert inference.critical(parts) == pytest.approx(expected, rel=1e-6)
    assert inference.critical(parts[1:]) == pytest.approx(stats.t.ppf(.975, 20))
    assert inference.critical(parts[1:], 0.9) == pytest.approx(stats.t.ppf(.95, 20))


def test_p_agrees_with_the_interval():
    """p is the level at which the interval just touches 0; of one part it is Student's; a huge statistic stays above 0."""
    parts = [(np.asarray(3.0), np.asarray(2.0)), (np.asarray(1.0), np.asarray(20.0))]
    for estimate in (0.3, 4.0, 9.0):
        p = inference.two_sided_p(estimate, parts)
        low, _ = inference.difference_interval(estimate, parts, ceiling=100, level=1 - p)
        assert low == pytest.approx(0, abs=1e-6)
    assert inference.two_sided_p(2.0, parts[1:]) == pytest.approx(2 * stats.t.sf(2.0, 20), rel=1e-6)
    assert inference.two_sided_p(-2.0, parts[1:]) == pytest.approx(2 * stats.t.sf(2.0, 20), rel=1e-6)
    assert inference.two_sided_p(0.0, parts) == 1.0
    assert 0 < inference.two_sided_p(1e6, parts[1:]) < 1e-9


def test_intervals_stay_in_their_range():
    """Wide intervals: of a figure inside 0..ceiling by its scale, of a difference cut at -ceiling and ceiling; without
    error or value none; at an end the exact binomial one over the patients."""
    wide = [(np.asarray(0.5), np.asarray(2.0))]
    low, high = inference.interval(0.9, wide, 20)
    assert 0 < low < 0.9 < high < 1
    low, high = inference.interval(0.18, [(np.asarray(0.001), np.asarray(2.0))], 20, ceiling=0.2)
    assert 0 < low < 0.18 < high < 0.2
    assert inference.difference_interval(0.1, wide) == (-1.0, 1.0)
    assert inference.difference_interval(0.1, wide, ceiling=0.2) == (-0.2, 0.2)
    none = [(np.asarray(0.0), np.asarray(20.0))]
    assert inference.interval(0.5, none, 20) is inference.difference_interval(0.5, none) is None
    assert inference.interval(float("nan"), wide, 20) is None
    assert inference.interval(0.0, none, 20) == pytest.approx(inference.clopper_pearson(0, 20))
    low, high = inference.interval(0.2, none, 20, ceiling=0.2)
    assert (low, high) == pytest.approx((0.2 * inference.clopper_pearson(20, 20)[0], 0.2))


def test_interval_is_on_the_logit_scale():
    """.8 with standard error .1 on many degrees of freedom: logit(.8) +- 1.96 x .1 / .16, back to a share."""
    low, high = inference.interval(0.8, [(np.asarray(0.01), np.asarray(1e6))], 20)
    half = 1.959964 * 0.1 / 0.16
    assert (low, high) == pytest.approx((1 / (1 + np.exp(-np.log(4) + half)), 1 / (1 + np.exp(-np.log(4) - half))), rel=1e-5)


def test_detectable_difference_is_found_four_times_in_five():
    """At many degrees of freedom 1.96 + .84 standard errors; at few, simulated studies with that true difference, each
    with its own error, find it in 80 % (the printed difference comes from yet another study's error)."""
    assert inference.detectable([(np.asarray(0.01), np.asarray(1e5))]) == pytest.approx(0.280, abs=0.001)
    rng = np.random.default_rng(8)
    for df in (3.0, 12.0):
        printed, found = (rng.chisquare(df, 20000) / df for _ in range(2))
        reach = inference.detectable([(np.asarray(1.0), np.asarray(df))])
        statistic = (rng.normal(size=20000) + reach * np.sqrt(printed)) / np.sqrt(found)
        assert np.mean(statistic > stats.t.ppf(.975, df)) == pytest.approx(0.8, abs=0.015)
    assert inference.detectable([(np.asarray(1.0), np.asarray(12.0))], alpha=0.01) > 1.2 * reach


def test_rates_over_patients():
    """Recall by hand: patients with 2 of 2, 1 of 2, 0 of 4 right; the same tiles 20 times over do not narrow the
    interval; fewer than ten patients have none."""
    hits, patients = np.array([1, 1, 1, 0, 0, 0, 0, 0], bool), np.array([0, 0, 1, 1, 2, 2, 2, 2])
    assert inference.rate_over_patients(hits, patients) == (0.375, None, None)
    hits, patients = np.tile(hits, 5), np.concatenate([patients + 3 * k for k in range(5)])
    mean, low, high = inference.rate_over_patients(hits, patients)
    residuals = np.tile([2 - 2 * .375, 1 - 2 * .375, -4 * .375], 5)
    variance = 15 / 14 * np.square(residuals).sum() / 40 ** 2
    assert (low, high) == pytest.approx(inference.interval(.375, [(np.asarray(variance), np.asarray(14.0))], 15))
    again = inference.rate_over_patients(np.repeat(hits, 20), np.repeat(patients, 20))
    assert again == pytest.approx((mean, low, high))


# ------------------------------------------------------------------------------------------ proportions

@pytest.mark.parametrize(("share", "low", "high"), [(.09, .04, .17), (.37, .26, .48), (.48, .37, .60), (.65, .53, .75)])
def test_clopper_pearson_vectors(share, low, high):
    """The four recalls of the study at n = 79."""
    assert inference.clopper_pearson(round(share * 79), 79) == pytest.approx((low, high), abs=0.005)


def test_clopper_pearson_ends():
    """0 of n: 1 - (alpha/2)^(1/n); n of n mirrored; a count outside 0..n is refused."""
    assert inference.clopper_pearson(0, 10) == pytest.approx((0, 1 - 0.025 ** 0.1))
    assert inference.clopper_pearson(10, 10) == pytest.approx((0.025 ** 0.1, 1))
    with pytest.raises(ValueError, match="between 0 and n"):
        inference.clopper_pearson(11, 10)


def test_auc_interval_covers_and_is_never_empty():
    """Newcombe's method 5: 95 % coverage on normal scores, and (low, 1] with low < 1 at a perfect AUC."""
    rng = np.random.default_rng(14)
    truth, covered = stats.norm.cdf(1.5 / np.sqrt(2)), 0
    for _ in range(400):
        x, y = rng.normal(1.5, 1, 30), rng.normal(0, 1, 40)
        low, high = inference.auc_interval((x[:, None] > y).mean(), 30, 40)
        covered += low <= truth <= high
    assert 0.92 <= covered / 400 <= 0.99
    assert 0.7 < inference.auc_interval(1.0, 20, 20)[0] < 1
    assert inference.auc_interval(0.0, 20, 20)[1] < 0.3


def test_mcnemar_table_and_p():
    """1 against 9 discordant pairs: p = 2 (C(10,0) + C(10,1)) / 2^10 = .021484; none discordant: p = 1."""
    first = np.array([True] * 20 + [True] + [False] * 9 + [False] * 5)
    second = np.array([True] * 20 + [False] + [True] * 9 + [False] * 5)
    assert inference.mcnemar(first, second) == pytest.approx(
        {"both": 20, "first_only": 1, "second_only": 9, "neither": 5, "p": 22 / 1024})
    assert inference.mcnemar(first, first)["p"] == 1.0


def test_holm_worked_example():
    """p = .01 .04 .03 .005 gives .03 .06 .06 .02 (R: p.adjust(p, "holm")); never above 1, never below the raw p."""
    assert inference.holm([.01, .04, .03, .005]) == pytest.approx([.03, .06, .06, .02])
    assert inference.holm([.5, .9, .6]) == [1.0, 1.0, 1.0]
    assert inference.holm([]) == []


# -------------------------------------------------------------------------------------------- bootstrap

def test_resamples_keep_patients_together():
    """All tiles of a patient count equally often; each stratum keeps its number of patients; same seed, same draw."""
    labels = np.array([1, 0, 0, 1, 1, 0, 0, 0, 0, 0])
    patients = np.array(["a", "a", "b", "c", "c", "d", "d", "e", "f", "f"])
    weights = inference.patient_resamples(labels, patients, 500, seed=3)
    for patient in "abcdef":
        inside = weights[:, patients == patient]
        assert (inside == inside[:, :1]).all()
    first = [np.flatnonzero(patients == p)[0] for p in "abcdef"]
    assert (weights[:, first[0]] == 1).all(), "the only patient with both classes is always drawn"
    assert (weights[:, first[2]] == 1).all(), "the only patient with malignant tiles alone too"
    benign = weights[:, [first[1], *first[3:]]]
    assert (benign.sum(1) == 4).all()
    assert benign.mean(0) == pytest.approx([1, 1, 1, 1], abs=0.15)
    assert (weights == inference.patient_resamples(labels, patients, 500, seed=3)).all()


def test_bootstrap_error_agrees_with_delong():
    """For AUROC the bootstrap's standard error is DeLong's, over tiles and over patients."""
    labels, first, _, patients = simulate(np.random.default_rng(4), 60, 200, tiles=3, shared=0.6)
    for grouped in (None, patients):
        weights = inference.patient_resamples(labels, grouped, 2000)
        error = inference.bootstrap(labels, first[None], [0.3], weights)["auroc"].std()
        assert error == pytest.approx(np.sqrt(inference.delong(labels, first, grouped)[1][0, 0]), rel=0.08)


def test_bootstrap_of_the_study_takes_seconds():
    """2,000 resamples of 2,079 tiles, every metric: under 5 s (0.4 s on two idle cores)."""
    labels, first, _, _ = simulate(np.random.default_rng(5), 79, 2000)
    started = time.process_time()
    weights = inference.patient_resamples(labels, None)
    result = inference.bootstrap(labels, first[None], [0.2], weights)
    assert {v.shape for v in result.values()} == {(1, 2000)}
    assert time.process_time() - started < 5


RUNS, DRAWS = 300, 300


def parts(drawn):
    """One run's variance over patients, from its resamples [1, R]."""
    return inference.over_runs(np.zeros(1), inference.resampled_covariance(drawn, 79), np.asarray(78.0))


@pytest.fixture(scope="module")
def coverage():
    """Share of simulated test sets (79 malignant and 120 benign patients of 2 tiles) whose interval holds the truth."""
    rng, hits = np.random.default_rng(6), {}
    setting = {"tiles": 2, "shared": 0.7, "gain": 0.4}
    labels, *scores, _ = simulate(rng, 79 * 300, 120 * 300, **setting)
    truth = [{k: v[0] for k, v in classification.evaluate(labels, s, 0.3).items()} for s in scores]
    for run in range(RUNS):
        labels, first, second, patients = simulate(rng, 79, 120, **setting)
        plain, other = (classification.evaluate(labels, s, 0.3) for s in (first, second))
        over_patients, over_tiles = (inference.patient_resamples(labels, p, DRAWS, run) for p in (patients, None))
        one, two = (inference.bootstrap(labels, s[None], [0.3], over_patients) for s in (first, second))
        naive = inference.bootstrap(labels, first[None], [0.3], over_tiles)
        for name in ("auroc", "auprc", "recall_50", "brier"):
            for kind, found, true in (
                    ("", inference.interval(plain[name][0], parts(one[name]), 79), truth[0][name]),
                    ("naive ", inference.interval(plain[name][0], parts(naive[name]), 79), truth[0][name]),
                    ("difference ", inference.difference_interval(other[name][0] - plain[name][0],
                                                                  parts(two[name] - one[name])),
                     truth[1][name] - truth[0][name])):
                hits.setdefault(kind + name, []).append(found[0] <= true <= found[1])
        result = inference.delong_test(labels, first, second, patients)
        hits.setdefault("DeLong", []).append(result["low"] <= truth[1]["auroc"] - truth[0]["auroc"] <= result["high"])
    return {name: float(np.mean(hit)) for name, hit in hits.items()}


def test_intervals_cover(coverage):
    """95 % intervals over patients hold the truth in 93-97 % of simulated test sets (simulation error 1.3 points)."""
    assert {name: share for name, share in coverage.items()
            if not name.startswith("naive") and not 0.915 <= share <= 0.985} == {}
    assert 0.93 <= np.mean([share for name, share in coverage.items() if not name.startswith("naive")]) <= 0.97


def test_intervals_that_ignore_patients_do_not_cover(coverage):
    """The control: a bootstrap over tiles misses the truth too often when a patient's tiles resemble each other."""
    assert coverage["naive auroc"] < 0.92
    assert coverage["naive brier"] < 0.92


def test_resamples_without_a_value():
    """Undefined in over 5 % of the resamples: no covariance; in fewer, that of the rest, raised by m / (m - 1)."""
    values = np.random.default_rng(7).normal(size=(2, 100))
    expected = np.cov(values[:, 4:]) * 20 / 19
    values[0, :4] = np.nan
    assert inference.resampled_covariance(values, 20) == pytest.approx(expected)
    values[1, 50:52] = np.nan
    assert inference.resampled_covariance(values, 20) is None


def test_over_folds_by_hand():
    """Weights .25 and .75 of estimates 1 (variance .03 + .01) and 2 (.16): 1.75, variance .0625 * .04 + .5625 * .16, and Welch's
    degrees of freedom; one fold is left as it is."""
    first = (1.0, [(np.asarray(0.03), np.asarray(2.0)), (np.asarray(0.01), np.asarray(20.0))])
    second = (2.0, [(np.asarray(0.16), np.asarray(4.0))])
    estimate, ((variance, df),) = inference.over_folds([first, second], np.array([0.25, 0.75]))
    assert estimate == 1.75
    assert variance == pytest.approx(0.0025 + 0.09)
    of_first = 0.04**2 / (0.03**2 / 2 + 0.01**2 / 20)
    assert df == pytest.approx((0.0025 + 0.09) ** 2 / (0.0025**2 / of_first + 0.09**2 / 4))
    assert inference.over_folds([first], np.array([1.0])) is first


def test_auroc_within_folds():
    """A fold whose scores lie higher changes nothing; folds weigh by malignant tiles; a run's figures add up to the mean."""
    rng = np.random.default_rng(0)
    labels, folds = np.tile([1, 0, 0, 0], 60), np.repeat([0, 1, 1], 80)
    scores = rng.normal(size=(3, 240)) + labels
    runs, parts = inference.auroc_over_runs(labels, scores, folds=folds)
    moved, same = inference.auroc_over_runs(labels, scores + 5 * folds, folds=folds)
    assert moved == pytest.approx(runs)
    assert float(same[0][0]) == pytest.approx(float(parts[0][0]))
    own = [inference.delong(labels[folds == fold], scores[:, folds == fold])[0] for fold in (0, 1)]
    assert runs == pytest.approx(own[0] / 3 + own[1] * 2 / 3)
    found = inference.delong_test(labels, scores, scores[:, ::-1], folds=folds)
    assert found["difference"] == pytest.approx(found["per_run"].mean())


def test_a_paired_test_has_the_whole_covariance_and_its_own_degrees_of_freedom():
    """Patients with tiles of both classes: se^2 is c' C c of `delong`'s covariance, the crossed term included; with one run the
    degrees of freedom are those of the malignant part (carriers - 1) and the benign part."""
    rng = np.random.default_rng(3)
    patients = np.concatenate([np.repeat(np.arange(15), 6), 100 + np.arange(200)])
    labels = np.concatenate([np.tile([1, 1, 0, 0, 0, 0], 15), np.zeros(200, int)])
    effect = rng.normal(size=400)[patients]
    one, two = (labels + effect * weight + rng.normal(size=290) for weight in (1.0, 2.0))
    found = inference.delong_test(labels, one, two, patients)
    _, covariance = inference.delong(labels, np.stack([one, two]), patients)
    contrast = np.array([-1.0, 1.0])
    assert found["se"] ** 2 == pytest.approx(contrast @ covariance @ contrast)
    _, malignant, benign, crossed, counts = inference._delong(labels, np.stack([one, two]), patients)
    assert abs(contrast @ crossed @ contrast) > 0.03 * found["se"] ** 2
    assert counts == (15, 215)
    parts = [contrast @ part @ contrast for part in (malignant, benign)]
    assert found["df"] == pytest.approx(sum(parts) ** 2 / (parts[0] ** 2 / 14 + parts[1] ** 2 / 214))
