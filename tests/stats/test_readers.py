"""Reader-study statistics: the published counts, closed forms, references, and simulated readers whose d' is known."""
import itertools
import json

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import cohen_kappa_score, roc_auc_score

from lesion.stats import inference
from lesion.stats import readers as reader_study
from lesion.stats.readers import jackknife, pool, sensitivity, simulate, tost


def ratings_from(hits, signals, false_alarms, noises):
    """One reader's ratings with these counts, 4 for "real" and 3 for "synthetic"."""
    ratings = np.repeat([4, 3, 4, 3], [hits, signals - hits, false_alarms, noises - false_alarms])
    return ratings[None], np.repeat([True, False], [signals, noises])


# ------------------------------------------------------------------------------------- one reader

def test_the_published_counts():
    """133 of 200 real and 99 of 200 synthetic right: raw d' .414 and c -.219, accuracy .58 with p = .0016, and the
    verdict is not chance. The log-linear correction, which the pooled estimate uses, gives .411 and -.218 instead."""
    assert np.round(sensitivity(133, 200, 101, 200, "none"), 3).tolist() == [0.414, -0.219]
    assert np.round(sensitivity(133, 200, 101, 200), 3).tolist() == [0.411, -0.218]
    results = reader_study.analyse(["all"], *ratings_from(133, 200, 101, 200))
    total = results["total"]
    assert (round(total["d_prime"], 3), round(total["criterion"], 3)) == (0.414, -0.219)
    assert (total["accuracy"], round(total["p"], 4)) == (0.58, 0.0016)
    assert "better than by guessing" in results["verdict"]
    assert "could not tell" not in results["verdict"]


def test_sensitivity_against_the_normal_model():
    """H = Phi(d'/2 - c), F = Phi(-d'/2 - c) of large counts give d' and c back; without a correction 0 and 1 are
    refused."""
    n = 10 ** 7
    for d, c in itertools.product((-1.0, 0.0, 0.5, 3.0), (-0.7, 0.0, 1.2)):
        hits, false_alarms = n * stats.norm.cdf(d / 2 - c), n * stats.norm.cdf(-d / 2 - c)
        assert np.allclose(sensitivity(hits, n, false_alarms, n), (d, c), atol=1e-4)
    assert np.isfinite(sensitivity(20, 20, 0, 20)).all()
    with pytest.raises(ValueError, match="use 'loglinear'"):
        sensitivity(20, 20, 3, 20, "none")


def test_loglinear_d_prime_is_nearly_unbiased():
    """Exact expectation over the binomials: at 20 + 20 tiles the bias is under 2 % up to d' = 2, under 4 % at 3."""
    counts = np.arange(21)
    for d, most in ((0.0, 1e-12), (0.414, 0.02), (1.0, 0.02), (2.0, 0.02), (3.0, 0.04)):
        chance = np.outer(stats.binom.pmf(counts, 20, stats.norm.cdf(d / 2)),
                          stats.binom.pmf(counts, 20, stats.norm.cdf(-d / 2)))
        expected = (chance * sensitivity(counts[:, None], 20, counts[None, :], 20)[0]).sum()
        assert abs(expected - d) <= most * max(d, 1)


def test_standard_error_of_d_prime():
    """The closed form agrees with the exact standard deviation of the estimator over the binomials, 200 tiles a
    class."""
    counts = np.arange(201)
    for d in (0.0, 0.4, 1.5):
        p = stats.norm.cdf(d / 2), stats.norm.cdf(-d / 2)
        chance = np.outer(stats.binom.pmf(counts, 200, p[0]), stats.binom.pmf(counts, 200, p[1]))
        values = sensitivity(counts[:, None], 200, counts[None, :], 200)[0]
        sd = np.sqrt((chance * values ** 2).sum() - (chance * values).sum() ** 2)
        se = reader_study.sensitivity_se(round(200 * p[0]), 200, round(200 * p[1]), 200)
        assert abs(se / sd - 1) < 0.03


def test_guessing_is_half_right_whatever_the_habit():
    """Equal classes: p is the plain binomial against .5. A reader who stopped early is held to a guesser's own
    share."""
    assert reader_study.guessing_p(232, 200, 200, 234) == (stats.binomtest(232, 400, 0.5).pvalue, 0.5)
    p, chance = reader_study.guessing_p(15, 15, 5, 20)  # "real" to everything, with 15 of 20 real
    assert chance == 0.75
    assert p == 1.0


