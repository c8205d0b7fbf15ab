"""Feature vectors of tiles from an extractor that never saw a synthetic image, and their cache.

`choose` takes the first that is there: ImageNet ResNet-50 if its weights lie in torch's hub cache (never downloaded
here); the penultimate layer of a baseline classifier (arms B0, A1, W1, O1; one trained on synthetic tiles is refused);
else a wavelet scattering of the tile, which was never trained: cascades of wavelet modulus and averaging (Bruna &
Mallat, arXiv:1203.1513) over three rings around the lesion, with colour means. Proven by
tests/classify/test_features.py.
"""
import contextlib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import scipy.fft

from lesion.run import files

IMAGENET_FILES = ("resnet50-11ad3fa6.pth", "resnet50-0676ba61.pth")  # torchvision's IMAGENET1K_V2, V1: sha256 begins so
SCATTERING_VERSION = 1  # part of the extractor's identity: raise it when a feature changes
SIDE = 64               # pixels at which the scattering works
SCALES, ANGLES = 4, 4
BATCH = 32


@dataclass(frozen=True)
class Extractor:
    """name and sentence for the report; sha256, its identity in cache keys; invariant: the same for a tile's 8 dihedral
    views; run: images_u8 [M,R,R,3] uint8 -> float32 [M,D]."""
    name: str
    sentence: str
    sha256: str
    invariant: bool
    run: Callable[[np.ndarray], np.ndarray]


def choose(checkpoint: Path | None = None, device: str = "cpu") -> Extractor:
    """The best honest extractor there is: ImageNet's, else the classifier in `checkpoint`, else scattering.
    ValueError if the checkpoint is not a classifier or was trained on synthetic tiles."""
    return imagenet(device) or (classifier(checkpoint, device) if checkpoint else scattering())


def imagenet(device: str = "cpu") -> Extractor | None:
    """ResNet-50 trained on ImageNet, [M,2048] before its last layer, or None where torch's hub cache has no weights. ValueError
    where it has damaged ones."""
    import torch
    from torchvision.models import resnet50

    from lesion.classify import weights
    for name in IMAGENET_FILES:
        path = Path(torch.hub.get_dir()) / "checkpoints" / name
        if path.is_file():
            network = resnet50(weights=None)
            network.load_state_dict(weights.from_hub(path))
            return Extractor("imagenet", f"ImageNet ResNet-50 ({name}), the 2,048 values before its last layer",
                             files.sha256_file(path), False, partial(_penultimate, network.to(device)))
    return None


def classifier(path: Path, device: str = "cpu") -> Extractor:
    """The penultimate layer of RUN/<arm>/seed<k>/model.safetensors, [M,512 or 2048]. ValueError unless the folder's arm
    is one that trains on real tiles only."""
    from lesion.classify import network
    from lesion.classify.arms import ARMS
    arm = next((part for part in reversed(Path(path).resolve().parts) if part in ARMS), None)
    honest = [name for name in ARMS if ARMS[name].extra != "synthetic"]
    if arm not in honest:
        seen = f"arm {arm} was trained on synthetic tiles" if arm else "it lies in no arm's folder of a classify.py run"
        raise ValueError(f"{path} cannot judge pictures: {seen}; give RUN/<arm>/seed<k>/model.safetensors with <arm> "
                         f"one of {', '.join(honest)}")
    model, side = network.load(Path(path))
    return Extractor("classifier", f"the layer before the last of the baseline classifier {arm} (trained on real "
                     f"tiles only, at {side} px)",
                     files.sha256_file(path), False, partial(_penultimate, model.to(device)))


def _penultimate(model: Callable, images_u8: np.ndarray) -> np.ndarray:
    import torch

    from lesion.classify import network
    return np.concatenate([network.features(model, torch.from_numpy(np.array(images_u8[start:start + 256])))
                           for start in range(0, len(images_u8), 256)])


# ------------------------------------------------------------------------------------------ scattering

def scattering() -> Extractor:
    """The extractor of `scatter`."""
    return Extractor("scattering", "an untrained wavelet scattering of the tile (colour, contrast, texture over three "
                     "rings), as neither ImageNet weights nor a baseline classifier were given: weaker than a network",
                     files.sha256_json(["scattering", SCATTERING_VERSION]), True, scatter)


def scatter(images_u8: np.ndarray) -> np.ndarray:
    """images_u8 [M,R,R,3] uint8, R a multiple of 64 -> float32 [M,72], equal for the 8 dihedral views of a tile.

    With luma and two colour differences x_c of the tile at 64 px, rings w_r (soft, at 0, 45 and 90 % of the half side)
    and Morlet wavelets psi of scales j = 0..3 and 4 angles: S0 = <x, w>; contrast log sd; S1 = log <|x * psi_j|, w>;
    S2 = log <||x * psi_j| * psi_k|, w> for k > j (luma); energies are means over the angles (arXiv:1203.1513, section
    2.3). Logarithms are log(1 + energy in grey levels): what no eye sees should not weigh. ValueError for another
    shape.
    """
    if images_u8.ndim != 4 or images_u8.shape[1] != images_u8.shape[2] or images_u8.shape[1] % SIDE:
        raise ValueError(f"tiles of shape {images_u8.shape}: squares with a side that {SIDE} divides are needed")
    return np.concatenate([_scatter(images_u8[start:start + BATCH]) for start in range(0, len(images_u8), BATCH)])


