"""lesion.classify.network: it learns, resumes bit for bit, weighs classes as said, loads weights strictly, refuses NaN."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from tiny_tiles import picture

from lesion.classify import network
from lesion.run import files


@pytest.fixture(scope="module")
def tiles():
    """48 benign and 24 malignant tiles of 32 px to learn from, half as many to choose by."""
    rng = np.random.default_rng(0)
    labels = torch.tensor([0, 0, 1] * 36)
    images = torch.from_numpy(np.stack([picture(rng, bool(label)) for label in labels]))
    index = torch.arange(108)
    return network.Pool(images, labels, index[:72]), network.Pool(images, labels, index[72:])


def recipe(**changes):
    return network.Recipe(**{"steps": 6, "steps_per_epoch": 2, "batch_size": 8, **changes})


def fit(tiles, path, seed=0, weighted=False, on_epoch=lambda row: None, **changes):
    model = network.build("resnet18", "none", seed)
    rows = network.fit(model, *tiles, recipe(**changes), seed, weighted, path, on_epoch)
    return model, rows


def test_learns(tiles, tmp_path):
    """A class that shows is found: validation AUROC over .9 after 24 steps, loss fallen, the saved model the same."""
    model, rows = fit(tiles, tmp_path / "state", steps=24, steps_per_epoch=8, batch_size=16, augmentation="dihedral")
    scores = network.predict(model, tiles[1].images_u8, tiles[1].order)
    assert scores.shape == (36,)
    assert max(row["val_auroc"] for row in rows) > 0.9
    assert rows[-1]["loss"] < rows[0]["loss"]
    network.save(tmp_path / "model.safetensors", model, "resnet18", 32)
    loaded, side = network.load(tmp_path / "model.safetensors")
    assert side == 32
    assert np.array_equal(network.predict(loaded, tiles[1].images_u8, tiles[1].order), scores)
    assert network.features(loaded, tiles[1].images_u8[:5]).shape == (5, 512)


def test_best_epoch_is_kept(tiles, tmp_path, monkeypatch):
    """The weights left are those of the epoch with the best validation AUPRC (of equals, the first), whatever came after."""
    auprc, snapshots = iter([0.3, 0.8, 0.8, 0.4]), []
    monkeypatch.setattr(network.classification, "evaluate", lambda *_: {"auprc": [next(auprc)], "auroc": [0.5]})
    model = network.build("resnet18", "none", 1)
    network.fit(model, *tiles, recipe(steps=8), 1, False, tmp_path / "state", lambda row: snapshots.append(
        network.predict(model, tiles[1].images_u8, tiles[1].order)))
    scores = network.predict(model, tiles[1].images_u8, tiles[1].order)
    assert [np.array_equal(scores, snapshot) for snapshot in snapshots] == [False, True, False, False]


@pytest.mark.parametrize("auprc", [[0.8, 0.3, 0.4], [0.3, 0.4, 0.8]], ids=["first is best", "last is best"])
def test_resumed_run_equals_uninterrupted(tiles, tmp_path, monkeypatch, auprc):
    """Stopped after every epoch and started anew, the run ends with the same rows and the same weights, bit for bit, be they
    those of an epoch before the stop or after it."""
    values = iter(auprc * 2)
    monkeypatch.setattr(network.classification, "evaluate", lambda *_: {"auprc": [next(values)], "auroc": [0.5]})
    whole, rows = fit(tiles, tmp_path / "whole", weighted=True)

    def stop(row):
        if row["epoch"] < 3:
            raise KeyboardInterrupt
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            fit(tiles, tmp_path / "cut", weighted=True, on_epoch=stop)
    resumed, again = fit(tiles, tmp_path / "cut", weighted=True)
    assert again == rows
    after = resumed.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in whole.state_dict().items())


def test_seeds_differ(tiles, tmp_path):
    """Another seed is another run (else 'over seeds' would mean nothing)."""
    assert fit(tiles, tmp_path / "a", 0, steps=2)[1] != fit(tiles, tmp_path / "b", 1, steps=2)[1]


def test_class_weights():
    """3 benign to 1 malignant: weights 2/3 and 2 (both classes weigh the same); power .5 the root; 0 none."""
    labels = torch.tensor([0, 0, 0, 1])
    assert network.class_weights(labels, 1.0).tolist() == pytest.approx([2 / 3, 2])
    assert network.class_weights(labels, 0.5).tolist() == pytest.approx([(2 / 3) ** .5, 2 ** .5])
    assert network.class_weights(labels, 0.0).tolist() == [1, 1]


def test_learning_rate():
    """Linear over the first tenth to the peak, then half a cosine to nearly 0."""
    rates = [network.lr_at(step, recipe(steps=100, lr=1.0)) for step in range(100)]
    assert rates[:10] == pytest.approx([.1, .2, .3, .4, .5, .6, .7, .8, .9, 1.0])
    assert rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.5)
    assert rates[99] < 0.001
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_batches_cover_every_epoch():
    """Full batches cut from epoch-wise shuffles: each index once an epoch, also where batches straddle epochs."""
    order = torch.tensor([3, 5, 7, 9, 11, 11, 2])
    batches = [network.batch_of(order, step, 3, seed=4) for step in range(14)]
    assert all(len(batch) == 3 for batch in batches)
    stream = torch.cat(batches)
    for epoch in range(6):
        assert sorted(stream[epoch * 7:(epoch + 1) * 7].tolist()) == sorted(order.tolist())
    assert stream[:7].tolist() != stream[7:14].tolist()
    assert network.batch_of(order[:2], 0, 5, seed=0).shape == (5,)


def test_weights_from_a_file(tmp_path):
    """A torchvision state dict of 1,000 classes is taken over but for its head; .pt and .safetensors alike."""
    from safetensors.torch import save_file
    donor = torchvision.models.resnet18(num_classes=1000)
    torch.save(donor.state_dict(), tmp_path / "r18.pth")
    save_file(donor.state_dict(), tmp_path / "r18.safetensors")
    for name in ("r18.pth", "r18.safetensors"):
        model = network.build("resnet18", str(tmp_path / name), 0)
        assert torch.equal(model.layer3[0].conv1.weight, donor.layer3[0].conv1.weight)
        assert model.fc.weight.shape == (1, 512)


def test_bad_weights(tmp_path):
    """No such file, another network's, something else, an unknown architecture: one line each."""
    torch.save(torchvision.models.resnet34().state_dict(), tmp_path / "r34.pth")
    (tmp_path / "text.pth").write_text("no weights", encoding="utf-8")
    for weights, words in ((tmp_path / "none.pth", "no such file"), (tmp_path / "text.pth", "not a state dict")):
        with pytest.raises(ValueError, match=words):
            network.build("resnet18", str(weights), 0)
    with pytest.raises(ValueError, match="does not fit the network"):
        network.build("resnet50", str(tmp_path / "r34.pth"), 0)
    with pytest.raises(ValueError, match="allowed are resnet18"):
        network.build("vgg16", "none", 0)