def test_roc_area_matches_scikit_learn_and_delong():
    """The area is the Mann-Whitney statistic with ties; its interval is DeLong's; perfect readers get an open
    interval."""
    rng = np.random.default_rng(0)
    ratings, is_real = simulate(rng, 1, 30, 0.8)
    area, low, high = reader_study.roc_area(ratings[0], is_real)
    assert np.isclose(area, roc_auc_score(is_real, ratings[0]))
    se = np.sqrt(inference.delong(is_real.astype(int), ratings.astype(float))[1][0, 0])
    assert np.allclose([low, high], [area - 1.959964 * se, area + 1.959964 * se], atol=1e-6)
    area, low, high = reader_study.roc_area(np.where(is_real, 6, 1), is_real)
    assert (area, high) == (1.0, 1.0)
    assert 0.85 < low < 0.99


# ------------------------------------------------------------------------------------- all readers

def test_jackknife_is_leaving_out_and_counting_again():
    """Every figure with a tile left out equals the figure computed from the rest, unanswered tiles included."""
    rng = np.random.default_rng(1)
    ratings, is_real = simulate(rng, 3, 8, 0.7, 0.2)
    ratings[1, [0, 5, 12]] = 0
    found = jackknife(ratings, is_real)
    for reader, tile in itertools.product(range(3), range(16)):
        rest = np.arange(16) != tile
        r, real = ratings[reader, rest], is_real[rest]
        seen = r > 0
        counts = [(seen & kind & (r >= low)).sum() for kind in (real, ~real) for low in (4, 0)]
        d, c = sensitivity(*counts)
        expected = {"d_prime": d, "criterion": c, "area": roc_auc_score(real[seen], r[seen]),
                    "real_rate": counts[0] / counts[1], "synthetic_rate": 1 - counts[2] / counts[3]}
        expected["correct"] = (expected["real_rate"] + expected["synthetic_rate"]) / 2
        for name, value in expected.items():
            assert np.isclose(found[name][1][reader, tile], value), name


def test_pooling_by_hand():
    """Two readers, four tiles, numbers worked out on paper: Cov2, MS(R), se, and Hillis' degrees of freedom."""
    figures = np.array([1.0, 2.0])
    without = np.array([[1.0, 1.2, 0.9, 1.1], [2.0, 2.4, 1.9, 2.3]])
    pooled = pool(figures, without, np.array([True, True, False, False]))
    # shifts +-.1 and +-.1 (reader 1), +-.2 and +-.2 (reader 2); (n-1)/n = 1/2: S11 = .02, S22 = .08, S12 = .04
    assert np.isclose(pooled.estimate, 1.5)
    assert np.isclose(pooled.se, np.sqrt((0.5 + 2 * 0.04) / 2))
    assert np.isclose(pooled.df, (0.5 + 0.08) ** 2 / 0.5 ** 2)
    assert np.isclose(pooled.reader_sd, np.sqrt(0.5 - (0.05 - 0.04)))
    assert (pooled.low, pooled.high) == (None, None), "two readers are too few for an interval"
    four = np.array([1.0, 2.0, 4.0, 3.0]), np.vstack([without, without[1] * 2, without[1] * 1.5])
    assert pool(*four, np.array([True, True, False, False])).low is None, "nor are four: docs/PROTOCOL.md"
    five = pool(np.append(four[0], 1.5), np.vstack([four[1], without[0] * 1.5]), np.array([True, True, False, False]))
    assert np.isclose(five.high - five.estimate, stats.t.ppf(0.975, five.df) * five.se)


def test_readers_who_vary_less_than_their_tiles():
    """The floor of MS(R): readers of nearly the same figure, whose tiles alone would set them further apart. Covariances
    .08 own and .01 shared by hand; variance .0001 between readers is raised to .07."""
    without = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1]]) @ np.array([[.1, -.1, .3, -.3], [.3, -.3, -.1, .1],
                                                                     [.1, -.1, .3, -.3]])
    is_real = np.array([True, True, False, False])
    figures = np.array([0.99, 1.0, 1.01])
    shift = without - np.repeat([[0.0]], 4, 1)
    covariance = 0.5 * shift @ shift.T
    own, shared = np.trace(covariance) / 3, (covariance.sum() - np.trace(covariance)) / 6
    assert own - shared > 100 * figures.var(ddof=1)
    pooled = pool(figures, without, is_real)
    assert np.isclose(pooled.se ** 2, (own - shared + 3 * max(shared, 0)) / 3)
    assert pooled.reader_sd == 0


