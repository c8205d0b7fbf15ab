"""Which tile and view each training step sees, and their latents: encoded once, as mean and log-variance, kept on disk.

The VAE is frozen, so its output for a tile is fixed up to the dihedral view (8 symmetries of the square) and the draw from the
posterior; the draw is made at every step, the view is part of the plan. Only the (tile, view) pairs that the run will use are
encoded. Proven by tests/train/test_latents.py.
"""
import contextlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lesion.run import files
from lesion.run.state import load_state, save_state, weights_sha256
from lesion.sd.vae import VAE, to_pixels
from lesion.tiles.views import VIEWS, dihedral


def plan(tiles: int, batch: int, steps: int, seed: int, views: int = VIEWS) -> tuple[np.ndarray, np.ndarray]:
    """(tile number, view), each int64 [steps, batch]: every tile once an epoch in a fresh order, the view drawn each time.

    A longer plan begins with the shorter one, so that a run can be extended. views = 1 switches the views off.
    """
    epochs = -(-steps * batch // tiles)
    orders = [np.random.default_rng([seed, 0, epoch]).permutation(tiles) for epoch in range(epochs)]
    chosen = np.concatenate(orders)[:steps * batch].reshape(steps, batch)
    return chosen, np.random.default_rng([seed, 1]).integers(views, size=(steps, batch))


def encode(vae: VAE, images_u8: np.ndarray, pairs: np.ndarray, folder: Path, device: torch.device,
           progress: Callable | None = None) -> tuple[Tensor, Tensor]:
    """mean, logvar float32 [N,8,4,h,w] on `device`, filled at the (tile, view) rows of `pairs` [M,2]; the rest is NaN.

    Kept in `folder`/latents-<key>.safetensors, key = SHA-256 of the tiles' pixels (so resolution and colour normalisation) and of the
    VAE's weights; its content is verified by its hash, a damaged one is made anew. On the CPU one tile is encoded at a time, so that
    a value never depends on its neighbours.
    Raises ValueError if the VAE's output is not finite.
    """
    key = files.sha256_json([weights_sha256(vae), list(images_u8.shape), files.sha256_bytes(np.ascontiguousarray(images_u8))])[:16]
    path = Path(folder) / f"latents-{key}.safetensors"
    side = images_u8.shape[1] // 8
    shape = (len(images_u8), VIEWS, vae.config.latent_channels, side, side)
    mean, logvar = torch.full(shape, torch.nan), torch.full(shape, torch.nan)
    if path.is_file():
        with contextlib.suppress(ValueError, KeyError):  # damaged, or another set's under this name: only a cache, made anew
            saved, meta = load_state(path)
            if meta["key"] == key and saved["mean"].shape == saved["logvar"].shape == shape:
                mean, logvar = saved["mean"], saved["logvar"]
    have = ~mean[:, :, 0, 0, 0].isnan().numpy()
    todo = sorted({(int(i), int(v)) for i, v in pairs if not have[i, v]})
    batch = 1 if device.type == "cpu" else 16
    starts = range(0, len(todo), batch)
    with torch.no_grad():
        for count, start in enumerate(progress(starts) if progress and todo else starts, 1):
            some = todo[start:start + batch]
            pixels = torch.cat([dihedral(to_pixels(images_u8[i:i + 1]), v) for i, v in some]).to(device)
            for (i, v), m, s in zip(some, *vae.encode(pixels)):
                mean[i, v], logvar[i, v] = m, s
                if not (m.isfinite().all() and s.isfinite().all()):
                    raise ValueError(f"the VAE gives NaN or infinity for tile number {i}: is the checkpoint damaged?")
            if count % 500 == 0:
                _keep(path, key, mean, logvar)
    if todo:
        _keep(path, key, mean, logvar)
    return mean.to(device), logvar.to(device)


def _keep(path: Path, key: str, mean: Tensor, logvar: Tensor) -> None:
    with contextlib.suppress(OSError):  # a data set in a read-only or full place is used without a cache
        files.sweep(path.parent, deep=False)
        save_state(path, {"mean": mean, "logvar": logvar}, {"key": key})
