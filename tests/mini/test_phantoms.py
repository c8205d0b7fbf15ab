"""Procedural tiles: deterministic, honest about their truth, with classes that differ only as the literature says."""
import hashlib
import itertools
import json

import numpy as np
import pytest

from lesion.describe.attributes import ita_degrees
from lesion.describe.prompts import NAMES, from_sentence
from lesion.mini import phantoms
from lesion.run import files
from lesion.tiles.srgb import to_lab


@pytest.fixture(scope="module")
def tiles():
    """Ninety tiles, half of them malignant."""
    return [phantoms.draw(seed, ("benign", "malignant")[seed % 2]) for seed in range(90)]


def test_same_seed_same_bytes():
    """The same seed gives the same JPEG bytes and the same truth; another seed, label or patient gives another tile."""
    first, again = phantoms.draw_jpeg(5, "malignant"), phantoms.draw_jpeg(5, "malignant")
    assert first[0] == again[0]
    assert first[1] == again[1]
    others = [phantoms.draw_jpeg(6, "malignant"), phantoms.draw_jpeg(5, "benign"), phantoms.draw_jpeg(5, "malignant", patient=1)]
    assert all(other[0] != first[0] for other in others)


def test_patients_share_their_skin():
    """Tiles of one patient have one skin tone, and differ in everything else."""
    truths = [phantoms.draw_jpeg(seed, "benign", patient=3)[2] for seed in range(4)]
    assert len({truth["ita"] for truth in truths}) == 1
    assert len({truth["diameter_mm"] for truth in truths}) == 4


def test_classes_differ_as_published():
    """Each ABCD criterion is met at the published sensitivity (malignant) and 1 - specificity (benign), within four standard
    errors over 4,000 draws; an ideal reader of the four criteria would reach the AUROC that the docstring states."""
    assert phantoms.CRITERIA == {"asymmetry": {"malignant": 0.57, "benign": 0.28}, "border": {"malignant": 0.57, "benign": 0.29},
                                 "colors": {"malignant": 0.65, "benign": 0.41}, "diameter": {"malignant": 0.90, "benign": 0.37}}
    rng = np.random.default_rng(0)
    for label in ("benign", "malignant"):
        drawn = [phantoms._criteria(rng, label) for _ in range(4000)]
        for name, rate in phantoms.CRITERIA.items():
            error = 4 * np.sqrt(rate[label] * (1 - rate[label]) / 4000)
            assert abs(np.mean([d[name] for d in drawn]) - rate[label]) < error
    outcomes = []
    for met in itertools.product((True, False), repeat=4):
        odds = [np.prod([r[label] if m else 1 - r[label] for m, r in zip(met, phantoms.CRITERIA.values())])
                for label in ("malignant", "benign")]
        outcomes.append((odds[0] / odds[1], *odds))
    _, sick, well = np.array(sorted(outcomes)).T
    auroc = (sick * (np.cumsum(well) - well / 2)).sum()
    assert f"AUROC of {auroc:.3f}" in " ".join(phantoms.__doc__.split())


def test_label_acts_through_the_criteria_only(monkeypatch):
    """With the criteria and the generator's seed held equal, benign and malignant give the same tile: no hidden difference."""
    monkeypatch.setattr(phantoms, "_criteria", lambda rng, label: dict.fromkeys(phantoms.CRITERIA, True))
    monkeypatch.setattr(phantoms, "LABELS", type("Same", (tuple,), {"index": lambda self, label: 0})(phantoms.LABELS))
    assert phantoms.draw_jpeg(9, "benign")[0] == phantoms.draw_jpeg(9, "malignant")[0]


def test_truth_follows_the_criteria(tiles):
    """A criterion means what it says: over 6 mm exactly where diameter is met, one colour alone where colours is not, and
    clearly more irregular, more asymmetric lesions where border or asymmetry is met."""
    truths = [truth for _, _, truth in tiles]
    for truth in truths:
        # the contour is traced on the fuzzy pigment: a few tenths of a millimetre of fraying either way
        assert (truth["diameter_mm"] > 6) == truth["criteria"]["diameter"] or abs(truth["diameter_mm"] - 6) < 0.5
        assert sum(share > 0 for share in truth["colors"].values()) == 1 or truth["criteria"]["colors"]
        assert sum(truth["colors"].values()) == pytest.approx(1)
    for criterion, value in (("border", "irregularity"), ("asymmetry", "asymmetry")):
        met, not_met = ([truth[value] for truth in truths if truth["criteria"][criterion] is flag] for flag in (True, False))
        assert np.median(met) > 1.3 * np.median(not_met)