def test_no_interval_leaves_its_range():
    """Shares and areas lie in 0..1 whatever the error (symmetric intervals of -.88 to 2.01 were printed once), a
    difference of shares in -1..1; two readers have none, in the analysis too, and no verdict."""
    figures, without = np.array([.5, .95, .99, .6, .97]), np.random.default_rng(0).uniform(.3, .99, (5, 10))
    is_real = np.repeat([True, False], 5)
    line, share, difference = (pool(figures, without, is_real, span) for span in ("line", "share", "difference"))
    assert line.high > 1
    assert 0 < share.low < share.estimate < share.high < 1
    assert (difference.low, difference.high) == (max(line.low, -1), 1)
    results = reader_study.analyse(["a", "b"], *simulate(np.random.default_rng(1), 2, 20, 2.0))
    assert {row["low"] for row in results["pooled"].values()} == {None}
    assert results["equivalence"] == {"margin": 0.5, "p": None, "power": None}
    assert results["verdict"].startswith("No verdict: 2 readers are too few")
    assert "Taken one by one, 2 of 2 beat guessing" in results["verdict"]


def test_pooled_area_of_one_reader_has_delongs_error():
    """With one reader the jackknife over tiles is DeLong's variance (they agree exactly for Mann-Whitney areas)."""
    ratings, is_real = simulate(np.random.default_rng(2), 1, 25, 0.6)
    pooled = pool(*jackknife(ratings, is_real)["area"], is_real)
    variance = inference.delong(is_real.astype(int), ratings.astype(float))[1][0, 0]
    assert np.isclose(pooled.se ** 2, variance)


@pytest.mark.parametrize(("readers", "count", "d", "reader_sd", "tile_sd"), [
    (5, 20, 0.5, 0.2, 0.4), (5, 20, 1.0, 0.4, 0.5), (8, 40, 0.414, 0.2, 0.5)])
def test_simulated_readers_are_recovered(readers, count, d, reader_sd, tile_sd):
    """Crossed readers and tiles of known mean d' and c: no bias beyond 3 Monte-Carlo errors and the correction's 2 %,
    and the 95 % intervals of d' and c hold the truth in at least 92.5 % of 400 studies."""
    rng = np.random.default_rng([3, readers])
    estimates, held = [], np.zeros(2)
    for _ in range(400):
        ratings, is_real = simulate(rng, readers, count, d, 0.2, reader_sd, tile_sd)
        figures = jackknife(ratings, is_real)
        both = [pool(*figures[name], is_real) for name in ("d_prime", "criterion")]
        estimates.append([pooled.estimate for pooled in both])
        held += [pooled.low <= truth <= pooled.high for pooled, truth in zip(both, (d, 0.2), strict=True)]
    means, errors = np.mean(estimates, 0), np.std(estimates, 0) / 20
    assert (np.abs(means - [d, 0.2]) < 3 * errors + [0.02 * d, 0.004]).all()
    assert (held / 400 >= 0.925).all()


def test_intervals_that_ignore_tiles_would_be_too_short():
    """What the crossed model is for: with tiles shared by readers, a t interval over readers alone holds the truth in
    far fewer studies than 95 %, ours does not (so the test above can fail)."""
    rng = np.random.default_rng(4)
    ours = alone = 0
    for _ in range(300):
        ratings, is_real = simulate(rng, 10, 10, 0.5, tile_sd=0.8)
        values = jackknife(ratings, is_real)["d_prime"]
        pooled = pool(*values, is_real)
        ours += pooled.low <= 0.5 <= pooled.high
        half = stats.t.ppf(0.975, 9) * values[0].std(ddof=1) / np.sqrt(10)
        alone += abs(values[0].mean() - 0.5) <= half
    assert ours / 300 >= 0.925
    assert alone / 300 < 0.8


