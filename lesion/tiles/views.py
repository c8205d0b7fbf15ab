"""The eight symmetries of the square, once: what makes eight tiles of one.

Proven by tests/tiles/test_views.py.
"""
from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

VIEWS = 8


def dihedral(x: Tensor | np.ndarray, view: int, axes: tuple[int, int] = (-2, -1)) -> Tensor | np.ndarray:
    """View 0..7 of a square whose rows and columns are `axes` of `x`, a torch tensor or numpy array: view % 4 quarter
    turns from the first axis towards the second (counter-clockwise as shown), then for view >= 4 a mirror left to
    right."""
    if isinstance(x, np.ndarray):
        x = np.rot90(x, view % 4, axes)
        return np.flip(x, axes[1]) if view >= 4 else x
    x = x.rot90(view % 4, dims=axes)
    return x.flip(axes[1]) if view >= 4 else x
