"""How sure the figures are: intervals and tests for classifiers compared on the same tiles.

AUROC: DeLong, DeLong & Clarke-Pearson 1988 (Biometrics 44:837) with the midranks of Sun & Xu 2014 (IEEE SPL 21:1389),
extended to several tiles a patient by Obuchowski 1997 (Biometrics 53:567). Everything else: a bootstrap over patients,
stratified by what they carry. Decisions: McNemar's exact test. Several contrasts: Holm 1979.
Proven by tests/stats/test_inference.py: pROC's published values, closed forms, coverage by simulation.
"""
import numpy as np
from scipy import optimize, special, stats

from lesion.stats import classification

RESAMPLES = 2000
LEVEL = 0.95


def clopper_pearson(count: float, n: float, level: float = LEVEL) -> tuple[float, float]:
    """Exact binomial interval of count / n (Clopper & Pearson 1934). A count averaged over seeds may be fractional."""
    if not 0 <= count <= n or n <= 0:
        raise ValueError(f"count {count} of {n}: the count must lie between 0 and n, and n above 0")
    tail = (1 - level) / 2
    low = stats.beta.ppf(tail, count, n - count + 1) if count > 0 else 0.0
    high = stats.beta.ppf(1 - tail, count + 1, n - count) if count < n else 1.0
    return float(low), float(high)


def auc_interval(auc: float, m: int, n: int, excess: float = 1.0, level: float = LEVEL) -> tuple[float, float]:
    """Interval of an area under the ROC curve of m positives and n negatives that is not empty at 0 or 1: all A with
    |auc - A| <= z sqrt(excess V(A)), V as in `auc_variance` (Newcombe 2006, Statistics in Medicine 25:559, method 5).
    """
    z = stats.norm.ppf((1 + level) / 2)

    def surplus(a):
        return (auc - a) ** 2 - z * z * excess * auc_variance(a, m, n)

    low = optimize.brentq(surplus, 0, auc - 1e-9) if auc > 1e-6 else 0.0
    high = optimize.brentq(surplus, auc + 1e-9, 1) if auc < 1 - 1e-6 else 1.0
    return float(low), float(high)


def auc_variance(a: float, m: int, n: int) -> float:
    """A (1-A) (1 + (N-1) (1-A)/(2-A) + (N-1) A/(1+A)) / (mn), N = (m+n) / 2 (Hanley & McNeil's, made symmetric)."""
    half = (m + n) / 2 - 1
    return a * (1 - a) * (1 + half * (1 - a) / (2 - a) + half * a / (1 + a)) / (m * n)


# ---------------------------------------------------------------------------------------------- DeLong