def test_kappa_against_scikit_learn_and_fleiss_own_example():
    """Cohen's kappa equals scikit-learn's; Fleiss 1971's 30 patients, 6 psychiatrists, 5 diagnoses give .430."""
    rng = np.random.default_rng(5)
    first, second = rng.integers(0, 2, (2, 40))
    assert np.isclose(reader_study.cohen_kappa(first, second), cohen_kappa_score(first, second))
    assert reader_study.cohen_kappa(np.ones(5), np.ones(5)) is None
    # unequal margins by hand: 12 of 20 agree; yes 16 and 8 of 20: expected .8 x .4 + .2 x .6 = .44
    first, second = np.repeat([1, 1, 0, 0], [8, 8, 0, 4]), np.repeat([1, 0, 1, 0], [8, 8, 0, 4])
    assert np.isclose(reader_study.cohen_kappa(first, second), (0.6 - 0.44) / 0.56)
    table = ("00060 03003 01401 00006 03030 20400 00402 20310 20040 00006 10050 11040 03300 10050 02031 "
             "00501 30012 51000 02040 10203 00006 01050 02013 20040 10041 05010 40002 02040 10500 00006")
    counts = np.array([[int(count) for count in row] for row in table.split()])
    assert round(reader_study.fleiss_kappa(counts), 3) == 0.430


# ------------------------------------------------------------------------------------- equivalence

def test_tost_closed_forms():
    """At the margin the larger one-sided p is 1/2; df = inf is the normal test; power is what the normal formula
    says."""
    assert np.isclose(tost(0.5, 0.1, 20, 0.5), 0.5)
    assert np.isclose(tost(0.1, 0.2, np.inf, 0.5), stats.norm.sf(2.0))
    assert np.isclose(tost(-0.1, 0.2, np.inf, 0.5), stats.norm.sf(2.0))
    assert np.isclose(reader_study.tost_power(0.15, np.inf), 2 * stats.norm.cdf(0.5 / 0.15 - 1.644854) - 1)
    assert reader_study.tost_power(0.4, 38) < 0.001  # one reader, 20 + 20 tiles: equivalence is out of reach


@pytest.mark.parametrize(("df", "se"), [(2, 0.15), (2, 0.2), (5, 0.2), (30, 0.2)])
def test_tost_power_at_few_degrees_of_freedom(df, se):
    """The chance that two one-sided t tests succeed at d' = 0, by 40,000 draws of an estimate and its estimated error:
    within .01, where 2 T(margin / se - t) - 1 is off by up to .4."""
    rng = np.random.default_rng(11)
    estimates, errors = rng.normal(0, se, 40000), se * np.sqrt(rng.chisquare(df, 40000) / df)
    reach = stats.t.ppf(0.95, df) * errors
    assert abs(np.mean(np.abs(estimates) + reach < 0.5) - reader_study.tost_power(se, df)) < 0.01


def test_tost_level_and_power_by_simulation():
    """Truth at the margin: "equivalent" in at most 5 % (+ 3 Monte-Carlo errors) of studies, one-sided at either margin.
    Truth 0: the power formula at the studies' own standard errors gives the simulated share within .06."""
    rng = np.random.default_rng(6)
    found, promised = {-0.5: 0, 0.0: 0, 0.5: 0}, []
    for truth in found:
        for _ in range(400):
            ratings, is_real = simulate(rng, 8, 30, truth, 0.1, 0.15, 0.3)
            pooled = pool(*jackknife(ratings, is_real)["d_prime"], is_real)
            found[truth] += tost(pooled.estimate, pooled.se, pooled.df) < 0.05
            if truth == 0:
                promised.append(reader_study.tost_power(pooled.se, pooled.df))
    assert max(found[-0.5], found[0.5]) / 400 <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 400)
    assert found[0.0] / 400 > 0.5
    assert abs(found[0.0] / 400 - np.mean(promised)) < 0.06


def test_planned_power_grows_with_readers_and_tiles():
    """3 readers of 20 + 20 tiles nearly never show equivalence, 12 readers of 40 + 40 nearly always do."""
    assert reader_study.planned_power(3, 20, studies=100) < 0.3
    assert reader_study.planned_power(12, 40, studies=100) > 0.85


# ------------------------------------------------------------------------------------ the whole study

@pytest.mark.parametrize(("d", "readers", "count", "words"), [
    (1.5, 5, 20, "told real from synthetic tiles better than by guessing"),
    (-1.5, 5, 20, "the wrong way round"),
    (0.0, 14, 60, "could not tell real from synthetic tiles"),
    (0.1, 5, 10, "Undecided"),
    (0.1, 4, 10, "No verdict"),
    (0.3, 20, 150, "less than the margin")])
