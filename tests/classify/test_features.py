"""Honest features: their definition, invariance and answers, and a cache that makes anew what is not its own."""
import numpy as np
import pytest
import torch

from lesion.classify import features, network
from lesion.run import files


@pytest.fixture(scope="module")
def images():
    """40 smooth random tiles [40,64,64,3] uint8."""
    rng = np.random.default_rng(0)
    noise = torch.from_numpy(rng.normal(size=(40, 3, 8, 8)))
    smooth = torch.nn.functional.interpolate(noise, size=64, mode="bicubic")
    return (smooth * 25 + 150).clamp(0, 255).permute(0, 2, 3, 1).numpy().astype(np.uint8)


def counted(calls=None):
    """An extractor of 3 values a tile that notes each run in `calls`."""
    def run(tiles):
        if calls is not None:
            calls.append(len(tiles))
        return tiles.mean((1, 2)).astype(np.float32)
    return features.Extractor("mean", "mean colour", "ab" * 32, True, run)


def test_scattering_is_the_same_for_the_eight_views(images):
    """Turned and mirrored tiles have the same features, to 1 % of the spread between tiles."""
    plain = features.scatter(images)
    assert plain.shape == (40, 72)
    assert plain.dtype == np.float32
    for view in (np.rot90(images, 1, (1, 2)), images[:, :, ::-1], images.transpose(0, 2, 1, 3)):
        assert np.abs(features.scatter(np.ascontiguousarray(view)) - plain).max() < 0.02 * plain.std(0).max()


def test_scattering_of_gratings_answers_at_their_scale():
    """A grating excites the first-order coefficient of the wavelet scale tuned to it, a flat tile none: frequencies
    0.75 pi / 2^j lie at the centre of scale j."""
    x = np.arange(64)
    flat = features.scatter(np.full((1, 64, 64, 3), 128, np.uint8))[0]
    np.testing.assert_allclose(flat[9:], 0, atol=1e-4)
    for scale, cycles in enumerate((24, 12, 6, 3)):  # in 64 px: 2 pi 24 / 64 = 0.75 pi
        wave = 128 + 60 * np.cos(2 * np.pi * cycles * x / 64)
        tile = np.round(np.broadcast_to(wave[None, :, None], (64, 64, 3))).astype(np.uint8)[None]
        first = features.scatter(tile)[0, 18:18 + 12].reshape(4, 3)  # luma: scale x ring
        assert first[:, 0].argmax() == scale


def test_scattering_equals_a_plain_convolution(images):
    """One first-order and one second-order coefficient written out: |x * psi| by direct sums over shifts."""
    wavelets, rings = features._bank()
    luma = images[0].mean(2) / 255

    def modulus(field, kernel):
        spread = [np.roll(kernel, (y, x), (0, 1)) * field[y, x] for y in range(64) for x in range(64)]
        return np.abs(np.sum(spread, axis=0))

    energy = [modulus(luma, np.fft.ifft2(wavelets[1, angle])) for angle in range(4)]
    found = features.scatter(images[:1])[0]
    expected = 2 * np.log1p(255 * np.mean([(e * rings[0]).sum() for e in energy]))
    assert found[18 + 3] == pytest.approx(expected, rel=1e-4)
    second = np.mean([(np.abs(np.fft.ifft2(np.fft.fft2(e) * wavelets[3, angle])) * rings[0]).sum()
                      for e in energy for angle in range(4)])
    start = 18 + 3 * 12 + 9 + 3  # past S0, deviations, S1 and the pairs (0,1) (0,2) (0,3), (1,2)
    assert found[start] == pytest.approx(2 * np.log1p(255 * second), rel=1e-4)


def test_cache_runs_once_and_only_for_its_own_images(tmp_path, images):
    """The second call reads the file; other images or another extractor make a file of their own."""
    calls = []
    first = features.cached(counted(calls), images, tmp_path)
    again = features.cached(counted(calls), images, tmp_path)
    np.testing.assert_array_equal(first, again)
    assert calls == [40]
    features.cached(counted(calls), images[:5], tmp_path)
    assert calls == [40, 5]
    assert len(list(tmp_path.glob("features-*.npz"))) == 2


