"""What is compared with what: sets, leaks, planted copies found and dropped, learning curves."""
from types import SimpleNamespace

import numpy as np
import picture_tiles
import pytest

from lesion.classify import network
from lesion.report import sets
from lesion.run import files
from lesion.stats import fidelity, memorisation


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A prepared set and two synthetic ones: `fresh` (25 unseen tiles), `copied` (20 unseen, 5 turned training
    tiles)."""
    root = tmp_path_factory.mktemp("pictures")
    training = picture_tiles.write_data(root / "data")
    rng = np.random.default_rng(1)
    picture_tiles.write_synthetic(root / "fresh", picture_tiles.blobs(rng, 25, True))
    copies = np.rot90(training["malignant"][:5], 1, (1, 2))
    picture_tiles.write_synthetic(root / "copied", np.concatenate([picture_tiles.blobs(rng, 20, True), copies]), "ef" * 32)
    return root


@pytest.fixture(scope="module")
def material(world):
    return sets.gather([world / "fresh", world / "copied"], world / "data")


def test_sets_are_what_they_say(material):
    """Real = the class's training tiles, held out = val of the class, calibration = val of all classes, names =
    folders."""
    assert (len(material.real.rows), len(material.held_out.rows), len(material.training.rows)) == (40, 12, 100)
    assert len(material.calibration.rows) == 202
    assert [part.name for part in material.synthetic] == ["fresh", "copied"]
    assert {row["split"] for row in material.calibration.rows} == {"val"}
    assert {row["label"] for row in material.real.rows} == {"malignant"}
    assert len(material.real.features) == 40


def test_copies_are_counted_one_by_one(material):
    """The five turned training tiles of `copied` are called copies, each of its own origin; hardly any other is."""
    results, found = sets.judge_copies(material)
    assert found["copied"].is_copy[20:].all()
    assert found["copied"].is_copy[:20].sum() <= 1
    origin = found["copied"].pixels.index[20:]
    assert [material.training.rows[i]["label"] for i in origin] == ["malignant"] * 5
    np.testing.assert_array_equal(material.training.images[origin], material.real.images[:5])
    by_name = {row["name"]: row for row in results["sets"]}
    assert by_name["copied"]["copies"] == found["copied"].is_copy.sum()
    assert by_name["copied"]["low"] < by_name["copied"]["mean"] < by_name["copied"]["high"]
    assert by_name["copied"]["three_sample"]["z"] < by_name["fresh"]["three_sample"]["z"]
    assert by_name["fresh"]["held_out"] == 12


def test_a_baseline_classifier_compares_sets_but_finds_no_copies(world):
    """RUN/B0/seed0 is preferred to scattering where sets are compared; copies are not sought with what was fitted to the training
    tiles. Features that are not the same for all views (ImageNet's; here the classifier's in its place) are searched in all eight: the
    five turned training tiles are at feature distance 0 of their origin."""
    place = world / "run" / "B0" / "seed0"
    place.mkdir(parents=True)
    network.save(place / "model.safetensors", network.build("resnet18", "none", 0), "resnet18", 64)
    material = sets.gather([world / "copied"], world / "data", world / "run")
    assert "B0" in material.extractor.sentence
    assert material.copy_extractor.name == "scattering"
    assert material.training.features.shape != material.training.copy_features.shape
    assert sets.judge_copies(material)[0]["features"] == "scattering"
    material.copy_extractor = material.extractor
    for tiles in (material.real, material.held_out, material.training, material.calibration, *material.synthetic):
        tiles.copy_features = tiles.features
    results, found = sets.judge_copies(material)
    assert results["sets"][0]["by_features"] >= 5
    assert found["copied"].features.relative[20:].max() < 1e-3
    np.testing.assert_array_equal(material.training.images[found["copied"].features.index[20:]],
                                  material.real.images[:5])


def test_fidelity_has_its_floor_and_ceiling(material):
    """One row a set and one for the held-out tiles; tiles of one distribution are not told apart, KID within 4 s.e. of
    0, and FID is given at the n of the floor, or not at all."""
    results = sets.judge_fidelity(material)
    fresh, _, held_out = results["sets"]
    assert results["floor"]["n"] == 20
    assert held_out["name"] == "held-out real malignant"
    assert held_out["fid"] is None
    assert fresh["fid"] == pytest.approx(results["floor"]["fid"], rel=0.5)
    assert abs(fresh["kid"]) < 4 * fresh["kid_se"]
    assert fresh["against_real"]["low"] < 0.6
    assert fresh["against_other"]["auc"] > 0.9  # the other class is another colour


def test_a_generator_that_saw_held_out_tiles_is_refused(world, tmp_path):
    """By hash and by patient, naming how many; a folder without provenance is accepted with a note."""
    held = [row for row in files.read_manifest(world / "data") if row["split"] == "val"]
    images = picture_tiles.blobs(np.random.default_rng(2), 12, True)
    for leak in ({"file_name": "x.jpg", "sha256": held[0]["sha256"], "patient_id": None},
                 {"file_name": "x.jpg", "sha256": "00", "patient_id": held[0]["patient_id"]}):
        picture_tiles.write_synthetic(tmp_path / "leaky", images, train_files=[leak])
        with pytest.raises(ValueError, match="held-out tiles or their patients") as error:
            sets.gather([tmp_path / "leaky"], world / "data")
        assert "\n" not in str(error.value)
    (tmp_path / "leaky" / "provenance.json").unlink()
    assert "no provenance.json" in sets.gather([tmp_path / "leaky"], world / "data").notes[0]


def test_sets_that_cannot_be_compared_are_refused(world, tmp_path):
    """Another class, another size, a class the data set lacks, too few held-out tiles: one line each."""
    images = picture_tiles.blobs(np.random.default_rng(3), 12, True)
    picture_tiles.write_synthetic(tmp_path / "benign", images, label="benign")
    picture_tiles.write_synthetic(tmp_path / "odd", images, label="odd")
    picture_tiles.write_synthetic(tmp_path / "large", images, resolution=128)
    for folders, said in (([world / "fresh", tmp_path / "benign"], "more than one class"),
                          ([world / "fresh", tmp_path / "large"], "more than one size"), ([tmp_path / "odd"], "no training tile")):
        with pytest.raises(ValueError, match=said):
            sets.gather(folders, world / "data")
    rows = files.read_manifest(world / "data")
    few = tmp_path / "few"
    (few / "images").mkdir(parents=True)
    kept = [row for row in rows if row["split"] == "train"] + [row for row in rows if row["split"] == "val"][:50]
    for row in kept:
        (few / row["file_name"]).write_bytes((world / "data" / row["file_name"]).read_bytes())
    files.write_manifest(few, kept)
    with pytest.raises(ValueError, match="199 are needed"):
        sets.judge_copies(sets.gather([world / "fresh"], few))


@pytest.mark.parametrize("size", [10 ** 7, [64], "64", 64.0, True, 65, -64])
def test_a_size_that_is_never_drawn_is_refused(world, tmp_path, size):
    """A row's resolution that is no multiple of 64 from 64 to 2048, whatever its type: one line that names the row, no memory taken."""
    picture_tiles.write_synthetic(tmp_path / "odd", picture_tiles.blobs(np.random.default_rng(4), 2, True), resolution=size)
    with pytest.raises(ValueError, match=r"metadata.jsonl, 00000.png: resolution is .* expected a multiple of 64"):
        sets.gather([tmp_path / "odd"], world / "data")


