"""lesion.classify.sweep end to end: every arm trains as the protocol says, and a score belongs to its own tile's picture."""
import csv
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from made_runs import write_run
from PIL import Image
from tiny_tiles import write_set, write_synthetic

import classify
from lesion.classify import network, predictions, sweep
from lesion.run import files
from lesion.stats import classification
from lesion.tiles.seen import Parts

QUICK = ["--arch", "resnet18", "--weights", "none", "--image-size", "32", "--epochs", "1", "--batch-size", "16", "--device", "cpu"]
# evaluation protocol: (augmented, weighted, malignant tiles that an epoch holds beside the 12 real ones, of them synthetic)
PROTOCOL = {"B0": (False, False, 0, 0), "A1": (True, False, 0, 0), "W1": (True, True, 0, 0), "S2": (True, False, 12, 12),
            "S2w": (True, True, 12, 12), "O1": (True, False, 12, 0)}


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    """32 benign and 12 malignant training tiles, 12 and 12 held out, 12 synthetic ones."""
    folder = tmp_path_factory.mktemp("tiles")
    rows = write_set(folder / "data", {"train": (32, 12), "val": (8, 4), "test": (8, 4)})
    write_synthetic(folder / "synthetic", 12, [row for row in rows if row["split"] == "train" and row["label"] == "malignant"])
    return folder


def run(tiles, out, *more):
    classify.main(["--data", str(tiles / "data"), "--synthetic", str(tiles / "synthetic"), "--out", str(out), *QUICK, *map(str, more)])


@pytest.fixture
def caught(monkeypatch):
    """What `network.fit` is given, by call, in place of a training."""
    calls = []

    def fit(model, train, validation, recipe, seed, weighted, *_):
        calls.append({"train": train, "validation": validation, "recipe": recipe, "seed": seed, "weighted": weighted,
                      "first": model.conv1.weight.detach().clone()})
        return []
    monkeypatch.setattr(network, "fit", fit)
    return calls


def test_every_arm_trains_as_the_protocol_says(tiles, tmp_path, caught):
    """Augmentation, weighted loss and training set of the six arms are those of the protocol's table, written out above: an
    exchange of two arms, or B0 augmented, fails here. The same steps in every arm; validation tiles are never learnt from."""
    run(tiles, tmp_path / "run", "--seeds", 1)
    synthetic = {tuple(np.asarray(Image.open(path)).ravel()) for path in (tiles / "synthetic").glob("*.png")}
    for (name, (augmented, weighted, added, drawn)), call in zip(PROTOCOL.items(), caught, strict=True):
        assert (call["recipe"].augmentation != "none", call["weighted"]) == (augmented, weighted), name
        order, labels = call["train"].order, call["train"].labels
        assert (labels[order] == 1).sum() == 12 + added, name
        assert (labels[order] == 0).sum() == 32, name
        learnt = [tuple(image.ravel().tolist()) for image in call["train"].images_u8[order].numpy()]
        assert sum(image in synthetic for image in learnt) == drawn, name
        assert not set(order.tolist()) & set(call["validation"].order.tolist()), name
        assert call["recipe"].steps == caught[0]["recipe"].steps, name


def test_seeds_are_different_runs(tiles, tmp_path, caught):
    """Seed k of a sweep from --seed 10 starts from weights, and draws batches, of seed 10 + k; arms of a seed share both."""
    run(tiles, tmp_path / "run", "--seeds", 2, "--seed", 10, "--experiments", "B0", "A1")
    assert [call["seed"] for call in caught] == [10, 10, 11, 11]
    assert torch.equal(caught[0]["first"], caught[1]["first"])
    assert not torch.equal(caught[0]["first"], caught[2]["first"])


def test_a_score_belongs_to_its_own_picture(tiles, tmp_path):
    """Each validation and test tile, read again from its file by its id and scored alone by the saved network: the score in
    predictions.csv, synthetic tiles among the training set or not."""
    run(tiles, tmp_path / "run", "--seeds", 1, "--experiments", "A1", "S2", "O1")
    names = {row["isic_id"]: row["file_name"] for row in files.read_manifest(tiles / "data")}
    for arm in ("A1", "S2", "O1"):
        model, _ = network.load(tmp_path / "run" / arm / "seed0" / "model.safetensors")
        with open(tmp_path / "run" / arm / "seed0" / "predictions.csv", newline="", encoding="utf-8") as file:
            table = list(csv.DictReader(file))
        alone = [network.predict(model, torch.from_numpy(np.asarray(Image.open(tiles / "data" / names[row["id"]])).copy()[None]))[0]
                 for row in table]
        assert [float(row["score"]) for row in table] == pytest.approx(alone, abs=1e-5)
        assert len({round(score, 4) for score in alone}) > 10


def test_one_malignant_test_tile_is_refused_at_once(tiles, tmp_path):
    """A test part with a single malignant tile, whose scores could never be judged: refused before anything is written."""
    folder = tmp_path / "data"
    rows = write_set(folder, {"train": (16, 6), "val": (4, 4), "test": (4, 1)})
    assert rows
    with pytest.raises(ValueError, match="the test part has 1 malignant tile: at least 2"):
        classify.main(["--data", str(folder), "--out", str(tmp_path / "run"), *QUICK, "--experiments", "B0"])
    assert not (tmp_path / "run").exists()


