"""How sure the figures are: intervals and tests for classifiers compared on the same tiles.

AUROC: DeLong, DeLong & Clarke-Pearson 1988 (Biometrics 44:837) with the midranks of Sun & Xu 2014 (IEEE SPL 21:1389),
extended to several tiles a patient by Obuchowski 1997 (Biometrics 53:567). Everything else: a bootstrap over patients,
stratified by what they carry. Training runs: as readers in Obuchowski & Rockette 1995 (Commun Stat Simul 24:285).
Decisions: McNemar's exact test. Several contrasts: Holm 1979. Which estimator and which reference hold their level was
found by simulation: `python -m lesion.stats.simulate`, its table in docs/PROTOCOL.md.
Proven by tests/stats/test_inference.py: pROC's published values, closed forms, coverage by simulation.
"""
import numpy as np
from scipy import optimize, special, stats

from lesion.stats import classification

RESAMPLES = 2000
LEVEL = 0.95
POWER = 0.8
LEAST_PATIENTS = 10  # with malignant tiles, and with benign ones: under that no interval, no test
LEAST_RUNS = 3       # training runs from which their spread gives an interval; one run is judged as it is
_ZERO = 1e-24        # a variance below is rounding: there is no error to judge by


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


# ------------------------------------------------------------------------------- patients and training runs

Parts = list[tuple[np.ndarray, np.ndarray]]  # variances and their degrees of freedom: a mean's variance is their sum


def enough(carriers: int, healthy: int, runs: int) -> bool:
    """Whether an interval or a test may be given at all: patients of both kinds, and one training run or at least 3."""
    return min(carriers, healthy) >= LEAST_PATIENTS and (runs == 1 or runs >= LEAST_RUNS)


def over_runs(values: np.ndarray, covariance: np.ndarray, df: np.ndarray) -> Parts:
    """Parts of the variance of the mean over S training runs, for other patients and other runs alike.

    values [S, ...]: the figure of each run; covariance [S, S, ...] over patients, with df degrees of freedom. Patients
    and runs are crossed: the variance s^2 of the values over runs holds what is a run's own, its luck as well as its
    noise on these patients; the mean covariance c of two runs is what other patients would change in all of them.
    Var(mean) = s^2 / S + max(c, 0) (Obuchowski & Rockette 1995, with runs for readers). Adding s^2 / S to the variance
    of the mean over patients instead counts the noise twice: level .01 to .09 in the simulation. One run: its variance
    over patients, and all that follows holds for that run only.
    """
    values, runs = np.asarray(values, dtype=np.float64), len(values)
    if runs == 1:
        return [(covariance[0, 0], df)]
    shared = (covariance.sum((0, 1)) - np.einsum("ss...->...", covariance)) / (runs * (runs - 1))
    return [(values.var(0, ddof=1) / runs, np.asarray(runs - 1.0)), (np.maximum(shared, 0.0), df)]


def satterthwaite(parts: Parts) -> np.ndarray:
    """Degrees of freedom of a sum of variances: V^2 / sum(V_k^2 / df_k) (Welch 1947); infinite where V is 0."""
    total = sum(variance for variance, _ in parts)
    spread = sum(np.square(variance) / df for variance, df in parts)
    return np.divide(np.square(total), spread, out=np.full(np.shape(total), np.inf), where=spread > 0)


def over_folds(found: list[tuple[float, Parts]], weights: np.ndarray) -> tuple[float, Parts]:
    """(estimate, parts) of the weighted mean of the (estimate, parts) of each fold of a cross-fitted experiment.

    Folds are tested by other models, whose scores have other scales, on other tiles: figures are made within a fold and
    their variances add, V = sum w_f^2 V_f, as one part with Welch and Satterthwaite's degrees of freedom. (`critical` is
    between two approximations because one part may rest on two runs; with a part for each fold it would be too wide: level
    .01 in the simulation, this .04 to .06.) That training tiles of folds overlap is in no such interval (Bengio and
    Grandvalet 2004, JMLR 5:1089). One fold: its own.
    """
    if len(found) == 1:
        return found[0]
    terms = [(weight**2 * sum(variance for variance, _ in parts), satterthwaite(parts)) for weight, (_, parts) in zip(weights, found)]
    return float(sum(weight * estimate for weight, (estimate, _) in zip(weights, found))), \
        [(np.asarray(sum(variance for variance, _ in terms)), satterthwaite(terms))]


