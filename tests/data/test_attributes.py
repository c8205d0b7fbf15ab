"""Attributes measured on tiles."""
import numpy as np
import pytest

from lesion.data.attributes import ita_degrees
from lesion.data.segment import rgb_to_lab

MONK = (["f6ede4", "f3e7db", "f7ead0", "eadaba", "d7bd96", "a07e56", "825c43", "604134", "3a312a", "292420"],
        (83.0, 80.2, 71.7, 64.7, 50.3, 10.9, -20.1, -55.4, -78.3, -84.3))


def test_ita_vectors():
    """ITA of the ten Monk swatches as published with the protocol."""
    for code, expected in zip(*MONK):
        light, _, b = rgb_to_lab(np.frombuffer(bytes.fromhex(code), np.uint8))
        assert ita_degrees(light, b) == pytest.approx(expected, abs=0.05)
