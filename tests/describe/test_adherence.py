"""lesion.describe.adherence: what the prompts asked beside what the tiles show."""
import pytest

from lesion.describe.adherence import adherence
from lesion.describe.prompts import NAMES


def test_adherence_pairs_asked_with_measured():
    """Sizes asked and diameters measured in step give 1; tiles without the wish or without a lesion are left out."""
    values = NAMES["size"]
    rows = [{"attributes": {"size": values[i % 5]}} for i in range(30)] + [{"attributes": {}}]
    measured = [{"diameter_mm": 2.0 + i % 5, "confidence": {"mask": 0.9 if i < 25 else 0.0}} for i in range(31)]
    row = adherence("size", rows, measured)
    assert row["n"] == 25
    assert row["mean"] == pytest.approx(1)
    tones = [{"attributes": {"skin_tone": tone}} for tone in NAMES["skin_tone"]] * 3
    light_to_dark = [{"ita": angle, "confidence": {}} for angle in (60, 50, 35, 20, 0, -50)] * 3
    assert adherence("skin_tone", tones, light_to_dark)["mean"] == pytest.approx(1)
    assert adherence("edge", tones, light_to_dark)["mean"] is None