def test_the_verdict_says_what_the_figures_support(d, readers, count, words):
    """Able, inverted, unable, too small a study, able but barely: each is said so, and only equivalence says "could
    not"."""
    ratings, is_real = simulate(np.random.default_rng(7), readers, count, d, tile_sd=0.2)
    results = reader_study.analyse([f"r{n}" for n in range(readers)], ratings, is_real)
    assert words in results["verdict"]
    assert ("could not tell" in results["verdict"]) == (words.startswith("could not"))
    json.dumps(results, allow_nan=False)


def test_an_unfinished_study_is_analysed_as_far_as_it_goes():
    """A reader with too few tiles is left out by name, one who stopped half way counts with theirs, no NaN is
    written."""
    ratings, is_real = simulate(np.random.default_rng(8), 4, 20, 0.8)
    ratings[1, ::2] = 0
    ratings[2, 3:] = 0
    seconds = np.where(ratings > 0, 3.0, np.nan)
    results = reader_study.analyse(list("abcd"), ratings, is_real, (ratings % 2), seconds)
    assert [row["reader"] for row in results["readers"]] == ["a", "b", "d"]
    assert results["left_out"] == ["c: 3 real and 0 synthetic tiles answered"]
    assert results["readers"][1]["signals"] == 10
    assert results["readers"][1]["seconds"] == 3.0
    assert not any(row["hasty"] for row in results["readers"])
    assert results["without_hasty"] is None
    assert results["agreement"]["tiles_by_all"] == 20
    json.dumps(results, allow_nan=False)
    with pytest.raises(ValueError, match="no reader has answered 5 real and 5 synthetic tiles yet"):
        reader_study.analyse(list("abcd"), ratings * 0, is_real)


def test_each_reader_is_tested_and_corrected():
    """A reader's row: exact rates and intervals, binomial p and Holm's over the readers, as computed one by one."""
    ratings, is_real = simulate(np.random.default_rng(9), 3, 20, 1.0)
    rows = reader_study.analyse(list("abc"), ratings, is_real)["readers"]
    for row, given in zip(rows, ratings, strict=True):
        right = int(((given >= 4) == is_real).sum())
        assert np.isclose(row["correct_rate"], right / 40)
        assert np.isclose(row["p"], stats.binomtest(right, 40).pvalue)
        assert (row["real_low"], row["real_high"]) == inference.clopper_pearson(row["hits"], 20)
    assert [row["p_holm"] for row in rows] == inference.holm([row["p"] for row in rows])


def test_one_reader_among_several_is_judged_by_the_adjusted_p():
    """Three readers, each 27 of 40 right (p .038): none beats guessing once the three are corrected for."""
    ratings = np.repeat(np.where(np.arange(40) < 20, np.where(np.arange(40) < 14, 5, 2), np.where(np.arange(40) < 33, 2, 5))
                        [None], 3, 0)
    results = reader_study.analyse(list("abc"), ratings, np.arange(40) < 20)
    assert [round(row["p"], 3) for row in results["readers"]] == [0.038] * 3
    assert "0 of 3 beat guessing (Holm)" in results["verdict"]


def test_equivalence_is_found_at_five_per_cent():
    """The verdict changes from undecided to "could not tell" where TOST's p passes .05, not .1 or .025."""
    said = {}
    for seed in range(40):
        results = reader_study.analyse([f"r{n}" for n in range(6)], *simulate(np.random.default_rng(seed), 6, 30))
        d, p = results["pooled"]["d_prime"], results["equivalence"]["p"]
        if d["low"] <= 0 <= d["high"]:
            said.setdefault((p > 0.025) + (p > 0.05) + (p > 0.1), set()).add("could not tell" in results["verdict"])
    assert said == {0: {True}, 1: {True}, 2: {False}, 3: {False}}


def test_a_reader_who_cannot_have_looked_is_marked():
    """Half a second a tile: marked in the row, named in the verdict, and d' without them beside it."""
    ratings, is_real = simulate(np.random.default_rng(12), 5, 20, 1.0)
    seconds = np.full(ratings.shape, 4.0)
    seconds[2] = 0.5
    results = reader_study.analyse(list("abcde"), ratings, is_real, seconds=seconds)
    assert [row["hasty"] for row in results["readers"]] == [False, False, True, False, False]
    rest = reader_study.analyse(list("abde"), ratings[[0, 1, 3, 4]], is_real)["pooled"]["d_prime"]
    assert results["without_hasty"] == rest
    assert "too fast to have looked (median under 1 s a tile): c (0.5 s); without them the pooled d' is " \
           f"{rest['estimate']:.2f}" in results["verdict"]


