"""How like real tiles synthetic tiles are, and how varied: figures from feature vectors.

KID (Binkowski et al., arXiv:1801.01401), FID (Heusel et al., arXiv:1706.08500), density and coverage (Naeem et al.,
arXiv:2002.09797), diversity (mean distance; Vendi score, arXiv:2210.02410), prompt adherence (Spearman), and a
classifier two-sample test (Lopez-Paz & Oquab, arXiv:1610.06545). Pure functions of arrays; the large products go block
by block. Proven by tests/stats/test_fidelity.py: closed forms on Gaussians, brute force, scikit-learn, simulated
coverage and level.
"""
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import linalg, stats

from lesion.stats import inference

BLOCK = 1024  # rows of a kernel or distance matrix held at once


def check(*sets: np.ndarray, least: int = 3) -> list[np.ndarray]:
    """Feature sets [M,D] as float64, equally wide, each of at least `least` rows, finite; else ValueError."""
    sets = [np.asarray(rows, dtype=np.float64) for rows in sets]
    for rows in sets:
        if rows.ndim != 2 or rows.shape[1] != sets[0].shape[1]:
            raise ValueError(f"features of shapes {[rows.shape for rows in sets]}: all must be [tiles, values]")
        if len(rows) < least:
            raise ValueError(f"{len(rows)} tiles are too few: at least {least} are needed")
        if not np.isfinite(rows).all():
            raise ValueError(f"{np.count_nonzero(~np.isfinite(rows).all(1))} tiles have features that are not finite")
    return sets


# -------------------------------------------------------------------------------- KID

def kid(real: np.ndarray, synthetic: np.ndarray, patients: np.ndarray | None = None) -> tuple[float, float]:
    """KID and its standard error, from features [N,D] and [M,D].

    Unbiased squared MMD (arXiv:1801.01401) with k(x, y) = (x.y / D + 1)^3 over *all* pairs: it is 0 on average
    where both come from one distribution, and can be negative. Standard error: the delete-one jackknife of this
    U-statistic, exactly, from the kernel's row sums; with `patients` [N] one patient's real tiles are deleted
    together. Where both distributions are equal the statistic is degenerate and the jackknife errs to the large side.
    ValueError as `check`.
    """
    real, synthetic = check(real, synthetic)
    _, group = np.unique(np.arange(len(real)) if patients is None else patients, return_inverse=True)
    if group.max() == 0:
        raise ValueError("all real tiles are of one patient: a standard error needs at least two")
    n, m = len(real), len(synthetic)
    real_rows, synthetic_rows = _kernel_row_sums(real, real), _kernel_row_sums(synthetic, synthetic)
    cross = _kernel_row_sums(real, synthetic)
    cross_t = _kernel_row_sums(synthetic, real)
    real_sum, synthetic_sum, cross_sum = real_rows.sum(), synthetic_rows.sum(), cross.sum()
    value = real_sum / (n * (n - 1)) + synthetic_sum / (m * (m - 1)) - 2 * cross_sum / (n * m)

    size = np.bincount(group)
    left = n - size
    inside = _within_groups(real, group, size)
    without_group = ((real_sum - 2 * np.bincount(group, real_rows) + inside) / (left * (left - 1.0))
                     + synthetic_sum / (m * (m - 1)) - 2 * (cross_sum - np.bincount(group, cross)) / (left * m))
    without_one = (real_sum / (n * (n - 1)) + (synthetic_sum - 2 * synthetic_rows) / ((m - 1) * (m - 2))
                   - 2 * (cross_sum - cross_t) / (n * (m - 1)))
    return float(value), float(np.sqrt(_jackknife_variance(without_group) + _jackknife_variance(without_one)))


def _kernel(x, y):
    return (x @ y.T / x.shape[1] + 1) ** 3


def _kernel_row_sums(x, y):
    """Sum over y of k(x_i, y); without the diagonal where y is x."""
    sums = np.concatenate([_kernel(x[i:i + BLOCK], y).sum(1) for i in range(0, len(x), BLOCK)])
    return sums - ((x * x).sum(1) / x.shape[1] + 1) ** 3 if y is x else sums


