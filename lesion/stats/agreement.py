"""How far people agree beyond chance: kappa of two (Cohen 1960) and of more (Fleiss 1971).

Proven by tests/stats/test_readers.py: scikit-learn, Fleiss' own example, unequal margins by hand.
"""
import numpy as np


def cohen_kappa(first: np.ndarray, second: np.ndarray) -> float | None:
    """(p_o - p_e) / (1 - p_e) of two readers' answers [n] (scikit-learn's); None where both only ever gave one and the
    same answer, which leaves nothing to agree on beyond chance."""
    from sklearn.metrics import cohen_kappa_score
    if len(np.union1d(first, second)) < 2:
        return None
    return float(cohen_kappa_score(first, second))


def fleiss_kappa(counts: np.ndarray) -> float | None:
    """Agreement of more than two readers (Fleiss 1971); counts [tiles, answers] of readers, every row the same sum."""
    counts = np.asarray(counts, dtype=float)
    readers = counts[0].sum()
    expected = ((counts.sum(0) / counts.sum()) ** 2).sum()
    observed = ((counts ** 2).sum(1) - readers).mean() / (readers * (readers - 1))
    return None if expected > 1 - 1e-12 else float((observed - expected) / (1 - expected))
