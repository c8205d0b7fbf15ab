"""Fidelity figures against closed forms on Gaussians, brute force over all pairs, published values and simulation."""
import numpy as np
import pytest
from scipy import linalg, stats
from sklearn.metrics import pairwise_distances
from sklearn.metrics.pairwise import polynomial_kernel

from lesion.stats import fidelity


def gaussian(rng, n, mean, root):
    """n rows of a normal distribution with covariance root root'."""
    return mean + rng.normal(size=(n, len(mean))) @ root.T


def cubic_mean(mean_x, cov_x, mean_y, cov_y):
    """E (x.y / D + 1)^3 for independent normal x, y: the moments of t = x.y given x are those of N(x.m, x'Sx)."""
    d, m = len(mean_x), mean_x @ mean_y
    spread = mean_y @ cov_x @ mean_y                   # variance of x.mean_y
    quadratic = np.trace(cov_x @ cov_y) + mean_x @ cov_y @ mean_x
    second = m ** 2 + spread + quadratic
    third = m ** 3 + 3 * m * spread + 3 * (m * quadratic + 2 * mean_y @ cov_x @ cov_y @ mean_x)
    return third / d ** 3 + 3 * second / d ** 2 + 3 * m / d + 1


@pytest.fixture(scope="module")
def pair():
    """Two normal distributions in 6 dimensions: (mean, root of the covariance) of each."""
    rng = np.random.default_rng(5)
    return [(rng.normal(size=6), np.eye(6) + 0.3 * rng.normal(size=(6, 6))) for _ in range(2)]


def true_kid(pair):
    (m, a), (n, b) = pair
    return (cubic_mean(m, a @ a.T, m, a @ a.T) + cubic_mean(n, b @ b.T, n, b @ b.T)
            - 2 * cubic_mean(m, a @ a.T, n, b @ b.T))


def test_kid_equals_scikit_learns_kernel_over_all_pairs(monkeypatch):
    """The blocked sums equal the textbook unbiased estimator written out with scikit-learn's polynomial kernel."""
    monkeypatch.setattr(fidelity, "BLOCK", 7)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 9)), rng.normal(0.3, 1.2, size=(33, 9))
    kxx, kyy, kxy = (polynomial_kernel(*p, degree=3, gamma=1 / 9, coef0=1) for p in ((x, x), (y, y), (x, y)))
    off = ~np.eye(40, dtype=bool), ~np.eye(33, dtype=bool)
    expected = kxx[off[0]].mean() + kyy[off[1]].mean() - 2 * kxy.mean()
    assert fidelity.kid(x, y)[0] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("grouped", [False, True])
def test_kid_standard_error_is_the_jackknife_done_by_hand(grouped):
    """The closed form equals recomputing KID with each tile (each patient) left out in turn."""
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(14, 4)), rng.normal(0.5, 1, size=(11, 4))
    patients = np.array([0, 0, 0, 1, 2, 2, 3, 3, 3, 3, 4, 5, 6, 6]) if grouped else np.arange(14)
    left = [[fidelity.kid(x[patients != p], y)[0] for p in np.unique(patients)],
            [fidelity.kid(x, np.delete(y, i, 0))[0] for i in range(11)]]
    by_hand = np.sqrt(sum((len(v) - 1) / len(v) * np.sum((v - np.mean(v)) ** 2) for v in left))
    assert fidelity.kid(x, y, patients if grouped else None)[1] == pytest.approx(by_hand, rel=1e-9)


def test_kid_of_gaussians_is_the_closed_form_and_its_error_is_honest(pair):
    """Over 200 draws the mean is the closed-form MMD^2 of the cubic kernel (unbiased) and the mean squared standard
    error is the variance of the draws."""
    rng = np.random.default_rng(2)
    draws = np.array([fidelity.kid(*(gaussian(rng, 80, *p) for p in pair)) for _ in range(200)])
    truth, spread = true_kid(pair), draws[:, 0].std(ddof=1)
    assert abs(draws[:, 0].mean() - truth) < 3.5 * spread / np.sqrt(200)
    assert np.sqrt((draws[:, 1] ** 2).mean()) == pytest.approx(spread, rel=0.2)