def _within_groups(x, group, size):
    """Sum of k over the pairs (i, j), i != j, inside each group."""
    sums = np.zeros(len(size))
    for g in np.flatnonzero(size > 1):
        rows = x[group == g]
        sums[g] = _kernel_row_sums(rows, rows).sum()
    return sums


def _jackknife_variance(values):
    return (len(values) - 1) / len(values) * ((values - values.mean()) ** 2).sum()


# -------------------------------------------------------------------------------- FID

def fid(real: np.ndarray, synthetic: np.ndarray) -> float:
    """Frechet distance of Gaussians fitted to features [N,D], [M,D] (arXiv:1706.08500, eq. 6), unbiased covariances:
    |mu_r - mu_s|^2 + tr(S_r + S_s - 2 (S_r S_s)^(1/2)). Biased upwards at small n: report it beside `real_vs_real`.

    With S = R'R the eigenvalues of S_r S_s are the squared singular values of R_r R_s', so the trace of the square
    root is the sum of those singular values: no square root of a near-singular matrix is taken. ValueError as `check`.
    """
    real, synthetic = check(real, synthetic)
    roots = [linalg.qr(rows - rows.mean(0), mode="r", check_finite=False)[0][:min(rows.shape)] / np.sqrt(len(rows) - 1)
             for rows in (real, synthetic)]
    shared = linalg.svdvals(roots[0] @ roots[1].T, check_finite=False).sum()
    moved = ((real.mean(0) - synthetic.mean(0)) ** 2).sum()
    return float(max(0.0, moved + (roots[0] ** 2).sum() + (roots[1] ** 2).sum() - 2 * shared))


def at_n(statistic: Callable[[np.ndarray, np.ndarray], float], real: np.ndarray, synthetic: np.ndarray, n: int,
         repeats: int = 10, seed: int = 0) -> float:
    """Mean of `statistic` between random samples of n of the real [N,D] and n of the synthetic tiles [M,D]."""
    if not 3 <= n <= min(len(real), len(synthetic)):
        raise ValueError(f"samples of {n} from {len(real)} and {len(synthetic)} tiles: n must be 3 .. "
                         f"{min(len(real), len(synthetic))}")
    rng = np.random.default_rng(seed)
    return float(np.mean([statistic(real[rng.permutation(len(real))[:n]],
                                    synthetic[rng.permutation(len(synthetic))[:n]]) for _ in range(repeats)]))


def real_vs_real(statistic: Callable[[np.ndarray, np.ndarray], float], real: np.ndarray, n: int, repeats: int = 10,
                 seed: int = 0) -> tuple[float, float]:
    """Mean and standard deviation of `statistic` between two disjoint random samples of n real tiles each, `repeats`
    times: what a generator without any fault would get at this n. real [N,D]; ValueError unless 3 <= n <= N / 2."""
    if not 3 <= n <= len(real) // 2:
        raise ValueError(f"two disjoint samples of {n} from {len(real)} real tiles: n must be 3 .. {len(real) // 2}")
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(repeats):
        order = rng.permutation(len(real))
        values.append(statistic(real[order[:n]], real[order[n:2 * n]]))
    return float(np.mean(values)), float(np.std(values, ddof=1))


# ------------------------------------------------------------------- density, coverage, diversity