def delong(labels: np.ndarray, scores: np.ndarray, patients: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """AUROC of K score vectors on the same tiles and their covariance: aurocs [K], covariance [K, K].

    labels [n] 0/1, scores [K, n], patients [n] ids (None: every tile is a patient of its own, plain DeLong).
    With placements V10 (malignant tile: share of benign tiles below it, ties half) and V01 (benign tile: share of
    malignant tiles above it), summed by patient i and centred to D10_i, D01_i (Obuchowski 1997, eq. 4-7):
    cov = I10/(I10-1) sum D10 D10' / m^2 + I01/(I01-1) sum D01 D01' / n^2 + 2 I/(I-1) sum (D10 D01')_sym / (m n).
    """
    labels, scores = np.asarray(labels), np.atleast_2d(np.asarray(scores, dtype=np.float64))
    malignant, benign = scores[:, labels == 1], scores[:, labels == 0]
    m, n = malignant.shape[1], benign.shape[1]
    if m == 0 or n == 0:
        raise ValueError("tiles of one class only: both benign and malignant tiles are needed")
    ranks = stats.rankdata(np.concatenate([malignant, benign], axis=1), axis=1)
    v10 = (ranks[:, :m] - stats.rankdata(malignant, axis=1)) / n
    v01 = 1 - (ranks[:, m:] - stats.rankdata(benign, axis=1)) / m
    aurocs = v10.mean(1)
    _, group = np.unique(np.arange(len(labels)) if patients is None else patients, return_inverse=True)
    d10, with_malignant = _by_patient(v10 - aurocs[:, None], group[labels == 1], group.max() + 1)
    d01, with_benign = _by_patient(v01 - aurocs[:, None], group[labels == 0], group.max() + 1)
    if with_malignant < 2 or with_benign < 2:
        raise ValueError("a covariance needs at least two patients with malignant and two with benign tiles")
    cross = d10 @ d01.T
    count = group.max() + 1
    covariance = (with_malignant / (with_malignant - 1) * (d10 @ d10.T) / m ** 2
                  + with_benign / (with_benign - 1) * (d01 @ d01.T) / n ** 2
                  + count / (count - 1) * (cross + cross.T) / (m * n))
    return aurocs, covariance


def _by_patient(values, group, count):
    """Sums of `values` [K, tiles] over patients [K, count], and how many patients have any."""
    sums = np.zeros((len(values), count))
    np.add.at(sums, (slice(None), group), values)
    return sums, len(np.unique(group))


def delong_test(labels: np.ndarray, first: np.ndarray, second: np.ndarray, patients: np.ndarray | None = None) -> dict:
    """Paired test of mean AUROC of `second` minus that of `first`, scores [seeds, n] each, seed s of both arms paired.

    The mean over seeds is a linear contrast L of 2S AUROCs, so its variance over tiles is L cov L'. Training adds the
    variance of the S paired differences / S; t with Welch-Satterthwaite degrees of freedom, of which the tiles' part
    counts as infinite. With one seed this is DeLong's z test and says nothing about another training run.
    Returns difference, se, statistic, df (None = normal), p, low, high (95 %), first, second (mean AUROCs).
    """
    first, second = np.atleast_2d(first), np.atleast_2d(second)
    if first.shape != second.shape:
        raise ValueError(f"the arms have {len(first)} and {len(second)} seeds: a paired test needs the same in both")
    seeds = len(first)
    aurocs, covariance = delong(labels, np.concatenate([first, second]), patients)
    contrast = np.repeat([-1.0, 1.0], seeds) / seeds
    differences = aurocs[seeds:] - aurocs[:seeds]
    over_tiles = max(float(contrast @ covariance @ contrast), 0.0)
    over_seeds = float(differences.var(ddof=1)) / seeds if seeds > 1 else 0.0
    difference, se = float(differences.mean()), float(np.sqrt(over_tiles + over_seeds))
    df = (over_tiles + over_seeds) ** 2 * (seeds - 1) / over_seeds ** 2 if over_seeds > 0 else np.inf
    if se < 1e-12:  # the same ranking in both arms: no difference and no doubt about it
        return _test(difference, 0.0, 0.0, None, 1.0, difference, difference, aurocs, seeds)
    statistic = difference / se
    half = float(stats.t.ppf(0.5 + LEVEL / 2, df)) * se
    p = float(2 * stats.t.sf(abs(statistic), df))
    return _test(difference, se, statistic, None if np.isinf(df) else float(df), p, difference - half,
                 difference + half, aurocs, seeds)


def _test(difference, se, statistic, df, p, low, high, aurocs, seeds):
    return {"difference": difference, "se": se, "statistic": statistic, "df": df, "p": p, "low": low, "high": high,
            "first": float(aurocs[:seeds].mean()), "second": float(aurocs[seeds:].mean())}


# ------------------------------------------------------------------------------------------- bootstrap

def patient_resamples(labels: np.ndarray, patients: np.ndarray | None, count: int = RESAMPLES,
                      seed: int = 0) -> np.ndarray:
    """How often each tile counts in each resample: [count, n] uint16.

    Patients are drawn with replacement and bring all their tiles, within three strata: patients with malignant tiles
    only, with both, with benign only; so every resample has both classes. patients None: every tile on its own.
    """
    labels = np.asarray(labels)
    _, group = np.unique(np.arange(len(labels)) if patients is None else patients, return_inverse=True)
    malignant = np.bincount(group, labels == 1) > 0
    benign = np.bincount(group, labels == 0) > 0
    rng = np.random.default_rng(seed)
    draws = np.zeros((count, len(malignant)), dtype=np.uint16)
    for stratum in (malignant & ~benign, malignant & benign, benign & ~malignant):
        members = np.flatnonzero(stratum)
        if len(members):
            picks = rng.integers(len(members), size=(count, len(members)))
            flat = picks + np.arange(count)[:, None] * len(members)
            drawn = np.bincount(flat.ravel(), minlength=count * len(members))
            draws[:, members] = drawn.reshape(count, len(members))
    return draws[:, group]


def seed_resamples(seeds: int, count: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Weights of the training seeds in each resample: [count, seeds], rows sum to 1.

    S - 1 of S seeds are drawn with replacement: the rescaled bootstrap (Rao & Wu 1988), whose variance of a mean is
    the unbiased s^2 / S, where drawing S would give (S - 1) / S of it, a third too little at three seeds.
    """
    if seeds == 1:
        return np.ones((count, 1))
    picks = np.random.default_rng([seed, 1]).integers(seeds, size=(count, seeds - 1))
    return np.stack([(picks == s).sum(1) for s in range(seeds)], axis=1) / (seeds - 1)


def bootstrap(labels: np.ndarray, scores: np.ndarray, thresholds: list, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Every metric of every seed in each resample: name -> [S, R].

    scores [S, n], thresholds: S numbers or [n] arrays, weights [R, n] from `patient_resamples`. Arms given the same
    weights are paired: subtract their results for the distribution of a difference.
    """
    values = [classification.evaluate(labels, s, t, weights) for s, t in zip(scores, thresholds, strict=True)]
    return {name: np.stack([value[name] for value in values]) for name in classification.METRICS}


def mean_over_seeds(values: np.ndarray, seed_weights: np.ndarray) -> np.ndarray:
    """Means [R] of `values` [S, R] of `bootstrap` under weights [R, S] of `seed_resamples`; NaN if one has no value."""
    return np.einsum("sr,rs->r", values, seed_weights)


def interval(estimate: float, distribution: np.ndarray, patients: int, ceiling: float = 1.0, carriers: int | None = None,
             level: float = LEVEL) -> tuple[float, float] | None:
    """Interval of a metric in [0, ceiling]: estimate +- t x the bootstrap's standard error, on the logit scale.

    `patients`: how many carry malignant tiles; t has that many less one degrees of freedom and the error is widened by
    sqrt(m / (m - 1)). At 79 malignant tiles it covers 93-97 % where the plain percentile interval falls to 91 %; at 28
    it still covers only about 91 % for AUPRC and 90 % for pAUC. An estimate at an end has no logit: there the exact
    binomial interval over `carriers` stands in (how many patients the metric is a rate of; default `patients`). None
    where the metric has no value (see `usable`).
    """
    distribution = usable(distribution)
    if distribution is None or np.isnan(estimate):
        return None
    share = estimate / ceiling
    if share <= 0 or share >= 1:
        count = carriers or patients
        low, high = clopper_pearson(0 if share <= 0 else count, count, level)
        return low * ceiling, high * ceiling
    reach = _reach(patients, level) * distribution.std() / ceiling / (share * (1 - share))
    low, high = special.expit(special.logit(share) + np.array([-reach, reach])) * ceiling
    return float(low), float(high)


def difference_interval(distribution: np.ndarray, patients: int, level: float = LEVEL) -> tuple[float, float] | None:
    """Percentile interval of a paired difference, its tails moved out for few patients (Hesterberg 2015,
    Am. Stat. 69:371, section 4.3, 'expanded percentile'). None as `interval`."""
    distribution = usable(distribution)
    if distribution is None:
        return None
    tail = stats.norm.cdf(-_reach(patients, level))
    low, high = np.quantile(distribution, [tail, 1 - tail])
    return float(low), float(high)


def p_value(distribution: np.ndarray, patients: int) -> float | None:
    """Two-sided p of 'no difference' that agrees with `difference_interval`: the level at which that just touches 0."""
    distribution = usable(distribution)
    if distribution is None:
        return None
    hits = min((distribution <= 0).sum(), (distribution >= 0).sum())
    tail = min(0.5, (1 + hits) / (1 + len(distribution)))
    return float(2 * stats.t.sf(stats.norm.isf(tail) / np.sqrt(patients / (patients - 1)), patients - 1))


def usable(distribution: np.ndarray) -> np.ndarray | None:
    """The resamples that give a value; None if over 5 % do not (precision where nothing is called malignant)."""
    defined = distribution[~np.isnan(distribution)]
    return defined if len(defined) >= 0.95 * len(distribution) else None


def _reach(patients, level):
    if patients < 2:
        raise ValueError("an interval needs at least two patients with malignant tiles")
    return stats.t.ppf((1 + level) / 2, patients - 1) * np.sqrt(patients / (patients - 1))


# ---------------------------------------------------------------------------------- decisions, families

def mcnemar(first: np.ndarray, second: np.ndarray) -> dict:
    """Exact McNemar test (1947; binomial on the discordant pairs) of two [n] boolean vectors 'decided correctly'.

    Returns both, first_only, second_only, neither (the 2x2 table) and p.
    """
    first, second = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    only_first, only_second = int((first & ~second).sum()), int((~first & second).sum())
    discordant = only_first + only_second
    p = float(stats.binomtest(only_first, discordant, 0.5).pvalue) if discordant else 1.0
    return {"both": int((first & second).sum()), "first_only": only_first, "second_only": only_second,
            "neither": int((~first & ~second).sum()), "p": p}


def holm(p_values: list[float]) -> list[float]:
    """Holm's step-down adjusted p-values (1979) in the given order: max over j <= i of (m - j + 1) p_(j), at most 1."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1.0)
    return adjusted.tolist()