def folds_of(labels: np.ndarray, folds: np.ndarray | None) -> tuple[list[np.ndarray], np.ndarray]:
    """(the tiles of each fold as a mask [n], each fold's share of the malignant tiles); folds [n], None: one fold."""
    masks = [np.ones(len(labels), bool)] if folds is None else [folds == fold for fold in np.unique(folds)]
    malignant = np.array([np.count_nonzero(labels[mask]) for mask in masks], dtype=np.float64)
    return masks, malignant / malignant.sum()


def critical(parts: Parts, level: float | np.ndarray = LEVEL) -> np.ndarray:
    """How many standard errors an interval of `level` reaches to each side of a mean whose variance has `parts`.

    The mean of two approximations: Student's t with `satterthwaite` degrees of freedom, and the t of each part weighted
    by its share of the variance (Cochran 1964, Biometrics 20:191). In the simulation the first is liberal at few runs
    (level to .08), the second conservative (to .025), their mean .03 to .07 (docs/PROTOCOL.md).
    """
    tail = np.minimum((1 + np.asarray(level)) / 2, 1 - 1e-13)
    total = sum(variance for variance, _ in parts)
    share = sum(variance * special.stdtrit(np.minimum(df, 1e7), tail) for variance, df in parts)
    weighted = np.divide(share, total, out=np.zeros(np.shape(share)), where=total > 0)
    return (special.stdtrit(np.minimum(satterthwaite(parts), 1e7), tail) + weighted) / 2


def two_sided_p(estimate: float, parts: Parts) -> float | None:
    """p of "it is 0": the level at which the interval `estimate` +- `critical` se just touches 0. None without error."""
    variance = float(sum(variance for variance, _ in parts))
    if variance < _ZERO:
        return None
    statistic = abs(estimate) / np.sqrt(variance)

    def surplus(log_p):
        return float(critical(parts, 1 - np.exp(log_p))) - statistic

    lowest = np.log(1e-12)
    if surplus(lowest) < 0:
        return float(np.exp(lowest))
    return float(np.exp(optimize.brentq(surplus, lowest, 0.0))) if statistic > 0 else 1.0


def difference_interval(estimate: float, parts: Parts, ceiling: float = 1.0, level: float = LEVEL) -> tuple[float, float] | None:
    """Interval of a difference of two figures in [0, ceiling]: estimate +- `critical` se, cut to [-ceiling, ceiling].
    None without error to judge by."""
    variance = float(sum(variance for variance, _ in parts))
    if variance < _ZERO:
        return None
    half = float(critical(parts, level)) * np.sqrt(variance)
    return max(float(estimate - half), -ceiling), min(float(estimate + half), ceiling)


def interval(estimate: float, parts: Parts, patients: int, ceiling: float = 1.0,
             level: float = LEVEL) -> tuple[float, float] | None:
    """Interval of a figure in [0, ceiling]: `critical` standard errors to each side on the logit scale.

    An estimate at an end has no logit: there the exact binomial interval over `patients` stands in (how many the figure
    is a rate of). None without a value or without error to judge by (scores that never vary).
    """
    share = estimate / ceiling
    if np.isnan(share):
        return None
    if share <= 0 or share >= 1:
        low, high = clopper_pearson(0 if share <= 0 else patients, patients, level)
        return low * ceiling, high * ceiling
    variance = float(sum(variance for variance, _ in parts))
    if variance < _ZERO:
        return None
    reach = float(critical(parts, level)) * np.sqrt(variance) / ceiling / (share * (1 - share))
    low, high = special.expit(special.logit(share) + np.array([-reach, reach])) * ceiling
    return float(low), float(high)