def test_kid_is_zero_on_average_where_nothing_differs(pair):
    """Unbiased under the null, with the standard error not below the true spread (it errs to the large side)."""
    rng = np.random.default_rng(3)
    draws = np.array([fidelity.kid(*(gaussian(rng, 60, *pair[0]) for _ in range(2))) for _ in range(200)])
    assert abs(draws[:, 0].mean()) < 3.5 * draws[:, 0].std() / np.sqrt(200)
    assert np.sqrt((draws[:, 1] ** 2).mean()) > 0.9 * draws[:, 0].std()


def test_fid_equals_the_matrix_square_root(pair):
    """The singular-value form equals scipy.linalg.sqrtm of the product of covariances, for n above and below D."""
    rng = np.random.default_rng(4)
    for n, m in ((300, 200), (5, 4)):
        x, y = gaussian(rng, n, *pair[0]), gaussian(rng, m, *pair[1])
        s, t = np.cov(x.T), np.cov(y.T)
        # tr (S T)^(1/2) by the eigenvalues of S^(1/2) T S^(1/2): stable where S is singular
        values, vectors = np.linalg.eigh(s)
        root = vectors * np.sqrt(values.clip(0)) @ vectors.T
        shared = np.sqrt(np.linalg.eigvalsh(root @ t @ root).clip(0)).sum()
        if n > 6:
            assert shared == pytest.approx(np.trace(linalg.sqrtm(s @ t)).real, rel=1e-6)
        expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s + t) - 2 * shared
        assert fidelity.fid(x, y) == pytest.approx(expected, rel=1e-6)


def test_fid_of_known_gaussians():
    """A shift gives exactly its squared length; axis-aligned spreads a and b give |mu|^2 + sum (a - b)^2."""
    rng = np.random.default_rng(5)
    x = rng.normal(size=(50, 8))
    assert fidelity.fid(x, x + 2) == pytest.approx(8 * 4, rel=1e-9)
    assert fidelity.fid(x, x) == pytest.approx(0, abs=1e-9)
    a, b, mu = np.linspace(1, 2, 4), np.linspace(2, 1, 4), np.arange(4)
    value = fidelity.fid(rng.normal(size=(60000, 4)) * a, mu + rng.normal(size=(60000, 4)) * b)
    assert value == pytest.approx((mu ** 2).sum() + ((a - b) ** 2).sum(), rel=0.02)


def test_fid_floor_falls_with_n_and_repeats_with_its_seed():
    """Two samples of one distribution are far from FID 0 at small n: the floor shows it, and shrinks as n grows."""
    real = np.random.default_rng(6).normal(size=(800, 100))
    small, large = (fidelity.real_vs_real(fidelity.fid, real, n) for n in (50, 400))
    assert small[0] > 4 * large[0] > 10
    assert small == fidelity.real_vs_real(fidelity.fid, real, 50)
    assert fidelity.at_n(fidelity.fid, real[:400], real[400:], 50) == pytest.approx(small[0], rel=0.1)
    with pytest.raises(ValueError, match="n must be"):
        fidelity.real_vs_real(fidelity.fid, real, 401)
    with pytest.raises(ValueError, match="n must be"):
        fidelity.at_n(fidelity.fid, real[:40], real, 41)


def test_density_and_coverage_by_the_papers_definitions(monkeypatch):
    """Brute force over all pairs with scikit-learn's distances, loops over every pair."""
    monkeypatch.setattr(fidelity, "BLOCK", 8)
    rng = np.random.default_rng(7)
    for k in (1, 5):
        real, fake = rng.normal(size=(30, 3)), rng.normal(0.4, 0.7, size=(21, 3))
        within, across = pairwise_distances(real), pairwise_distances(real, fake)
        radius = [sorted(np.delete(within[i], i))[k - 1] for i in range(30)]
        density = sum(across[i, j] < radius[i] for i in range(30) for j in range(21)) / (k * 21)
        coverage = sum(any(across[i, j] < radius[i] for j in range(21)) for i in range(30)) / 30
        assert fidelity.density_coverage(real, fake, k) == (pytest.approx(density), pytest.approx(coverage))


