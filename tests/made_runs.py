"""Run folders of classify.py with made-up predictions, for the tests of the report."""
import numpy as np

from lesion.classify import predictions
from lesion.classify.arms import CONTRASTS, PRIMARY, Parts
from lesion.stats import comparison


def write_run(folder, gains: dict, seeds=3, malignant=40, benign=200, shift=None, data_rows=None):
    """A run folder of made-up predictions: gains is {arm: how much better it separates the classes}."""
    rng = np.random.default_rng(1)
    rows = data_rows or [{"file_name": f"images/T{i:04d}.jpg", "isic_id": f"T{i:04d}", "patient_id": f"P{i // 2}",
                          "label": "malignant" if i % (benign // malignant + 1) == 0 else "benign"}
                         for i in range(2 * (malignant + benign))]
    half = len(rows) // 2
    parts = Parts([], rows[:half], rows[half:], False)
    labels = np.array([row["label"] == "malignant" for row in rows])
    common = rng.normal(size=len(rows))
    for arm, gain in gains.items():
        for seed in range(seeds):
            logits = (1 + gain) * labels - 1.5 + common + 0.2 * rng.normal(size=len(rows)) + (shift or {}).get(arm, 0)
            scores = 1 / (1 + np.exp(-logits))
            predictions.write(folder / arm / f"seed{seed}" / "predictions.csv", parts, scores[:half], scores[half:])
    return rows


def results_of(folder):
    """What the statistics make of a run folder, with few resamples."""
    return comparison.analyse(predictions.read_runs(folder), CONTRASTS, resamples=300, primary=PRIMARY) | {"run": {}}