def density_coverage(real: np.ndarray, synthetic: np.ndarray, k: int = 5) -> tuple[float, float]:
    """Density and coverage (arXiv:2002.09797) of synthetic [M,D] against real [N,D], N > k.

    With B_i the ball about real tile i that reaches to its k-th nearest real neighbour: density = (1/kM) sum_j #{i: j
    in B_i}, 1 on average for equal distributions and not bounded by 1; coverage = share of the B_i that hold a
    synthetic tile, on average 1 - (N-1)...(N-k) / ((M+N-1)...(M+N-k)) for equal distributions (`expected_coverage`).
    """
    real, synthetic = check(real, synthetic, least=1)
    if len(real) <= k:
        raise ValueError(f"{len(real)} real tiles have no {k}-th neighbour: at least {k + 1} are needed")
    radii = np.empty(len(real))
    for i in range(0, len(real), BLOCK):
        distances = _distances(real[i:i + BLOCK], real)
        distances[np.arange(len(distances)), np.arange(i, i + len(distances))] = np.inf  # not its own neighbour
        radii[i:i + BLOCK] = np.partition(distances, k - 1, axis=1)[:, k - 1]
    hits, covered = 0, np.zeros(len(real), bool)
    for i in range(0, len(synthetic), BLOCK):
        inside = _distances(synthetic[i:i + BLOCK], real) < radii
        hits += int(inside.sum())
        covered |= inside.any(0)
    return hits / (k * len(synthetic)), float(covered.mean())


def expected_coverage(n: int, m: int, k: int = 5) -> float:
    """Expected coverage of m synthetic on n real tiles of one distribution (arXiv:2002.09797)."""
    steps = np.arange(1, k + 1)
    return float(1 - np.prod((n - steps) / (m + n - steps)))


def _distances(x, y):
    squared = (x * x).sum(1)[:, None] - 2 * x @ y.T + (y * y).sum(1)
    return np.sqrt(np.maximum(squared, 0))


def mean_distance(rows: np.ndarray) -> tuple[float, float]:
    """Mean Euclidean distance between two different tiles of features [M,D], and its jackknife standard error."""
    rows, = check(rows)
    m = len(rows)
    sums = np.concatenate([_distances(rows[i:i + BLOCK], rows).sum(1) for i in range(0, m, BLOCK)])
    left_out = (sums.sum() - 2 * sums) / ((m - 1) * (m - 2))
    return float(sums.sum() / (m * (m - 1))), float(np.sqrt(_jackknife_variance(left_out)))


def vendi(rows: np.ndarray, centre: np.ndarray, spread: np.ndarray) -> float:
    """Vendi score of features [M,D]: the effective number of different tiles, 1 .. min(M, D) (arXiv:2210.02410).

    exp of the entropy of the eigenvalues of K / M with K the cosine similarity of (rows - centre) / spread. Take
    centre [D] and spread [D] from real tiles: the cosine of raw non-negative features is near 1 for any two tiles.
    Grows with M: compare sets of one size.
    """
    rows, = check(rows, least=1)
    rows = (rows - centre) / np.maximum(spread, 1e-9)
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    share = linalg.svdvals(rows, check_finite=False) ** 2 / len(rows)
    share = share[share > 1e-12]
    return float(np.exp(-(share * np.log(share)).sum()))


# -------------------------------------------------------------------------------- prompt adherence

def adherence(asked: np.ndarray, measured: np.ndarray, level: float = 0.95) -> tuple[float, float, float] | None:
    """Spearman's rank correlation of what the prompts asked and what the tiles show, with its interval (low, high).

    asked, measured [M] numbers (ordinal classes or measures). Fisher's z with the variance (1 + r^2/2) / (M - 3) of
    Bonett & Wright 2000 (Psychometrika 65:23). None if M < 10 or either never varies: there is nothing to correlate.
    ValueError for NaN.
    """
    asked, measured = np.asarray(asked, float), np.asarray(measured, float)
    if asked.shape != measured.shape or asked.ndim != 1:
        raise ValueError(f"asked {asked.shape} and measured {measured.shape} must be two lists of the same length")
    if not (np.isfinite(asked).all() and np.isfinite(measured).all()):
        raise ValueError("asked or measured values are not finite: leave those tiles out")
    if len(asked) < 10 or np.ptp(asked) == 0 or np.ptp(measured) == 0:
        return None
    r = float(stats.spearmanr(asked, measured).statistic)
    reach = stats.norm.ppf((1 + level) / 2) * np.sqrt((1 + r * r / 2) / (len(asked) - 3))
    z = np.arctanh(np.clip(r, -1 + 1e-12, 1 - 1e-12))
    return r, float(np.tanh(z - reach)), float(np.tanh(z + reach))