def test_features_of_other_images_are_made_anew(tmp_path, images):
    """A cache renamed over another's place, of another extractor, or cut in the middle is seen, and replaced by the right one."""
    right = features.cached(counted(), images, tmp_path)
    own, = tmp_path.glob("*.npz")
    whole = own.read_bytes()
    features.cached(counted(), images[::-1], tmp_path)
    other, = set(tmp_path.glob("*.npz")) - {own}
    with pytest.raises(ValueError, match="another extractor"):
        features.load(other, features.images_sha256(images[::-1]), features.scattering())
    for data, words in ((other.read_bytes(), "features of other images"), (whole[:300], "damaged"), (b"", "damaged")):
        own.write_bytes(data)
        with pytest.raises(ValueError, match=words) as error:
            features.load(own, features.images_sha256(images), counted())
        assert "\n" not in str(error.value)
        np.testing.assert_array_equal(features.cached(counted(), images, tmp_path), right)
        np.testing.assert_array_equal(features.load(own, features.images_sha256(images), counted()), right)


def test_any_flipped_bit_of_a_cache_is_seen(tmp_path, images):
    """One bit of every fifth byte flipped in turn (of the archive's, the headers', the numbers'): the features are the right ones, never
    others, and nothing is raised."""
    right = features.cached(counted(), images[:4], tmp_path)
    path, = tmp_path.glob("*.npz")
    whole = path.read_bytes()
    for place in range(0, len(whole), 5):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1:])
        found = features.cached(counted(), images[:4], tmp_path)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, right)


def test_nan_features_stop_it_and_are_not_kept(tmp_path, images):
    """An extractor that returns NaN is an error; nothing is cached."""
    broken = features.Extractor("broken", "", "00", True, lambda x: np.full((len(x), 2), np.nan, np.float32))
    with pytest.raises(ValueError, match="40 tiles are not finite"):
        features.cached(broken, images, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_classifier_gives_features_if_it_saw_real_tiles_only(tmp_path, images):
    """RUN/B0/seed0/model.safetensors is taken, and gives the activations before its last layer; the same file under
    an arm with synthetic tiles, or outside a run, is refused."""
    model = network.build("resnet18", "none", 0)
    for arm in ("B0", "S2"):
        (tmp_path / arm / "seed0").mkdir(parents=True)
        network.save(tmp_path / arm / "seed0" / "model.safetensors", model, "resnet18", 64)
    extractor = features.choose(tmp_path / "B0" / "seed0" / "model.safetensors")
    found = extractor.run(images[:4])
    model.eval()
    with torch.inference_mode():
        logits = model.fc(torch.from_numpy(found))[:, 0]
        scores = network.predict(model, torch.from_numpy(images[:4]))
    np.testing.assert_allclose(torch.sigmoid(logits).numpy(), scores, rtol=1e-4)
    assert "B0" in extractor.sentence
    with pytest.raises(ValueError, match="arm S2 was trained on synthetic tiles"):
        features.choose(tmp_path / "S2" / "seed0" / "model.safetensors")
    with pytest.raises(ValueError, match="no arm's folder"):
        features.classifier(tmp_path / "model.safetensors")


def test_imagenet_weights_are_taken_from_the_cache_only(tmp_path, monkeypatch):
    """With nothing in the hub cache no network is reached and scattering is chosen; with weights there, they are."""
    from torchvision.models import resnet50
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *a, **k: pytest.fail("downloaded"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert features.choose().name == "scattering"
    torch.save(resnet50(weights=None).state_dict(), tmp_path / "made.pth")
    name = f"resnet50-{files.sha256_file(tmp_path / 'made.pth')[:8]}.pth"
    files.write_bytes(tmp_path / "hub" / "checkpoints" / name, (tmp_path / "made.pth").read_bytes())
    monkeypatch.setattr(features, "IMAGENET_FILES", (name,))
    extractor = features.choose()
    assert extractor.name == "imagenet"
    assert extractor.run(np.zeros((2, 64, 64, 3), np.uint8)).shape == (2, 2048)


@pytest.mark.parametrize("data", [b"garbage", b"PK\3\4" + bytes(100)])
def test_damaged_imagenet_weights_are_named(tmp_path, monkeypatch, data):
    """A file in torch's cache that is not what its name says: one line that names it and says what to do."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    files.write_bytes(tmp_path / "hub" / "checkpoints" / features.IMAGENET_FILES[0], data)
    with pytest.raises(ValueError, match=r"resnet50-11ad3fa6.pth is damaged: its SHA-256 does not begin with 11ad3fa6.*; delete it$"):
        features.choose()


def test_tiles_of_another_size_are_refused():
    """One line for tiles whose side 64 does not divide."""
    with pytest.raises(ValueError, match="64 divides"):
        features.scatter(np.zeros((1, 100, 100, 3), np.uint8))