def test_a_real_tile_without_a_label_is_named(world, tmp_path):
    """A data set whose rows do not all say their class: one line."""
    rows = files.read_manifest(world / "data")
    files.write_manifest(tmp_path, [{key: value for key, value in row.items() if key != "label" or i != 1} for i, row in enumerate(rows)])
    with pytest.raises(ValueError, match=r"1 tiles without a label \(first: images/ISIC_0000001.png\)"):
        sets.gather([world / "fresh"], tmp_path)


def test_names_are_distinct_printable_and_no_real_sets(tmp_path):
    """Folders alike in name and parent are numbered, a sign that no SVG can hold is a question mark, and what reads like the real
    tiles has its parent's name: no two columns or rows of the report are one."""
    assert sets.names([tmp_path / "a" / "b" / "x", tmp_path / "c" / "b" / "x", tmp_path / "d" / "x"]) == ["b/x", "b/x (2)", "d/x"]
    assert sets.names(["p/a\x01b", "p/a\x02b", "p/realistic"]) == ["a?b", "a?b (2)", "realistic"]
    assert sets.names(["p/real malignant", "p/held-out real malignant"]) == ["p/real malignant", "p/held-out real malignant"]


def test_a_set_named_like_the_held_out_tiles_is_not_them(material, monkeypatch):
    """The ceiling is marked in its row, not known by its name."""
    monkeypatch.setattr(material.synthetic[0], "name", "held-out drawn")
    rows = sets.judge_fidelity(material)["sets"]
    assert [(row["name"], row["ceiling"]) for row in rows] == [
        ("held-out drawn", False), ("copied", False), ("held-out real malignant", True)]



def test_exact_repetitions_do_not_hide_copies(material):
    """A training tile that stands there six times is searched once."""
    images = np.concatenate([material.real.images[:3], material.real.images[:1].repeat(5, 0)])
    assert sets._first_of_each(images).tolist() == [0, 1, 2]