def test_the_ratio_that_fits_is_named(tiles, tmp_path):
    """12 tiles where 36 are asked for: the error says --ratio 1; with 5 of 12, 0.41, and that ratio is accepted."""
    with pytest.raises(ValueError, match=r"generate.py --count 36`, or take --ratio 1$"):
        run(tiles, tmp_path / "run", "--ratio", 3)
    rows = [{"label": "malignant"}] * 12
    assert sweep.largest_ratio(5, 12) == 0.41
    write_synthetic(tmp_path / "five", 5, [])
    with pytest.raises(ValueError, match="--ratio 0.41"):
        sweep.check_count(tmp_path / "five", 12, Parts(rows, [], [], False))
    sweep.check_count(tmp_path / "five", sweep.arms.extra_count(0.41, rows), Parts(rows, [], [], False))


@pytest.mark.parametrize("damage", [{"seeds": "5"}, {"experiments": 5}, {"notes": None}])
def test_a_damaged_record_stops_resuming_in_one_line(tiles, tmp_path, damage):
    """args.json of the run that would go on is named, and stays."""
    files.write_json(tmp_path / "args.json", damage)
    with pytest.raises(ValueError, match="args.json is damaged"):
        run(tiles, tmp_path, "--experiments", "B0")
    assert files.read_json(tmp_path / "args.json") == damage


def test_flags_reach_the_training(tiles, tmp_path, caught):
    """Rate, decay, power of the class weights, augmentation and the number of benign tiles are those of the command line."""
    run(tiles, tmp_path / "run", "--seeds", 1, "--experiments", "W1", "--max-benign", 20, "--lr", 0.007, "--weight-decay", 0.3,
        "--weight-power", 0.5, "--augmentation", "dihedral")
    recipe, train = caught[0]["recipe"], caught[0]["train"]
    found = (recipe.lr, recipe.weight_decay, recipe.weight_power, recipe.augmentation, recipe.batch_size)
    assert found == (0.007, 0.3, 0.5, "dihedral", 16)
    assert ((train.labels[train.order] == 0).sum(), (train.labels[train.order] == 1).sum()) == (20, 12)


def test_validation_share_is_obeyed(tiles, tmp_path, caught):
    """Without a val part of its own half of train is held back where half is asked for, with folds and without."""
    write_set(tmp_path / "data", {"train": (32, 16), "test": (8, 4)})
    common = ["--out", tmp_path / "run", *QUICK, "--seeds", 1, "--experiments", "B0", "--validation-share", 0.5]
    classify.main([str(part) for part in ("--data", tmp_path / "data", *common)])
    assert len(caught[0]["validation"].order) == pytest.approx(24, abs=4)
    common[1] = tmp_path / "folds"
    classify.main([str(part) for part in ("--data", tmp_path / "data", *common, "--folds", 2)])
    assert len(caught[1]["validation"].order) == pytest.approx(15, abs=4)


@pytest.mark.parametrize(("change", "words"), [
    ("split", "data_sha256 was"), (["--seed", 1], "seed was 0, now 1"), (["--max-benign", 20], "max_benign was 0, now 20"),
    (["--validation-share", 0.3], "validation_share was 0.2, now 0.3")])
def test_another_split_is_another_run(tiles, tmp_path, caught, change, words):
    """A folder begun with other parts is not gone on with: a tile moved to another part, another seed, limit or share."""
    rows = write_set(tmp_path / "data", {"train": (32, 12), "val": (8, 4), "test": (8, 4)})
    flags = [str(part) for part in ("--data", tmp_path / "data", "--out", tmp_path / "run", *QUICK, "--seeds", 1, "--experiments", "B0")]
    classify.main(flags)
    if change == "split":
        moved = rows[0]["patient_id"]
        files.write_manifest(tmp_path / "data", [row | {"split": "val"} if row["patient_id"] == moved else row for row in rows])
        change = []
    with pytest.raises(ValueError, match=words):
        classify.main([*flags, *map(str, change)])


def test_the_table_says_what_its_header_says(tmp_path):
    """Recall at the chosen threshold, AUROC and AUPRC, means over seeds, each under its name."""
    write_run(tmp_path, {"A1": 0.5})
    runs = predictions.read_runs(tmp_path)["A1"].values()
    values = [classification.evaluate(run.labels, run.scores, run.thresholds) for run in runs]
    header, line = sweep.table(tmp_path)[1:3]
    assert header.split()[:5] == ["arm", "seeds", "recall", "AUROC", "AUPRC"]
    assert line.split()[2:5] == [f"{np.mean([value[name] for value in values]):.3f}" for name in ("recall_chosen", "auroc", "auprc")]


def test_notes_tell_what_the_generator_saw():
    """Validation tiles that the generator saw are noted with their number; unknown provenance is another note."""
    record = {"folder": "samples", "accepted_unknown": False, "held_back_seen": 7}
    parts = Parts([], [], [], True)
    (note,) = sweep.notes_of(SimpleNamespace(folds=[parts], checked=[record]))
    assert "saw 7 of the tiles held back" in note
    (note,) = sweep.notes_of(SimpleNamespace(folds=[parts], checked=[record | {"accepted_unknown": True, "held_back_seen": 0}]))
    assert "nothing shows what the generator" in note


def test_the_seed_chooses_among_the_synthetic_tiles(tiles, tmp_path, caught):
    """Half as many synthetic tiles as there are: another seed learns from others."""
    for seed in (0, 1):
        run(tiles, tmp_path / str(seed), "--seeds", 1, "--seed", seed, "--experiments", "S2", "--ratio", 0.5)
    one, two = (call["train"].images_u8[44:50].numpy().tobytes() for call in caught)
    assert one != two
