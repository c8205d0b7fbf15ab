"""Can readers tell real tiles from synthetic ones? Signal detection, pooled over readers and tiles, and equivalence.

A "signal" is a real tile, a "hit" a real tile called real, a "false alarm" a synthetic tile called real.
Sensitivity and criterion: Green & Swets 1966; log-linear correction: Hautus 1995 (Behav Res Meth 27:46); variance:
Gourevitch & Galanter 1967. ROC area: Mann-Whitney with DeLong's variance (lesion.stats.inference). Pooling: readers
and tiles both random and crossed, by Obuchowski & Rockette 1995 (Commun Stat Simul 24:285) with the jackknife over
tiles and the degrees of freedom of Hillis 2007 (Stat Med 26:596), for one modality as in Hillis 2014 (Stat Med 33:330).
Equivalence: two one-sided tests, Schuirmann 1987. Agreement: Cohen 1960, Fleiss 1971.
Proven by tests/stats/test_readers.py: the seed study's counts, closed forms, simulated readers of known d'.
"""
from dataclasses import dataclass

import numpy as np
from scipy import stats

from lesion.stats import inference
from lesion.stats.agreement import cohen_kappa, fleiss_kappa

SCALE = {1: "surely synthetic", 2: "probably synthetic", 3: "rather synthetic",
         4: "rather real", 5: "probably real", 6: "surely real"}
MARGIN = 0.5  # of d': an unbiased reader right on Phi(0.25) = 60 % of the tiles
ALPHA = 0.05
SPANS = {"d_prime": "line", "criterion": "line"}  # of the pooled figures; the others are shares
COUNTS = ("hits", "signals", "false_alarms", "noises")
PUBLISHED = (133, 200, 101, 200)  # the seed study: 133 real and 99 synthetic tiles right
MIN_TILES = 5  # of each class, or a reader has no figures
LEAST = 5      # readers from which their spread gives an interval for others (docs/PROTOCOL.md); one reader is judged alone
HASTY = 1.0    # seconds a tile (median) under which a reader can hardly have looked


# ------------------------------------------------------------------------------------- one reader

def sensitivity(hits, signals, false_alarms, noises, correction: str = "loglinear"):
    """d' = z(H) - z(F) and c = -(z(H) + z(F)) / 2, z = Phi^-1 (Green & Swets 1966); counts may be arrays.

    correction "loglinear": H = (hits + .5) / (signals + 1), F likewise (Hautus 1995), finite for every count.
    "none": raw rates; ValueError where one is 0 or 1.
    """
    if correction not in ("loglinear", "none"):
        raise ValueError(f"correction {correction!r}: allowed are 'loglinear' and 'none'")
    half = 0.5 if correction == "loglinear" else 0.0
    hit_rate = (np.asarray(hits) + half) / (np.asarray(signals) + 2 * half)
    false_rate = (np.asarray(false_alarms) + half) / (np.asarray(noises) + 2 * half)
    for rate in (hit_rate, false_rate):
        if not ((rate > 0) & (rate < 1)).all():
            raise ValueError("a rate of 0 or 1 has no finite d' without a correction: use 'loglinear'")
    z_hit, z_false = stats.norm.ppf(hit_rate), stats.norm.ppf(false_rate)
    return z_hit - z_false, -0.5 * (z_hit + z_false)


def sensitivity_se(hits: int, signals: int, false_alarms: int, noises: int) -> float:
    """Standard error of d' over tiles at log-linear rates: sqrt(sum p(1-p) / (n phi(z)^2)) (Gourevitch & Galanter)."""
    p = np.array([(hits + 0.5) / (signals + 1), (false_alarms + 0.5) / (noises + 1)])
    return float(np.sqrt(np.sum(p * (1 - p) / (np.array([signals, noises]) * stats.norm.pdf(stats.norm.ppf(p)) ** 2))))