def test_density_and_coverage_of_one_distribution():
    """Published expectations: density 1, coverage 1 - 1/2^5 = .969 for N = M large; here also N = 200, M = 50."""
    assert fidelity.expected_coverage(10 ** 6, 10 ** 6) == pytest.approx(1 - 0.5 ** 5, abs=1e-5)
    rng = np.random.default_rng(8)
    draws = np.array([fidelity.density_coverage(rng.normal(size=(200, 4)), rng.normal(size=(50, 4)))
                      for _ in range(100)])
    assert draws.mean(0) == pytest.approx([1, fidelity.expected_coverage(200, 50)], abs=0.02)


def test_density_and_coverage_see_collapse_and_outliers():
    """One tile drawn over and over is dense but covers little; tiles far away are neither; an outlier among the real
    tiles does not make density perfect, as it makes precision (the paper's example)."""
    rng = np.random.default_rng(9)
    real = rng.normal(size=(300, 5))
    density, coverage = fidelity.density_coverage(real, np.repeat(real[:1] * 0.1, 300, 0))
    assert density > 1
    assert coverage < 0.2
    assert fidelity.density_coverage(real, real + 100) == (0, 0)
    around_outlier = np.concatenate([real, np.full((1, 5), 30.0)])
    assert fidelity.density_coverage(around_outlier, rng.normal(30, 1, size=(300, 5)))[0] < 0.25


def test_diversity_counts_what_differs():
    """Mean distance equals scipy's over all pairs, its error the jackknife by hand; ten pictures repeated count as at
    most ten by the Vendi score, and orthogonal ones as many as there are."""
    rng = np.random.default_rng(10)
    x = rng.normal(size=(25, 6))
    mean, error = fidelity.mean_distance(x)
    pairs = pairwise_distances(x)[np.triu_indices(25, 1)]
    assert mean == pytest.approx(pairs.mean())
    left = [fidelity.mean_distance(np.delete(x, i, 0))[0] for i in range(25)]
    assert error == pytest.approx(np.sqrt(24 / 25 * np.sum((left - np.mean(left)) ** 2)))
    zero, one = np.zeros(6), np.ones(6)
    assert fidelity.vendi(np.eye(6), zero, one) == pytest.approx(6)
    assert fidelity.vendi(np.ones((9, 6)), zero, one) == pytest.approx(1)
    wide = rng.normal(size=(10, 300))
    assert 9 < fidelity.vendi(np.repeat(wide, 20, 0), np.zeros(300), np.ones(300)) <= 10 + 1e-9


def test_adherence_is_spearmans_and_its_interval_covers():
    """Equal to scipy's coefficient; the 95 % interval holds the true rank correlation in 95 % of 500 simulated sets
    (normal pairs with r = .6: 6/pi asin(r/2)); nothing to say about a constant or of fewer than ten tiles."""
    rng = np.random.default_rng(11)
    truth, covered = 6 / np.pi * np.arcsin(0.3), 0
    for _ in range(500):
        x = rng.normal(size=80)
        y = 0.6 * x + 0.8 * rng.normal(size=80)
        r, low, high = fidelity.adherence(x, y)
        covered += low <= truth <= high
    assert r == pytest.approx(stats.spearmanr(x, y).statistic)
    assert np.arctanh(high) - np.arctanh(r) == pytest.approx(1.959964 * np.sqrt((1 + r ** 2 / 2) / 77))
    assert 0.92 <= covered / 500 <= 0.975
    assert fidelity.adherence(np.ones(50), x[:50]) is None
    assert fidelity.adherence(x[:9], y[:9]) is None
    with pytest.raises(ValueError, match="not finite"):
        fidelity.adherence(np.array([1.0, np.nan] * 10), x[:20])


