"""lesion.stats.simulate: its truth is the population's, its cells are the same every time, a stopped call goes on."""
import json
from dataclasses import asdict

import numpy as np
import pytest

from lesion.stats import classification, inference, simulate
from lesion.stats.simulate import Cell


def test_the_truth_is_what_many_tiles_show():
    """Every metric of 100,000 malignant and as many benign tiles of one run equals the numerical integral of the model."""
    cell = Cell("metrics", "both", 100_000, 1, 1, 1)
    labels, scores, _, separations = simulate.draw(np.random.default_rng(0), cell, simulate.GAIN)
    true = simulate.true_values(cell, simulate.truth_of(0.5), separations, simulate.GAIN)
    assert separations[1, 0] != pytest.approx(simulate.SEPARATION + simulate.GAIN)
    for arm in (0, 1):
        found = classification.evaluate(labels, scores[arm, 0], simulate.THRESHOLD)
        for name in classification.METRICS:
            assert found[name][0] == pytest.approx(true[name][arm], abs=0.006), name


def test_a_set_is_what_its_cell_says():
    """80 malignant tiles of 16 patients with 5 each, who have benign tiles too; tiles of a patient resemble each other,
    runs differ by noise and luck as the regime says."""
    cell = Cell("auroc", "both", 80, 5, 3, 1)
    labels, scores, patients, separations = simulate.draw(np.random.default_rng(1), cell)
    assert (labels.sum(), len(np.unique(patients[labels == 1]))) == (80, 16)
    assert set(patients[labels == 1]) <= set(patients[labels == 0])
    assert scores.shape == (2, 3, len(labels))
    assert len(np.unique(separations)) == 6
    calm = simulate.draw(np.random.default_rng(1), Cell("auroc", "tile noise", 80, 5, 3, 1))[3]
    assert np.unique(calm).tolist() == [simulate.SEPARATION]


def test_quick_run_goes_on_and_prints_its_tables(tmp_path, capsys):
    """Stopped after its first cell, the same command goes on with the others; the cells are the same when made again, and
    none is far from what it should be."""
    out = tmp_path / "cells.jsonl"
    simulate.main(["--quick", "--out", str(out), "--seconds", "0"])
    simulate.main(["--quick", "--out", str(out)])
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [row["cell"] for row in rows] == [asdict(cell) for cell in simulate.grid(quick=True)]
    assert simulate.run(Cell(**rows[0]["cell"])) == rows[0]["found"]
    said = capsys.readouterr().out
    for words in ("AUROC, DeLong", "| Brier score |", "over patients", "| readers |"):
        assert words in said
    by_kind = {row["cell"]["kind"]: row["found"] for row in rows}
    assert 0.85 < by_kind["auroc"]["coverage"] <= 1
    assert by_kind["subgroup"]["coverage"] > 0.88 > by_kind["subgroup"]["naive"]
    assert by_kind["readers"]["coverage"] > 0.85


def test_the_level_holds_where_it_did_not():
    """300 sets of 28 malignant tiles, three runs that differ by noise alone: the test rejects .02 to .08 of them; adding
    the runs' variance to the variance of their mean, as before, rejects under .03 and is a third too wide."""
    cell = Cell("auroc", "tile noise", 28, 1, 3, 300)
    rng, ours, before, wider = np.random.default_rng(2), [], [], []
    for _ in range(cell.sets):
        labels, scores, patients, _ = simulate.draw(rng, cell)
        found = inference.delong_test(labels, scores[0], scores[1], patients)
        aurocs, covariance = inference.delong(labels, np.concatenate(scores), patients)
        contrast = np.repeat([-1.0, 1.0], 3) / 3
        old = contrast @ covariance @ contrast + (aurocs[3:] - aurocs[:3]).var(ddof=1) / 3
        ours.append(found["p"] < 0.05)
        before.append(abs(found["difference"]) > 2.0 * np.sqrt(old))
        wider.append(old / found["se"] ** 2)
    assert 0.02 < np.mean(ours) < 0.08
    assert np.mean(before) < 0.04
    assert np.median(wider) > 1.25