def test_learning_curves_find_the_checkpoint_of_each_set(material, tmp_path):
    """A set drawn with the LoRA of step 400 (by SHA-256) puts its copies at step 400; the least loss is marked."""
    run = tmp_path / "phase\x01-1"
    files.write_jsonl(run / "metrics.jsonl", [{"step": 1, "loss": 0.2}, {"step": 200, "val_loss": 0.15},
                                              {"step": 400, "val_loss": 0.12}, {"step": 600, "val_loss": 0.14}])
    files.write_bytes(run / "checkpoints" / "lora-000400.safetensors", b"weights of step 400")
    lora = files.sha256_file(run / "checkpoints" / "lora-000400.safetensors")
    rates = {"sets": [{"mean": 0.1, "low": 0.05, "high": 0.2}, {"mean": 0.3, "low": 0.2, "high": 0.4}]}
    old = [row["lora_sha256"] for row in material.synthetic[1].rows]
    try:
        for row in material.synthetic[1].rows:
            row["lora_sha256"] = lora
        curve, = sets.judge_training([run], material, rates)
    finally:
        for row, value in zip(material.synthetic[1].rows, old):
            row["lora_sha256"] = value
    assert curve["best"] == 400
    assert curve["name"] == "phase?-1"  # an SVG holds no such sign
    assert curve["copies"] == [(400, 0.3, 0.2, 0.4)]
    files.write_jsonl(run / "metrics.jsonl", [{"step": 1, "loss": 0.2}])
    with pytest.raises(ValueError, match="no validation loss"):
        sets.judge_training([run], material, None)
    with pytest.raises(ValueError, match="not a run folder"):
        sets.judge_training([tmp_path], material, None)


def test_every_figure_is_of_its_own_sets(material):
    """Each figure, recomputed from the features that it is of: patients kept together, real before synthetic, at the n of the floor."""
    results = sets.judge_fidelity(material)
    part, real, other, n = material.synthetic[0], material.real, material.other, results["floor"]["n"]
    row = results["sets"][0]
    centre, spread = real.features.mean(0), real.features.std(0)
    assert len(set(real.patients())) < len(real.rows)
    assert (row["kid"], row["kid_se"]) == fidelity.kid(real.features, part.features, real.patients())
    assert row["kid_se"] != fidelity.kid(real.features, part.features)[1]
    assert row["against_real"] == vars(fidelity.two_sample(real.features, part.features, real.patients()))
    assert row["against_other"] == vars(fidelity.two_sample(other.features, part.features, other.patients()))
    assert (row["density"], row["coverage"]) == fidelity.density_coverage(real.features, part.features)
    assert row["expected_coverage"] == fidelity.expected_coverage(40, 25)
    assert row["fid"] == fidelity.at_n(fidelity.fid, real.features, part.features, n)
    assert row["vendi"] == fidelity.vendi(sets._some(part.features, n), centre, spread)
    assert results["floor"]["vendi"] == fidelity.vendi(sets._some(real.features, n), centre, spread)
    assert results["floor"]["distance"] == fidelity.mean_distance(real.features)[0]


def test_each_measure_of_copies_has_its_own_limit(material):
    """Limits and counts by pixels and by features are not exchanged."""
    results, found = sets.judge_copies(material)
    row, copies = results["sets"][1], found["copied"]
    limits = results["limits"]
    assert row["by_pixels"] == (copies.pixels.relative < limits["pixels"]).sum()
    assert row["by_features"] == (copies.features.relative < limits["features"]).sum()
    assert abs(limits["pixels"] - limits["features"]) > 0.01
    assert row["median"] == np.median(copies.pixels.relative)


def test_attributes_are_each_sets_own(material, monkeypatch):
    """What a set shows is counted from its own tiles, and its wishes are compared with its own measures."""
    asked = []
    monkeypatch.setattr(sets.adherence, "adherence", lambda name, rows, measured: asked.append((rows, measured)) or {})
    part = material.synthetic[0]
    monkeypatch.setattr(part, "rows", [row | {"attributes": {"size": "under 3 mm"}} for row in part.rows])
    counts = sets.judge_attributes(material)["counts"]
    measured = sets.attributes.measure_all(list(part.images))
    assert counts[part.name] == sets._counts([sets.attributes.to_attributes(one)[0] for one in measured])
    assert counts[part.name] != counts[material.real.name]
    assert all(rows is part.rows and values == measured for rows, values in asked)


def test_a_classifier_of_synthetic_tiles_is_passed_over(world, tmp_path):
    """Where only S2 kept its weights the sets are compared by scattering: no error, no judge that knows synthetic tiles."""
    place = tmp_path / "S2" / "seed0"
    place.mkdir(parents=True)
    network.save(place / "model.safetensors", network.build("resnet18", "none", 0), "resnet18", 64)
    assert sets._baseline(tmp_path) is None


def test_what_each_measure_finds_is_counted_apart(material, monkeypatch):
    """Three tiles nearer by pixels, one other by features: 3, 1 and 4 copies. The three-sample test knows the class's own training
    tiles only."""
    rng, seen, nearest = np.random.default_rng(0), [], memorisation.nearest

    def search(part, *_):
        relative = rng.uniform(0.5, 1, (2, len(part.rows)))
        if part is material.synthetic[1]:
            relative[0, :3] = relative[1, 5] = 0
        return tuple(SimpleNamespace(relative=one) for one in relative)
    monkeypatch.setattr(sets, "_search", search)
    monkeypatch.setattr(memorisation, "nearest", lambda queries, training: seen.append(len(training)) or nearest(queries, training))
    row = sets.judge_copies(material)[0]["sets"][1]
    assert [row[key] for key in ("by_pixels", "by_features", "copies")] == [3, 1, 4]
    assert set(seen) == {len(material.real.rows)}