def guessing_p(correct: int, signals: int, noises: int, said_real: int) -> tuple[float, float]:
    """Exact binomial, two-sided: p of `correct` right answers by guessing, and a guesser's expected share of them.

    With as many real as synthetic tiles a guesser is right half the time whatever the habit; a reader who stopped early
    is compared with a guesser who says "real" as often.
    """
    n = signals + noises
    share = said_real / n
    chance = 0.5 if signals == noises else (share * signals + (1 - share) * noises) / n
    return float(stats.binomtest(correct, n, chance).pvalue), float(chance)


def roc_area(ratings: np.ndarray, is_real: np.ndarray) -> tuple[float, float, float]:
    """Area under the ROC curve of the 6-point ratings [n] and its 95 % interval (DeLong; with perfect separation, where
    DeLong's variance is 0, the interval of Newcombe 2006, Stat Med 25:559, method 5)."""
    areas, covariance = inference.delong(is_real.astype(int), ratings[None].astype(float))
    area, se = float(areas[0]), float(np.sqrt(max(covariance[0, 0], 0.0)))
    if se < 1e-9:
        return area, *inference.auc_interval(area, int(is_real.sum()), int((~is_real).sum()))
    half = stats.norm.ppf(0.975) * se
    return area, max(area - half, 0.0), min(area + half, 1.0)


# ------------------------------------------------------------------------------------- all readers

@dataclass
class Pooled:
    """A mean over readers: estimate; se, df and 95 % interval for other readers and other tiles (None with 2 readers)."""
    estimate: float
    se: float
    df: float
    low: float | None
    high: float | None
    reader_sd: float | None  # between readers, beyond what tiles explain; None with one reader


def pool(figures: np.ndarray, without: np.ndarray, is_real: np.ndarray, span: str = "line") -> Pooled:
    """Mean of a figure over readers; readers and tiles both random (Obuchowski & Rockette 1995, Hillis 2007, 2014).

    figures [R]: theta_r; without [R, M]: theta_r with tile j left out (theta_r itself where r did not see j).
    Jackknife covariance over tiles, by class k with n_k tiles: S = sum_k (n_k - 1) / n_k sum_j d_j d_j', d centred
    within the class. Var, Cov2 = means of S on and off its diagonal, MS(R) = variance of theta_r, raised to Var - Cov2
    where it falls short (readers who vary less than their tiles alone would make them);
    var(mean) = (MS(R) + R max(Cov2, 0)) / R, df = (MS(R) + R max(Cov2, 0))^2 / (MS(R)^2 / (R - 1)).
    With one reader the variance over tiles is all there is: the interval then holds for that reader only. With two to four
    there is none. span: where the figure lies, "line" (d', c), "share" (0..1: the interval is made on the logit scale) or
    "difference" (of shares: cut to -1..1), so that no interval leaves it.
    """
    readers = len(figures)
    covariance = np.zeros((readers, readers))
    for members in (is_real, ~is_real):
        count = int(members.sum())
        if count > 1:
            shift = without[:, members] - without[:, members].mean(1, keepdims=True)
            covariance += (count - 1) / count * shift @ shift.T
    if readers == 1:
        total, df, reader_sd = float(covariance[0, 0]), float(len(is_real) - 2), None
    else:
        between = float(np.var(figures, ddof=1))
        shared = (covariance.sum() - np.trace(covariance)) / (readers * (readers - 1))
        own = np.trace(covariance) / readers - shared
        reader_sd = float(np.sqrt(max(between - own, 0.0)))
        between = max(between, own)
        total = between + readers * max(shared, 0.0)
        df = total ** 2 * (readers - 1) / between ** 2 if between > 0 else np.inf
    se = float(np.sqrt(total / readers))
    mean = float(np.mean(figures))
    return Pooled(mean, se, df, *_ends(span, mean, se, df, is_real, readers), reader_sd)


def _ends(span, mean, se, df, is_real, readers):
    """95 % interval of `pool`; (None, None) with too few readers, or where no error can be computed."""
    if 1 < readers < LEAST:
        return None, None
    parts = [(np.asarray(se ** 2), np.asarray(df))]
    if span == "share":
        return inference.interval(mean, parts, int(min(is_real.sum(), (~is_real).sum()))) or (None, None)
    return inference.difference_interval(mean, parts, 1.0 if span == "difference" else np.inf) or (None, None)


