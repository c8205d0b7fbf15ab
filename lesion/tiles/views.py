"""The eight symmetries of the square, once: what makes eight tiles of one.

Proven by tests/tiles/test_views.py.
"""

from torch import Tensor

VIEWS = 8


def dihedral(x: Tensor, view: int) -> Tensor:
    """One of the 8 symmetries of the square, of the last two axes: quarter turns (view % 4), then a mirror for view >= 4."""
    x = x.rot90(view % 4, dims=(-2, -1))
    return x.flip(-1) if view >= 4 else x