def test_every_tone_and_colour(tiles):
    """All six skin tones occur, and the raw pixels outside the lesion have the true ITA (within 3 degrees of the median);
    attributes are the vocabulary's values of the truth."""
    assert {attributes["skin_tone"] for _, attributes, _ in tiles} == set(NAMES["skin_tone"])
    assert {attributes["color"] for _, attributes, _ in tiles} >= {"red", "light brown", "dark brown"}
    errors = []
    for image, attributes, truth in tiles:
        assert image.shape == (128, 128, 3)
        assert image.dtype == np.uint8
        light, _, b = np.median(to_lab(image)[~truth["mask"]], 0)
        errors.append(abs(ita_degrees(light, b) - truth["ita"]))
        edges = (55, 41, 28, 10, -30)
        assert attributes["skin_tone"] == NAMES["skin_tone"][sum(truth["ita"] < edge for edge in edges)]
    assert np.median(errors) < 1
    assert np.quantile(errors, 0.9) < 3


def test_lesions_can_be_seen(tiles):
    """The lesion's rim differs from the skin next to it by at least 4 CIELAB units in nine tiles of ten: there is a border."""
    from scipy import ndimage
    gaps = []
    for image, _, truth in tiles:
        lab = to_lab(image)
        inside = truth["mask"] & ~ndimage.binary_erosion(truth["mask"], iterations=4)
        outside = ndimage.binary_dilation(truth["mask"], iterations=12) & ~ndimage.binary_dilation(truth["mask"], iterations=6)
        gaps.append(np.linalg.norm(np.median(lab[inside], 0) - np.median(lab[outside], 0)))
    assert np.quantile(gaps, 0.1) > 4


def test_bad_label():
    """Only the two labels can be drawn, and a demo set needs both."""
    with pytest.raises(ValueError, match="melanoma"):
        phantoms.draw(0, "melanoma")


def test_demo_set(tmp_path):
    """The demo set has the common layout: rows that read back, splits without a shared patient, text that says the attributes,
    hashes of the files; two runs with one seed are byte-identical, another seed is not."""
    seen = []

    def progress(items, **_):
        for item in items:
            seen.append(item)
            yield item

    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        rows = phantoms.write_demo(tmp_path / name, seed=seed, benign=24, malignant=12, progress=progress)
        assert files.read_manifest(tmp_path / name) == rows
    assert len(seen) == 36 * 3
    contents = [{path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*") if path.is_file()}
                for name in "abc"]
    assert contents[0] == contents[1] != contents[2]
    rows = files.read_manifest(tmp_path / "a")
    assert sum(row["label"] == "malignant" for row in rows) == 12
    parts = {part: {row["patient_id"] for row in rows if row["split"] == part} for part in ("train", "val", "test")}
    assert all(parts.values())
    assert sum(len(part) for part in parts.values()) == len(set.union(*parts.values()))
    for row in rows:
        assert from_sentence(row["text"]) == (row["label"], row["attributes"])
        assert hashlib.sha256((tmp_path / "a" / row["file_name"]).read_bytes()).hexdigest() == row["sha256"]
        assert (row["source"], row["license"]) == ("phantom", "MIT")
    record = json.loads((tmp_path / "a" / "dataset.json").read_text(encoding="utf-8"))
    assert record["color_norm"] == "none"
    assert sum(part["benign"] for part in record["counts"].values()) == 24


def test_interrupted_demo_set_is_not_taken_for_complete(tmp_path):
    """The manifest is written last, so a set cut short has none, and a new run completes it."""
    def stop(items, **_):
        yield from items[:5]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        phantoms.write_demo(tmp_path, benign=6, malignant=6, progress=stop)
    with pytest.raises(ValueError, match="not a prepared data set"):
        files.read_manifest(tmp_path)
    assert len(phantoms.write_demo(tmp_path, benign=6, malignant=6)) == len(files.read_manifest(tmp_path)) == 12


def test_demo_needs_both_classes(tmp_path):
    """A count under one is a one-line error, and nothing is written."""
    with pytest.raises(ValueError, match="both classes"):
        phantoms.write_demo(tmp_path / "x", benign=3, malignant=0)
    assert not (tmp_path / "x").exists()