def jackknife(ratings: np.ndarray, is_real: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Per reader and with each tile left out: name -> (figures [R], without [R, M]).

    ratings [R, M] int, 0 = not answered, 1 to 6; is_real [M]. Names: d_prime, criterion, area, correct (balanced: the
    mean of both rates), real_rate (real tiles called real), synthetic_rate (synthetic tiles called synthetic).
    """
    seen = ratings > 0
    said_real = ratings >= 4
    counts = [(said_real & seen & members).sum(1) for members in (is_real, ~is_real)]
    totals = [(seen & members).sum(1) for members in (is_real, ~is_real)]
    fewer = [counts[k][:, None] - (said_real & seen & members) for k, members in enumerate((is_real, ~is_real))]
    less = [totals[k][:, None] - (seen & members) for k, members in enumerate((is_real, ~is_real))]
    d, c = sensitivity(counts[0], totals[0], counts[1], totals[1])
    d_without, c_without = sensitivity(fewer[0], less[0], fewer[1], less[1])
    real, real_without = counts[0] / totals[0], fewer[0] / less[0]
    synthetic, synthetic_without = 1 - counts[1] / totals[1], 1 - fewer[1] / less[1]
    return {"d_prime": (d, d_without), "criterion": (c, c_without), "area": _areas(ratings, is_real, seen, totals),
            "correct": ((real + synthetic) / 2, (real_without + synthetic_without) / 2),
            "real_rate": (real, real_without), "synthetic_rate": (synthetic, synthetic_without)}


def _areas(ratings, is_real, seen, totals):
    """ROC areas [R] and with each tile left out [R, M], from the counts of each rating (Mann-Whitney, ties half)."""
    levels = np.arange(1, 7)
    by_level = [((ratings[:, :, None] == levels) & members[:, None]).sum(1)  # [R, 6]
                for members in (is_real, ~is_real)]
    below = np.cumsum(by_level[1], 1) - 0.5 * by_level[1]  # synthetic tiles below a rating, ties half
    above = np.cumsum(by_level[0][:, ::-1], 1)[:, ::-1] - 0.5 * by_level[0]
    wins = (by_level[0] * below).sum(1)
    at = np.maximum(ratings, 1) - 1
    own = np.where(is_real, np.take_along_axis(below, at, 1), np.take_along_axis(above, at, 1)) * seen
    pairs = (totals[0][:, None] - (seen & is_real)) * (totals[1][:, None] - (seen & ~is_real))
    return wins / (totals[0] * totals[1]), (wins[:, None] - own) / pairs


# ------------------------------------------------------------------------------------- equivalence

def tost(estimate: float, se: float, df: float, margin: float = MARGIN) -> float:
    """p of "the truth lies outside +-margin": the larger of two one-sided t tests (Schuirmann 1987)."""
    return float(max(stats.t.sf((estimate + margin) / se, df), stats.t.cdf((estimate - margin) / se, df)))


def tost_power(se: float, df: float, margin: float = MARGIN, alpha: float = ALPHA) -> float:
    """Chance that `tost` succeeds if the truth is 0 and the true standard error is `se`: the estimate is normal, its
    estimated error se u with u^2 chi-square over df; mean over u of max(0, 2 Phi(margin / se - t_{1-alpha} u) - 1)
    (Phillips 1990, J Pharmacokinet Biopharm 18:137)."""
    errors = np.sqrt(stats.chi2.ppf((np.arange(2000) + 0.5) / 2000, min(df, 1e6)) / min(df, 1e6))
    return float(np.maximum(2 * stats.norm.cdf(margin / se - stats.t.ppf(1 - alpha, df) * errors) - 1, 0).mean())


def simulate(rng: np.random.Generator, readers: int, count: int, d_prime: float = 0.0, criterion: float = 0.0,
             reader_sd: float = 0.0, tile_sd: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Equal-variance Gaussian readers: ratings [readers, 2 count] in 1..6 and is_real [2 count].

    Evidence = +-d'_r / 2 + tile effect + noise, of total variance 1 within a class, so d' is that of the counts;
    d'_r ~ N(d_prime, reader_sd); the share tile_sd^2 of the variance belongs to the tile, the same for all readers.
    """
    is_real = np.repeat([True, False], count)
    means = np.where(is_real, 0.5, -0.5) * rng.normal(d_prime, reader_sd, (readers, 1))
    evidence = means + rng.normal(0, tile_sd, 2 * count) \
        + rng.normal(0, np.sqrt(1 - tile_sd ** 2), (readers, 2 * count))
    cuts = criterion + np.array([-1.0, -0.5, 0.0, 0.5, 1.0])
    return 1 + (evidence[:, :, None] > cuts).sum(2), is_real


def planned_power(readers: int, count: int, margin: float = MARGIN, reader_sd: float = 0.2, tile_sd: float = 0.3,
                  studies: int = 1000, seed: int = 0) -> float:
    """Share of simulated studies with readers who cannot tell (mean d' 0) in which `tost` finds it, at 5 %."""
    rng = np.random.default_rng(seed)
    found = 0
    for _ in range(studies):
        ratings, is_real = simulate(rng, readers, count, reader_sd=reader_sd, tile_sd=tile_sd)
        pooled = pool(*jackknife(ratings, is_real)["d_prime"], is_real)
        found += tost(pooled.estimate, pooled.se, pooled.df, margin) < ALPHA
    return found / studies


# ------------------------------------------------------------------------------------ the whole study

def analyse(names: list[str], ratings: np.ndarray, is_real: np.ndarray, malignant: np.ndarray | None = None,
            seconds: np.ndarray | None = None, margin: float = MARGIN) -> dict:
    """Everything the report says about a study, as plain numbers for JSON, and `verdict` in words.

    names [R], ratings [R, M] 0 (not answered) to 6, is_real [M]; malignant [R, M] 1, 0 or -1; seconds [R, M] or NaN.
    A reader with fewer than MIN_TILES tiles of either class is left out and named. ValueError if none remains.
    """
    ratings, is_real = np.asarray(ratings), np.asarray(is_real, dtype=bool)
    answered = np.stack([((ratings > 0) & members).sum(1) for members in (is_real, ~is_real)])
    keep = (answered >= MIN_TILES).all(0)
    if not keep.any():
        raise ValueError(f"no reader has answered {MIN_TILES} real and {MIN_TILES} synthetic tiles yet: wait for more")
    left_out = [f"{name}: {real} real and {synthetic} synthetic tiles answered"
                for name, real, synthetic, kept in zip(names, *answered, keep, strict=True) if not kept]
    names, ratings = [name for name, kept in zip(names, keep, strict=True) if kept], ratings[keep]
    figures = jackknife(ratings, is_real)
    rows = [_reader_row(name, row, is_real) for name, row in zip(names, ratings, strict=True)]
    for row, adjusted in zip(rows, inference.holm([row["p"] for row in rows]), strict=True):
        row["p_holm"] = adjusted
    for row, times in zip(rows, [None] * len(rows) if seconds is None else seconds[keep], strict=True):
        row["seconds"] = float(np.nanmedian(times)) if times is not None and np.isfinite(times).any() else None
        row["hasty"] = row["seconds"] is not None and row["seconds"] < HASTY
    pooled = {name: _plain(pool(*values, is_real, SPANS.get(name, "share"))) for name, values in figures.items()}
    patient = np.array([not row["hasty"] for row in rows])
    d = pooled["d_prime"]
    results = {"readers": rows, "left_out": left_out, "pooled": pooled,
               "total": together(*(sum(row[name] for row in rows) for name in COUNTS)),
               "agreement": _agreement(names, ratings),
               "equivalence": {"margin": margin} | _equivalence(d, margin),
               "without_hasty": None if patient.all() or not patient.any() else _plain(
                   pool(*(part[patient] for part in figures["d_prime"]), is_real)),
               "malignancy": None if malignant is None else _malignancy(names, malignant[keep], ratings > 0, is_real)}
    results["verdict"] = verdict(results)
    return results


def _equivalence(d: dict, margin: float) -> dict:
    """p and power of `tost`; None where d' has no interval."""
    if d["low"] is None:
        return {"p": None, "power": None}
    df = np.inf if d["df"] is None else d["df"]
    return {"p": tost(d["estimate"], d["se"], df, margin), "power": tost_power(d["se"], df, margin)}


def _plain(pooled: Pooled) -> dict:
    return vars(pooled) | {"df": None if np.isinf(pooled.df) else float(pooled.df)}


def _reader_row(name: str, ratings: np.ndarray, is_real: np.ndarray) -> dict:
    seen = ratings > 0
    signals, noises = int((seen & is_real).sum()), int((seen & ~is_real).sum())
    hits, false_alarms = int((seen & is_real & (ratings >= 4)).sum()), int((seen & ~is_real & (ratings >= 4)).sum())
    d, c = sensitivity(hits, signals, false_alarms, noises)
    half = float(stats.norm.ppf(0.975)) * sensitivity_se(hits, signals, false_alarms, noises)
    p, chance = guessing_p(hits + noises - false_alarms, signals, noises, hits + false_alarms)
    area, area_low, area_high = roc_area(ratings[seen], is_real[seen])
    rates = {"real": (hits, signals), "synthetic": (noises - false_alarms, noises),
             "correct": (hits + noises - false_alarms, signals + noises)}
    row = {"reader": name, "hits": hits, "signals": signals, "false_alarms": false_alarms, "noises": noises}
    for what, (count, n) in rates.items():
        low, high = inference.clopper_pearson(count, n)
        row |= {f"{what}_rate": count / n, f"{what}_low": low, f"{what}_high": high}
    return row | {"chance": chance, "p": p, "d_prime": float(d), "d_prime_low": float(d) - half,
                  "d_prime_high": float(d) + half, "criterion": float(c), "area": area, "area_low": area_low,
                  "area_high": area_high}


def together(hits: int, signals: int, false_alarms: int, noises: int) -> dict:
    """All answers in one heap, as published tables have them: raw d' and c (log-linear where a rate is 0 or 1), and a
    binomial p that takes answers for independent, which those of one reader or to one tile are not."""
    p, chance = guessing_p(hits + noises - false_alarms, signals, noises, hits + false_alarms)
    raw = 0 < hits < signals and 0 < false_alarms < noises
    d, c = sensitivity(hits, signals, false_alarms, noises, "none" if raw else "loglinear")
    return {"hits": hits, "signals": signals, "false_alarms": false_alarms, "noises": noises, "chance": chance, "p": p,
            "accuracy": (hits + noises - false_alarms) / (signals + noises), "d_prime": float(d), "criterion": float(c)}


def _agreement(names: list[str], ratings: np.ndarray) -> dict:
    """Kappa of real against synthetic for every pair of readers, on the tiles both answered, and Fleiss' for all."""
    pairs = []
    for first in range(len(names)):
        for second in range(first + 1, len(names)):
            both = (ratings[first] > 0) & (ratings[second] > 0)
            kappa = cohen_kappa(ratings[first, both] >= 4, ratings[second, both] >= 4) if both.any() else None
            pairs.append({"first": names[first], "second": names[second], "tiles": int(both.sum()), "kappa": kappa})
    by_all = (ratings > 0).all(0)
    said_real = (ratings[:, by_all] >= 4).sum(0)
    fleiss = fleiss_kappa(np.stack([said_real, len(names) - said_real], 1)) if len(names) > 2 and by_all.any() else None
    return {"pairs": pairs, "fleiss": fleiss, "tiles_by_all": int(by_all.sum())}


def _malignancy(names: list[str], malignant: np.ndarray, seen: np.ndarray, is_real: np.ndarray) -> dict:
    """How often real and synthetic tiles were called malignant, a reader and on average, with the paired difference."""
    called, seen = malignant == 1, seen & (malignant >= 0)
    shares = []
    for members in (is_real, ~is_real):
        n = (seen & members).sum(1)
        hit = (called & seen & members).sum(1)
        shares.append((hit / n, (hit[:, None] - (called & seen & members)) / (n[:, None] - (seen & members))))
    (real, real_without), (synthetic, synthetic_without) = shares
    return {"readers": [{"reader": name, "real": float(r), "synthetic": float(s)}
                        for name, r, s in zip(names, real, synthetic, strict=True)],
            "real": _plain(pool(real, real_without, is_real, "share")),
            "synthetic": _plain(pool(synthetic, synthetic_without, is_real, "share")),
            "difference": _plain(pool(real - synthetic, real_without - synthetic_without, is_real, "difference"))}


def verdict(results: dict) -> str:
    """What the figures support, in plain words; only the equivalence test makes it say "could not tell"."""
    d, correct, same = results["pooled"]["d_prime"], results["pooled"]["correct"], results["equivalence"]
    one = len(results["readers"]) == 1
    who = "The reader" if one else f"The {len(results['readers'])} readers"
    if d["low"] is None:
        text = (f"No verdict: {len(results['readers'])} readers are too few for one that holds for other readers (at least "
                f"{LEAST}), or their answers leave no error to judge by (pooled d' {d['estimate']:.2f}; "
                f"{correct['estimate']:.0%} right, guessing gives 50%).")
    else:
        text = _decision(who, d, correct, same)
    able = sum(row["p_holm"] < ALPHA and row["correct_rate"] > row["chance"] for row in results["readers"])
    if not one:
        text += f" Taken one by one, {able} of {len(results['readers'])} beat guessing (Holm)."
    criterion = results["pooled"]["criterion"]
    if criterion["low"] is not None and (criterion["low"] > 0 or criterion["high"] < 0):
        habit = "synthetic" if criterion["low"] > 0 else "real"
        text += f" The habit was to say {habit} (c = {criterion['estimate']:.2f})."
    return text + _haste(results) + (" This holds for this reader on other tiles, not for other readers." if one else "")


def _decision(who, d, correct, same):
    figures = (f"(pooled d' {d['estimate']:.2f}, 95% interval {d['low']:.2f} to {d['high']:.2f}; "
               f"{correct['estimate']:.0%} right, guessing gives 50%)")
    most = stats.norm.cdf(same["margin"] / 2)
    margin = f"d' within {same['margin']:g} of zero; an unbiased reader right on at most {most:.0%}"
    if d["low"] > 0:
        text = f"{who} told real from synthetic tiles better than by guessing {figures}."
        if same["p"] < ALPHA:
            text += f" The difference is small: by the equivalence test it is less than the margin ({margin})."
        return text
    if d["high"] < 0:
        return f"{who} told the tiles apart but the wrong way round, taking synthetic ones for real {figures}."
    if same["p"] < ALPHA:
        return (f"{who} could not tell real from synthetic tiles {figures}: equivalent to guessing ({margin}; TOST p = "
                f"{same['p']:.3f}).")
    return (f"Undecided {figures}: this shows neither that readers can tell nor that they cannot. Were they unable to, a "
            f"study like this had a {same['power']:.0%} chance of showing it ({margin}).")


def _haste(results):
    """Who answered too fast to have looked, and d' without them."""
    hasty = [row for row in results["readers"] if row["hasty"]]
    if not hasty:
        return ""
    who = ", ".join(f"{row['reader']} ({row['seconds']:.1f} s)" for row in hasty)
    rest = results["without_hasty"]
    without = "no other reader is left" if rest is None else f"without them the pooled d' is {rest['estimate']:.2f}" + (
        "" if rest["low"] is None else f", 95% interval {rest['low']:.2f} to {rest['high']:.2f}")
    return f" Answered too fast to have looked (median under {HASTY:g} s a tile): {who}; {without}."