# -------------------------------------------------------------------------------- classifier two-sample test

@dataclass(frozen=True)
class TwoSample:
    """auc with its interval (low, high); p, one-sided, of the null "same distribution"; tiles of each kind."""
    auc: float
    low: float
    high: float
    p: float
    real: int
    synthetic: int


def two_sample(real: np.ndarray, synthetic: np.ndarray, patients: np.ndarray | None = None, folds: int = 5,
               seed: int = 0, permutations: int = 500, limit: int = 2000) -> TwoSample:
    """Can a classifier tell synthetic tiles [M,D] from real ones [N,D]? 0.5: it cannot; 1: always (arXiv:1610.06545).

    A linear classifier (ridge regression of the label on standardised features; the ridge equals one feature's
    variance) is fitted on four folds and scored on the fifth; a patient's tiles (`patients` [N]) stay in one fold;
    `auc` is the mean over folds. Least squares in place of logistic regression makes one factorisation serve all
    relabellings. p: share of relabellings, over patients and synthetic tiles alike, with an AUC at least as high (+1 of
    both). Interval: `inference.auc_interval`, its variance raised by as much as the relabelled AUCs vary beyond theory, as folds
    share their training tiles. At most `limit` tiles of each.
    """
    real, synthetic = check(real, synthetic, least=2 * folds)
    rng = np.random.default_rng(seed)
    patients = np.arange(len(real)) if patients is None else np.unique(patients, return_inverse=True)[1]
    keep = np.sort(rng.permutation(len(real))[:limit])
    real, patients = real[keep], np.unique(patients[keep], return_inverse=True)[1]
    synthetic = synthetic[np.sort(rng.permutation(len(synthetic))[:limit])]
    count = patients.max() + 1
    if count < folds:
        raise ValueError(f"real tiles of {count} patients cannot fill {folds} folds")
    groups = np.concatenate([patients, count + np.arange(len(synthetic))])
    is_synthetic = np.arange(count + len(synthetic)) >= count
    labels = np.stack([is_synthetic, *(rng.permutation(is_synthetic) for _ in range(permutations))], axis=1)[groups]
    aucs = _cross_validated(np.concatenate([real, synthetic]), labels, groups, folds, seed)
    excess = 1.0
    if permutations > 1:
        excess = max(1.0, aucs[1:].var(ddof=1) / inference.auc_variance(0.5, len(synthetic), len(real)))
    low, high = inference.auc_interval(aucs[0], len(synthetic), len(real), excess)
    p = (1 + (aucs[1:] >= aucs[0]).sum()) / (1 + permutations)
    return TwoSample(float(aucs[0]), low, high, float(p), len(real), len(synthetic))


def _cross_validated(features, labels, groups, folds, seed):
    """Mean over folds of the AUC, for every column of labels [n,P] bool; folds are balanced by the first column."""
    from sklearn.model_selection import StratifiedGroupKFold
    aucs = []
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    for train, test in splitter.split(features, labels[:, 0], groups):
        spread = features[train].std(0)
        x, unseen = ((features[part] - features[train].mean(0)) / np.where(spread > 0, spread, 1)
                     for part in (train, test))
        target = labels[train] - labels[train].mean(0)
        solved = linalg.solve(x @ x.T + len(train) * np.eye(len(train)), target, assume_a="pos", check_finite=False)
        ranks, positive = stats.rankdata(unseen @ (x.T @ solved), axis=0), labels[test]
        m = positive.sum(0)
        with np.errstate(invalid="ignore"):  # a relabelling may leave a small fold with one kind only: 0 / 0, left out
            aucs.append(((ranks * positive).sum(0) - m * (m + 1) / 2) / (m * (len(test) - m)))
    return np.nanmean(aucs, axis=0)