def detectable(parts: Parts, alpha: float = 1 - LEVEL, power: float = POWER) -> float | None:
    """The true difference that another study of this size finds at `alpha` with chance `power`: k se, where
    P(Z + k u1 > c u2) = power, Z normal, c the critical value, u1 and u2 the errors that this and the other study
    estimate (roots of chi-square / df: one may be lucky and the other not). k is the mean of two, as in `critical`.
    None without error to judge by."""
    variance = float(sum(variance for variance, _ in parts))
    if variance < _ZERO:
        return None
    limit = float(critical(parts, 1 - alpha))

    def reach(df):
        errors = np.sqrt(stats.chi2.ppf((np.arange(50) + 0.5) / 50, min(df, 1e5)) / min(df, 1e5))
        return optimize.brentq(lambda k: special.ndtr(k * errors[:, None] - limit * errors).mean() - power, 0.0, 1e4,
                               xtol=1e-3)

    weighted = sum(float(part) / variance * reach(float(df)) for part, df in parts if part > 0)
    return float((reach(float(satterthwaite(parts))) + weighted) / 2 * np.sqrt(variance))


# ---------------------------------------------------------------------------------------------- DeLong

def delong(labels: np.ndarray, scores: np.ndarray, patients: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """AUROC of K score vectors on the same tiles and their covariance: aurocs [K], covariance [K, K].

    labels [n] 0/1, scores [K, n], patients [n] ids (None: every tile is a patient of its own, plain DeLong).
    With placements V10 (malignant tile: share of benign tiles below it, ties half) and V01 (benign tile: share of
    malignant tiles above it), summed by patient i and centred to D10_i, D01_i (Obuchowski 1997, eq. 4-7):
    cov = I10/(I10-1) sum D10 D10' / m^2 + I01/(I01-1) sum D01 D01' / n^2 + 2 I/(I-1) sum (D10 D01')_sym / (m n).
    """
    aurocs, malignant, benign, crossed, _ = _delong(labels, scores, patients)
    return aurocs, malignant + benign + crossed


def _delong(labels, scores, patients):
    """aurocs [K], the covariance's three terms [K, K] and (patients with malignant, with benign tiles)."""
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
    count = group.max() + 1
    d10 = _by_patient(v10 - aurocs[:, None], group[labels == 1], count)
    d01 = _by_patient(v01 - aurocs[:, None], group[labels == 0], count)
    carriers, healthy = (len(np.unique(group[labels == value])) for value in (1, 0))
    if carriers < 2 or healthy < 2:
        raise ValueError("a covariance needs at least two patients with malignant and two with benign tiles")
    cross = d10 @ d01.T
    return (aurocs, carriers / (carriers - 1) * (d10 @ d10.T) / m ** 2, healthy / (healthy - 1) * (d01 @ d01.T) / n ** 2,
            count / (count - 1) * (cross + cross.T) / (m * n), (carriers, healthy))


def _by_patient(values, group, count):
    """Sums of `values` [K, tiles] over patients [K, count]."""
    return np.stack([np.bincount(group, row, count) for row in values])


def auroc_over_runs(labels: np.ndarray, scores: np.ndarray, patients: np.ndarray | None = None,
                    folds: np.ndarray | None = None) -> tuple[np.ndarray, Parts]:
    """(AUROC of each run [S], parts of the variance of their mean) of scores [S, n], within folds [n] where there are any:
    DeLong's covariance over patients through `over_runs` and `over_folds`."""
    masks, weights = folds_of(labels, folds)
    runs, found = np.zeros(len(scores)), []
    for mask, weight in zip(masks, weights):
        aurocs, *terms, counts = _delong(labels[mask], scores[:, mask], None if patients is None else patients[mask])
        df = satterthwaite([(_shared(part), np.asarray(count - 1.0)) for part, count in zip(terms[:2], counts)])
        found.append((float(aurocs.mean()), over_runs(aurocs, sum(terms), df)))
        runs += weight * aurocs
    return runs, over_folds(found, weights)[1]


def delong_test(labels: np.ndarray, first: np.ndarray, second: np.ndarray, patients: np.ndarray | None = None,
                folds: np.ndarray | None = None) -> dict:
    """Paired test of mean AUROC of `second` minus that of `first`, scores [seeds, n] each, seed s of both arms paired.

    The paired differences of the S runs and their DeLong covariance over patients go through `over_runs`; the covariance
    has the Satterthwaite degrees of freedom of its malignant part (carriers - 1) and its benign part. One run: DeLong's
    statistic with a t reference, which says nothing of another run. folds [n]: pairs are compared within a fold, see
    `over_folds`. Returns difference, se, statistic and p (None where no error can be computed), df, low, high (95 %; None
    likewise), parts, first, second (mean AUROCs), per_run (differences [S]).
    """
    labels = np.asarray(labels)
    first, second = np.atleast_2d(first), np.atleast_2d(second)
    if first.shape != second.shape:
        raise ValueError(f"the arms have {len(first)} and {len(second)} seeds: a paired test needs the same in both")
    seeds, scores = len(first), np.concatenate([first, second])
    masks, weights = folds_of(labels, folds)
    aurocs, found = np.zeros(2 * seeds), []
    contrast = np.hstack([-np.eye(seeds), np.eye(seeds)])
    for mask, weight in zip(masks, weights):
        of_fold, malignant, benign, crossed, counts = _delong(labels[mask], scores[:, mask], None if patients is None else patients[mask])
        by_class = [contrast @ part @ contrast.T for part in (malignant, benign)]
        df = float(satterthwaite([(_shared(part), np.asarray(count - 1.0)) for part, count in zip(by_class, counts)]))
        differences = contrast @ of_fold
        parts = over_runs(differences, sum(by_class) + contrast @ crossed @ contrast.T, np.asarray(df))
        found.append((float(differences.mean()), parts))
        aurocs += weight * of_fold
    difference, parts = over_folds(found, weights)
    se = float(np.sqrt(sum(variance for variance, _ in parts)))
    p = two_sided_p(difference, parts)
    low, high = difference_interval(difference, parts) or (None, None)
    effective = float(satterthwaite(parts))
    return {"difference": difference, "se": se, "statistic": None if p is None else difference / se,
            "df": None if np.isinf(effective) else effective, "p": p, "low": low, "high": high, "parts": parts,
            "first": float(aurocs[:seeds].mean()), "second": float(aurocs[seeds:].mean()), "per_run": contrast @ aurocs}


def _shared(covariance):
    """What the runs share: the mean off the diagonal, at least 0; of one run its variance."""
    runs = len(covariance)
    if runs == 1:
        return covariance[0, 0]
    return max((covariance.sum() - np.trace(covariance)) / (runs * (runs - 1)), 0.0)


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


def bootstrap(labels: np.ndarray, scores: np.ndarray, thresholds: list, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Every metric of every seed in each resample: name -> [S, R].

    scores [S, n], thresholds: S numbers or [n] arrays, weights [R, n] from `patient_resamples`. Arms given the same
    weights are paired: subtract their results for the distribution of a difference.
    """
    values = [classification.evaluate(labels, s, t, weights) for s, t in zip(scores, thresholds, strict=True)]
    return {name: np.stack([value[name] for value in values]) for name in classification.METRICS}


def resampled_covariance(values: np.ndarray, patients: int) -> np.ndarray | None:
    """Covariance over patients [S, S, ...] of a figure of S runs, from its resamples [S, R, ...].

    Raised by m / (m - 1) for m = `patients`, which the bootstrap falls short by. None if over 5 % of the resamples have
    no value (precision where nothing is called malignant).
    """
    defined = ~np.isnan(values).any(axis=(0, *range(2, values.ndim)))
    if defined.mean() < 0.95:
        return None
    values = values[:, defined]
    centred = values - values.mean(1, keepdims=True)
    return np.einsum("sr...,tr...->st...", centred, centred) / (len(centred[0]) - 1) * patients / (patients - 1)


def rate_over_patients(hits: np.ndarray, patients: np.ndarray) -> tuple[float, float | None, float | None]:
    """Share of hits [S, n] (bool), mean over S runs, with its 95 % interval over the patients [n] the tiles are of.

    A ratio of patients' sums: with e_sp = sum over p's tiles of (hit - rate_s), covariance G / (G - 1) e e' / n^2 over G
    patients (Cochran 1977, section 3.12). low and high are None with too few patients or runs.
    """
    hits = np.atleast_2d(np.asarray(hits, dtype=np.float64))
    rates = hits.mean(1)
    _, group = np.unique(patients, return_inverse=True)
    count = int(group.max()) + 1
    found = None
    if enough(count, count, len(hits)):
        residuals = _by_patient(hits - rates[:, None], group, count)
        covariance = count / (count - 1) * (residuals @ residuals.T) / hits.shape[1] ** 2
        found = interval(float(rates.mean()), over_runs(rates, covariance, np.asarray(count - 1.0)), count)
    return float(rates.mean()), *(found or (None, None))


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