def _scatter(images_u8):
    wavelets, rings = _bank()
    m, block = len(images_u8), images_u8.shape[1] // SIDE
    pixels = images_u8.reshape(m, SIDE, block, SIDE, block, 3).mean((2, 4), dtype=np.float32) / 255
    red, green, blue = np.moveaxis(pixels, 3, 0)
    x = np.stack([(red + green + blue) / 3, (red - green) / 2, (red + green) / 4 - blue / 2], axis=1)
    mean, centred = _over_rings(x, rings), x - x.mean((2, 3), keepdims=True)
    deviation = np.sqrt(np.maximum(_over_rings(centred ** 2, rings) - _over_rings(centred, rings) ** 2, 0))
    parts = [mean * np.float32([[8], [40], [20]]), _log(deviation)]  # colour means brought to a spread of about 1
    moduli = np.abs(scipy.fft.ifft2(scipy.fft.fft2(x)[:, :, None, None] * wavelets, workers=-1))  # [m,c,j,angle,h,w]
    parts.append(_log(_over_rings(moduli.mean(3), rings)))
    for scale in range(SCALES - 1):
        spectra = scipy.fft.fft2(moduli[:, 0, scale], workers=-1)[:, :, None, None]
        second = np.abs(scipy.fft.ifft2(spectra * wavelets[scale + 1:], workers=-1))  # [m,angle,k,angle,h,w]
        parts.append(_log(_over_rings(second.mean((1, 3)), rings)))
    return np.concatenate([part.reshape(m, -1) for part in parts], axis=1).astype(np.float32)


def _over_rings(maps, rings):
    """<map, w_r> of maps [...,SIDE,SIDE] -> [...,3]."""
    return maps.reshape(*maps.shape[:-2], -1) @ rings.reshape(len(rings), -1).T


def _log(energy):
    return 2 * np.log1p(255 * energy)


@cache
def _bank():
    """Fourier transforms of the Morlet wavelets [scale,angle,SIDE,SIDE] and the ring weights [3,SIDE,SIDE], float32."""
    omega = 2 * np.pi * np.fft.fftfreq(SIDE)
    wavelets = np.empty((SCALES, ANGLES, SIDE, SIDE))
    for scale in range(SCALES):
        centre, width = 0.75 * np.pi / 2 ** scale, 0.8 * 2 ** scale
        for angle in range(ANGLES):
            x, y = centre * np.cos(np.pi * angle / ANGLES), centre * np.sin(np.pi * angle / ANGLES)
            bump = np.exp(-width ** 2 / 2 * ((omega - x) ** 2 + (omega[:, None] - y) ** 2))
            low = np.exp(-width ** 2 / 2 * (omega ** 2 + omega[:, None] ** 2))
            wavelets[scale, angle] = bump - bump[0, 0] * low  # no response to a constant
    line = (np.arange(SIDE) - (SIDE - 1) / 2) / (SIDE / 2)
    radius = np.hypot(line, line[:, None])
    rings = np.stack([np.exp(-((radius - middle) / 0.25) ** 2) for middle in (0, 0.45, 0.9)])
    return wavelets.astype(np.float32), (rings / rings.sum((1, 2), keepdims=True)).astype(np.float32)


# ------------------------------------------------------------------------------------------ cache

def images_sha256(images_u8: np.ndarray) -> str:
    """Hex SHA-256 of the shape and the bytes of images_u8 [M,R,R,3], or of any other array."""
    digest = hashlib.sha256(str(images_u8.shape).encode())
    for start in range(0, len(images_u8), 1024):
        digest.update(np.ascontiguousarray(images_u8[start:start + 1024]))
    return digest.hexdigest()


def cached(extractor: Extractor, images_u8: np.ndarray, folder: Path | None = None) -> np.ndarray:
    """`extractor.run(images_u8)`, float32 [M,D], kept in `folder`/features-<key>.npz (None: not kept).

    The key is that of the images and the extractor, and both stand inside the file too, with the features' own hash: a file
    that was renamed, copied, cut or changed is made anew. ValueError for features that are not finite.
    """
    if folder is None:
        return _checked(extractor, images_u8)
    images = images_sha256(images_u8)
    path = Path(folder) / f"features-{files.sha256_json([images, extractor.sha256])[:16]}.npz"
    if path.is_file():
        with contextlib.suppress(ValueError):
            return load(path, images, extractor)
    features = _checked(extractor, images_u8)
    with contextlib.suppress(OSError), files.atomic_path(path) as temporary, open(temporary, "wb") as file:  # read-only: not kept
        np.savez(file, features=features, images=images, extractor=extractor.sha256, content=images_sha256(features))
    return features


def load(path: Path, images: str, extractor: Extractor) -> np.ndarray:
    """Features float32 [M,D] in `path`, if they are those of the images with the SHA-256 `images` by `extractor`; else
    ValueError."""
    try:
        with np.load(path, allow_pickle=False) as file:
            features, content, has_images, has_extractor = file["features"], *(str(file[key]) for key in ("content", "images", "extractor"))
    except Exception as error:  # what numpy and zipfile raise on damaged bytes has no list
        raise ValueError(f"{path} is damaged ({type(error).__name__}): delete it, and it is computed anew") from None
    if features.dtype != np.float32 or images_sha256(features) != content:
        raise ValueError(f"{path} is damaged (its features are not those that were written): delete it, and it is computed anew")
    if has_images != images:
        raise ValueError(f"{path} holds the features of other images ({has_images[:8]}, not {images[:8]}): delete it")
    if has_extractor != extractor.sha256:
        raise ValueError(f"{path} holds the features of another extractor than {extractor.name}: delete it")
    return features


def _checked(extractor, images_u8):
    features = extractor.run(images_u8)
    if not np.isfinite(features).all():
        bad = np.flatnonzero(~np.isfinite(features).all(1))
        raise ValueError(f"{extractor.name}: features of {len(bad)} tiles are not finite (first: tile {bad[0]})")
    return features