def test_malignancy_is_compared_between_classes():
    """Shares called malignant, a reader and pooled, and the paired difference real minus synthetic."""
    ratings, is_real = simulate(np.random.default_rng(10), 5, 20)
    malignant = np.zeros_like(ratings)
    malignant[:, :15] = 1  # 15 of 20 real
    malignant[:, 20:30] = 1  # 10 of 20 synthetic
    found = reader_study.analyse(list("abcde"), ratings, is_real, malignant)["malignancy"]
    assert [(row["real"], row["synthetic"]) for row in found["readers"]] == [(0.75, 0.5)] * 5
    assert np.isclose(found["difference"]["estimate"], 0.25)
    assert found["difference"]["low"] < 0.25 < found["difference"]["high"]


def test_a_row_is_the_readers_own():
    """ROC area of real above synthetic, d' +- 1.96 standard errors, the median of seconds that one long look does not move."""
    ratings, is_real = simulate(np.random.default_rng(13), 5, 20, 1.0)
    seconds = np.full(ratings.shape, 3.0)
    seconds[:, 0] = 900.0
    for row, given in zip(reader_study.analyse(list("abcde"), ratings, is_real, seconds=seconds)["readers"], ratings):
        assert row["area"] == pytest.approx(roc_auc_score(is_real, given))
        half = 1.959964 * reader_study.sensitivity_se(row["hits"], 20, row["false_alarms"], 20)
        assert (row["d_prime_low"], row["d_prime_high"]) == (pytest.approx(row["d_prime"] - half), pytest.approx(row["d_prime"] + half))
        assert row["seconds"] == 3.0


@pytest.mark.parametrize(("criterion", "habit"), [(1.0, "synthetic"), (-1.0, "real")])
def test_the_habit_is_named(criterion, habit):
    """Evidence that must be strong to be called real: the habit is to say synthetic; and the reverse."""
    ratings, is_real = simulate(np.random.default_rng(14), 6, 40, 0.5, criterion)
    assert f"The habit was to say {habit} " in reader_study.analyse(list("abcdef"), ratings, is_real)["verdict"]


def test_readers_who_are_wrong_do_not_beat_guessing():
    """Far from guessing on the wrong side: none of five beats it."""
    ratings, is_real = simulate(np.random.default_rng(15), 5, 20, -2.0)
    results = reader_study.analyse(list("abcde"), ratings, is_real)
    assert sum(row["p_holm"] < 0.05 for row in results["readers"]) > 2
    assert "0 of 5 beat guessing" in results["verdict"]


def test_the_margin_asked_for_is_the_margin_tested():
    """p and power of a study's equivalence are those of its own margin."""
    ratings, is_real = simulate(np.random.default_rng(16), 8, 40)
    results = reader_study.analyse(list("abcdefgh"), ratings, is_real, margin=0.3)
    d = results["pooled"]["d_prime"]
    df = np.inf if d["df"] is None else d["df"]
    assert results["equivalence"] == {"margin": 0.3, "p": tost(d["estimate"], d["se"], df, 0.3),
                                      "power": reader_study.tost_power(d["se"], df, 0.3)}


def test_what_was_not_answered_does_not_count():
    """A pair agrees on the tiles that both saw, whatever a third left out; the share called malignant is of the tiles asked about;
    perfect readers are judged on as many tiles as the smaller class has."""
    ratings, is_real = simulate(np.random.default_rng(17), 5, 20, 0.8)
    ratings[4, :10] = 0
    malignant = np.ones_like(ratings)
    malignant[0, :10], malignant[0, 10:15] = -1, 0
    results = reader_study.analyse(list("abcde"), ratings, is_real, malignant)
    assert {(pair["first"], pair["second"]): pair["tiles"] for pair in results["agreement"]["pairs"]}["a", "b"] == 40
    assert results["malignancy"]["readers"][0]["real"] == 0.5
    perfect = reader_study.analyse(list("abcde"), np.repeat(np.where(is_real, 6, 1)[None], 5, 0), is_real)["pooled"]["correct"]
    assert perfect["low"] == pytest.approx(inference.clopper_pearson(20, 20)[0])