def test_two_sample_auc_is_half_under_the_null_and_p_holds_its_level():
    """150 null data sets: mean AUC .5; p values under .05 and intervals without .5 are 5 % (binomial bounds)."""
    rng = np.random.default_rng(12)
    results = [fidelity.two_sample(rng.normal(size=(40, 6)), rng.normal(size=(50, 6)), seed=s, permutations=99)
               for s in range(150)]
    assert np.mean([r.auc for r in results]) == pytest.approx(0.5, abs=0.03)
    assert sum(r.p <= 0.05 for r in results) <= stats.binom.ppf(0.999, 150, 0.05)
    assert sum(not r.low <= 0.5 <= r.high for r in results) <= stats.binom.ppf(0.999, 150, 0.05)


def test_two_sample_auc_finds_a_difference_and_not_a_patient():
    """A shift is found, at the AUC that theory gives, Phi(shift / sqrt 2). Tiles that differ by patient only are told
    from synthetic ones when patients straddle folds, and not when they are kept together."""
    rng = np.random.default_rng(13)
    shifted = fidelity.two_sample(rng.normal(size=(600, 3)), rng.normal(size=(600, 3)) + [1, 0, 0], permutations=19)
    assert shifted.low < stats.norm.cdf(1 / np.sqrt(2)) < shifted.high
    assert shifted.p == 0.05
    patients = np.repeat(np.arange(30), 10)
    own = rng.normal(size=(30, 40))[patients] + 0.1 * rng.normal(size=(300, 40))
    others = rng.normal(size=(300, 40)) * np.sqrt(1.01)
    together = fidelity.two_sample(own, others, patients, permutations=0).auc
    apart = fidelity.two_sample(own, others, None, permutations=0).auc
    assert apart > together + 0.05


def test_vendi_is_about_the_centre_of_real_tiles():
    """Tiles at +-1 on each of 4 axes about a far centre, in units of their spread: 4 independent directions, of which
    opposite tiles share one, so the score is 4; about 0, or in raw units, nearly all tiles would be alike."""
    centre, spread = np.array([50.0, 80, 30, 60]), np.array([1.0, 5, 0.2, 2])
    offsets = np.concatenate([np.eye(4), -np.eye(4)]) * spread
    assert fidelity.vendi(centre + offsets, centre, spread) == pytest.approx(4)
    assert fidelity.vendi(centre + offsets, np.zeros(4), spread) < 1.1
    skewed = np.concatenate([offsets, offsets + spread * np.array([3.0, 0, 0, 0])])
    assert fidelity.vendi(centre + skewed, centre, spread) != pytest.approx(
        fidelity.vendi(centre + skewed, (centre + skewed).mean(0), spread), rel=0.02)


@pytest.mark.parametrize(("sets", "said"), [
    ((np.ones((5, 3)), np.ones((5, 4))), "all must be"),
    ((np.ones((5, 3)), np.ones((2, 3))), "too few"),
    ((np.ones((5, 3)), np.full((5, 3), np.nan)), "not finite"),
])
def test_bad_features_are_named(sets, said):
    """Unequal widths, too few tiles and NaN end in one line each, for every statistic of two sets."""
    for statistic in (fidelity.kid, fidelity.fid):
        with pytest.raises(ValueError, match=said) as error:
            statistic(*sets)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="5-th neighbour"):
        fidelity.density_coverage(np.ones((5, 3)), np.ones((5, 3)))


def test_the_floor_is_of_disjoint_samples_and_has_their_deviation():
    """Two samples share no tile; what stands beside the mean is the deviation of the values, not the error of their mean."""
    values = []

    def statistic(x, y):
        assert len(x) == len(y) == 40
        assert not set(x[:, 0]) & set(y[:, 0])
        values.append(float(x.mean() - y.mean()))
        return values[-1]
    found = fidelity.real_vs_real(statistic, np.random.default_rng(0).normal(size=(100, 3)), 40)
    assert found == (pytest.approx(np.mean(values)), pytest.approx(np.std(values, ddof=1)))