def test_damaged_imagenet_weights_are_named(tmp_path, monkeypatch):
    """A file in torch's cache that is not what its name says, or no state dict although it is: one line that names it; a whole one is
    read from there and nothing is downloaded."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    place = tmp_path / "hub" / "checkpoints"
    files.write_bytes(place / "resnet18-f37072fd.pth", b"garbage")
    with pytest.raises(ValueError, match=r"resnet18-f37072fd.pth is damaged: its SHA-256 does not begin with f37072fd.*; delete it$"):
        network.build("resnet18", "imagenet", 0)
    model = network.build("resnet18", "none", 3)
    torch.save(model.state_dict(), tmp_path / "made.pth")
    for data, words in ((b"garbage", "no state dict of tensors"), ((tmp_path / "made.pth").read_bytes(), None)):
        name = f"resnet18-{files.sha256_bytes(data)[:8]}.pth"
        files.write_bytes(place / name, data)
        found = SimpleNamespace(url=f"https://host/models/{name}", get_state_dict=lambda **_: pytest.fail("downloaded"))
        monkeypatch.setattr(torchvision.models, "get_model_weights", lambda arch, found=found: SimpleNamespace(DEFAULT=found))
        if words:
            with pytest.raises(ValueError, match=words):
                network.build("resnet18", "imagenet", 0)
        else:
            assert torch.equal(network.build("resnet18", "imagenet", 0).conv1.weight, model.conv1.weight)



def test_divergence_is_an_error(tiles, tmp_path):
    """A learning rate that blows up: a ValueError, and no state to resume from. NaN weights give no scores."""
    with pytest.raises(ValueError, match="not finite"):
        fit(tiles, tmp_path / "state", lr=1e30)
    assert not (tmp_path / "state").exists()
    model = network.build("resnet18", "none", 0)
    model.fc.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        network.predict(model, tiles[1].images_u8)


def test_one_class_is_refused(tiles, tmp_path):
    """Training tiles of one class only: an error before the first step."""
    benign = tiles[0].order[tiles[0].labels[tiles[0].order] == 0]
    with pytest.raises(ValueError, match="one class only"):
        fit((network.Pool(tiles[0].images_u8, tiles[0].labels, benign), tiles[1]), tmp_path / "state")


def test_damaged_state_is_named(tiles, tmp_path):
    """A state file that is not one: an error that names it, nothing trained over it."""
    (tmp_path / "state").write_bytes(b"torn")
    with pytest.raises(ValueError, match="damaged"):
        fit(tiles, tmp_path / "state")


@pytest.mark.parametrize("weighted", [False, True])
def test_loss_of_a_step_by_hand(tiles, tmp_path, weighted):
    """The first step's loss is sum(w l) / sum(w) of its batch, w by class where weighted, else 1: neither the plain mean of the
    weighted losses nor their sum."""
    settings = recipe(steps=1, steps_per_epoch=1, batch_size=20, augmentation="none")
    labels = tiles[0].labels
    index = network.batch_of(tiles[0].order, 0, 20, 3)
    model = network.build("resnet18", "none", 3).train()
    with torch.no_grad():
        logits = model(network.normalise(tiles[0].images_u8[index]))[:, 0]
    losses = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels[index].float(), reduction="none")
    weights = torch.tensor([0.75, 1.5])[labels[index]] if weighted else torch.ones(20)  # 48 benign, 24 malignant tiles
    rows = network.fit(network.build("resnet18", "none", 3), *tiles, settings, 3, weighted, tmp_path / "state")
    assert 0 < labels[index].sum() < 20
    assert rows[0]["loss"] == pytest.approx(float((losses * weights).sum() / weights.sum()), rel=1e-5)
    assert abs(float((losses * weights).mean()) - rows[0]["loss"]) > 1e-4 or not weighted


def test_what_decays():
    """Weight decay on every kernel and matrix, none on biases and normalisation; every parameter in one group, once."""
    model = network.build("resnet18", "none", 0)
    decayed, free = network._groups(model, 0.05)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.05, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    kernels = {name for name in names.values() if name == "fc.weight" or "conv" in name or "downsample.0" in name}
    assert {names[id(parameter)] for parameter in decayed["params"]} == kernels
    assert {names[id(parameter)] for parameter in free["params"]} == set(names.values()) - kernels
    assert len(decayed["params"]) + len(free["params"]) == len(names)


def test_one_step_is_adamw(tiles, tmp_path):
    """The weights after one step are torch's AdamW's with that decay and rate: betas .9 and .999, eps 1e-8."""
    settings = recipe(steps=1, steps_per_epoch=1, batch_size=20, augmentation="none", lr=0.01, weight_decay=0.3)
    ours = network.build("resnet18", "none", 3)
    network.fit(ours, *tiles, settings, 3, False, tmp_path / "state")
    theirs = network.build("resnet18", "none", 3).train()
    index = network.batch_of(tiles[0].order, 0, 20, 3)
    logits = theirs(network.normalise(tiles[0].images_u8[index]))[:, 0]
    torch.nn.functional.binary_cross_entropy_with_logits(logits, tiles[0].labels[index].float()).backward()
    for name, parameter in theirs.named_parameters():
        rate = network.lr_at(0, settings)
        torch.optim.AdamW([parameter], lr=rate, weight_decay=0.3 if parameter.ndim > 1 else 0.0).step()
        # the first step is lr g / (|g| + eps): where |g| is at rounding level its sign is noise, so a few may be a step off
        off = (dict(ours.named_parameters())[name] - parameter).abs() > 1e-5 + 1e-4 * parameter.abs()
        assert off.float().mean() < 1e-3, name


def test_every_step_augments_anew(tiles, tmp_path, monkeypatch):
    """Each step has random numbers of its own for augmentation, within an epoch too."""
    drawn = []
    monkeypatch.setattr(network, "augment", lambda images, name, generator: drawn.append(
        torch.rand(1, generator=generator).item()) or network.normalise(images))
    fit(tiles, tmp_path / "state")
    assert len(set(drawn)) == 6
