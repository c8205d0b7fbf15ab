"""lesion.classify.curve: figures within folds, weighted and added as written; what synthetic tiles are worth, by hand."""
import json
from types import SimpleNamespace

import numpy as np
import pytest

from lesion.classify import curve
from lesion.stats import inference


def run(rng, shift, malignant=12, benign=30, offset=0.0):
    labels = np.array([1] * malignant + [0] * benign)
    return SimpleNamespace(labels=labels, scores=rng.normal(labels * shift + offset), patients=None)


def test_one_fold_is_delong():
    """One fold, one seed: DeLong's own difference, interval and p."""
    rng = np.random.default_rng(0)
    one, two = run(rng, 1.0), run(rng, 1.5)
    found = curve.difference([[one]], [[two]])
    theirs = inference.delong_test(one.labels, one.scores, two.scores)
    keys = ("difference", "low", "high", "p")
    assert [found[key] for key in keys] == pytest.approx([theirs[key] for key in keys])


def test_scores_of_folds_are_never_mixed():
    """A fold whose model's scores all lie higher changes nothing: figures are within folds. Folds weigh by malignant tiles."""
    rng = np.random.default_rng(1)
    folds = [[run(rng, 1.0)], [run(rng, 2.0, malignant=36)]]
    before = curve.auroc(folds)
    folds[1][0].scores = folds[1][0].scores + 100
    assert curve.auroc(folds) == before
    single = [curve.auroc([fold])["auroc"] for fold in folds]
    assert before["auroc"] == pytest.approx(0.25 * single[0] + 0.75 * single[1])


def test_what_is_found_is_json():
    """Figures of real runs, through `summary`, as curve.json holds them."""
    rng = np.random.default_rng(2)
    folds = [{arm: [run(rng, shift) for _ in range(3)] for arm, shift in (("S2", 1.5), ("O1", 0.5))} for _ in range(2)]
    for fold in folds:
        for seed in range(3):
            fold["S2"][seed].labels = fold["O1"][seed].labels
    json.dumps(curve.summary([curve.point(None, 1.0, 100.0, folds)]))


def point(real, o1, gain=0.0, low=0.0, ratio=1.0):
    return {"size": real, "real": real, "ratio": ratio, "arms": {"O1": {"auroc": o1, "low": 0, "high": 1}},
            "contrasts": {"O1 to S2": {"difference": gain, "low": low, "high": 2 * gain - low, "p": 0.01}}}


def test_worth():
    """O1 rises from .7 at 25 to .8 at 100 tiles, straight in log: a gain of .05 at 25 is worth 25 more tiles (50 = sqrt(25 100));
    an interval down to 0 is nothing detectable; beyond the curve there is no number."""
    points = [point(25.0, 0.7, 0.05, 0.025), point(100.0, 0.8, 0.05, 0.01)]
    found = curve.worth(points[0], points)
    assert found["tiles"] == pytest.approx(25)
    assert found["low"] == pytest.approx(25 * 4 ** 0.25 - 25)
    assert curve.worth(points[1], points) == {"real": 100.0, "ratio": 1.0, "detectable": True, "tiles": None, "low": None, "high": None}
    assert not curve.worth(point(25.0, 0.7, 0.05, -0.01), points)["detectable"]


def test_one_primary_contrast(tmp_path):
    """The largest size at the first ratio is unadjusted, the others by Holm among themselves; the picture is drawn."""
    found = curve.summary([point(100.0, 0.8, 0.05, 0.01), point(25.0, 0.7), point(25.0, 0.72, ratio=3.0)])
    assert found["primary"]["size"] == 100.0
    assert [one["contrasts"]["O1 to S2"].get("p_holm") for one in found["points"]] == [0.02, 0.02, None]
    assert any("none detectable" in line for line in curve.lines(found))
    curve.draw(found, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 5000


def of_patients(rng, shift, first, scale):
    """A fold's run: 24 malignant and 60 benign tiles, two of each patient that score alike, on a scale of the fold's model."""
    labels, patients = np.repeat([1, 0], [24, 60]), first + np.arange(84) // 2
    scores = scale * (labels * shift + rng.normal(size=500)[patients] + 0.1 * rng.normal(size=84))
    return SimpleNamespace(labels=labels, scores=scores, patients=patients)


def test_patients_and_folds_reach_the_tests():
    """Difference and interval are DeLong's within folds over patients: neither pooled over folds nor over tiles."""
    rng = np.random.default_rng(4)
    one, two = ([[of_patients(rng, shift, 100 * fold, 50.0 ** fold) for _ in range(3)] for fold in range(2)] for shift in (1.0, 1.6))
    labels, scores, patients, number = curve.joined(one)
    expected = inference.delong_test(labels, scores, curve.joined(two)[1], patients, number)
    found = curve.difference(one, two)
    assert [found[key] for key in ("difference", "low", "high", "p")] == [expected[key] for key in ("difference", "low", "high", "p")]
    single = [curve.difference(one[fold:fold + 1], two[fold:fold + 1])["difference"] for fold in range(2)]
    assert found["difference"] == pytest.approx(np.mean(single))
    values, parts = inference.auroc_over_runs(labels, scores, patients, number)
    arm = curve.auroc(one)
    assert (arm["low"], arm["high"]) == inference.interval(float(values.mean()), parts, 24)
    perfect = [[SimpleNamespace(labels=run.labels, scores=run.labels * 1.0, patients=run.patients) for run in fold] for fold in one]
    assert curve.auroc(perfect)["low"] == pytest.approx(inference.clopper_pearson(24, 24)[0])  # 12 carriers a fold, not 42 patients


def test_worth_is_read_off_the_curve_of_its_ratio():
    """Another ratio's points are not on the curve; the upper end is that of the interval; it starts from O1 at this size."""
    points = [point(25.0, 0.7, 0.05, 0.025), point(50.0, 0.9, ratio=2.0), point(50.0, 0.75, 0.05, 0.025), point(100.0, 0.8),
              point(200.0, 0.9)]
    found = curve.worth(points[0], points)
    assert found["tiles"] == pytest.approx(25)
    assert found["high"] == pytest.approx(25 * 4 ** 0.75 - 25)
    assert curve.worth(points[2], points)["tiles"] == pytest.approx(50)
