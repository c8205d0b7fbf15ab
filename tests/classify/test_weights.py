"""lesion.classify.weights: the kinds of files in which people keep a ResNet's weights are read alike, others refused by name."""
import pytest
import torch
import torchvision
from safetensors.torch import save_file

from lesion.classify import network, weights


@pytest.fixture(scope="module")
def donor():
    """An ImageNet-like ResNet-18 whose weights are not those of a fresh one."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return torchvision.models.resnet18(num_classes=1000).state_dict()


def forms(state):
    """{name: what torch.save is given} of the kinds in use."""
    behind = {prefix: {prefix + key: value for key, value in state.items()} for prefix in ("module.", "model.", "module.backbone.")}
    return {"torchvision": state, "DataParallel": behind["module."], "imagenet example": {"state_dict": behind["module."], "epoch": 3},
            "Lightning": {"state_dict": behind["model."] | {"loss.weight": torch.ones(2)}, "pytorch-lightning_version": "2"},
            "torchvision reference": {"model": state, "optimizer": {}, "epoch": 1}, "kaggle": {"model_state_dict": state},
            "backbone": behind["module.backbone."],
            "old": {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}}


KINDS = list(forms({"conv1.weight": torch.ones(1)}))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_network(kind, donor, tmp_path):
    """Every tensor but the head's (and the counters of an old file) is the donor's."""
    torch.save(forms(donor)[kind], tmp_path / "w.pth")
    ours = network.build("resnet18", str(tmp_path / "w.pth"), 0).state_dict()
    differ = [key for key, value in ours.items() if not key.startswith("fc.") and not torch.equal(value, donor[key])]
    assert differ == []
    assert ours["fc.weight"].shape == (1, 512)


def test_safetensors_behind_a_prefix(donor, tmp_path):
    """The same from a .safetensors file."""
    save_file({"module." + key: value for key, value in donor.items()}, tmp_path / "w.safetensors")
    assert torch.equal(network.build("resnet18", str(tmp_path / "w.safetensors"), 0).layer3[0].conv1.weight, donor["layer3.0.conv1.weight"])


@pytest.mark.parametrize(("change", "words"), [
    (lambda state: {"model": state, "state_dict": state}, "several state dicts"),
    (lambda state: {f"{prefix}.{key}": value for prefix in ("student", "teacher") for key, value in state.items()}, "several networks"),
    (lambda state: state | {"layer1.0.se.fc1.weight": torch.ones(3)}, "another network.*layer1.0.se.fc1.weight"),
    (lambda state: {key: value for key, value in state.items() if key != "layer2.0.bn1.running_var"}, "first: layer2.0.bn1.running_var"),
    (lambda state: {"epoch": 3}, "does not fit"),
    (lambda state: [1, 2], "not a state dict"),
])
def test_refusals(change, words, donor, tmp_path):
    """Two networks in one file, gates that would be dropped in silence, statistics lost, no tensors: one line that names it."""
    torch.save(change(donor), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=words):
        network.build("resnet18", str(tmp_path / "w.pth"), 0)


def test_a_whole_module_is_refused_with_advice(tmp_path):
    """torch.save(model): never unpickled; the error says to save its state_dict()."""
    torch.save(torchvision.models.resnet18(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"save its state_dict\(\)"):
        weights.read(tmp_path / "w.pth")
