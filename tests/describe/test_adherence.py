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


COLOURS = dict.fromkeys(NAMES["color"], 0.0)
MOVES = {  # attribute -> the measure of a tile that shows its n-th value
    "size": lambda n: {"diameter_mm": 1.0 + n}, "symmetry": lambda n: {"asymmetry": 0.1 * n},
    "shape": lambda n: {"axis_ratio": 0.9 - 0.3 * n},
    "border": lambda n: {"irregularity": 0.1 * n, "edge_width_mm": -n}, "edge": lambda n: {"edge_width_mm": 0.5 + n},
    "color": lambda n: {"colors": COLOURS | {NAMES["color"][n]: 1.0}},
    "other_colors": lambda n: {"colors": COLOURS | dict.fromkeys(NAMES["color"][:n + 1], 0.15)}}


@pytest.mark.parametrize("name", MOVES)
def test_every_attribute_moves_its_measure_the_right_way(name):
    """Tiles that show what was asked for, value by value: correlation 1. A shape asked to be irregular is no length over width."""
    values = [list(NAMES["color"][1:n + 1]) for n in range(4)] if name == "other_colors" else \
        [value for value in NAMES[name] if (name, value) != ("shape", "irregular")]
    rows = [{"attributes": {name: value}} for value in values] * 12
    measured = [MOVES[name](n) | {"confidence": {"mask": 0.9}} for n in range(len(values))] * 12
    if name == "shape":
        rows.append({"attributes": {"shape": "irregular"}})
        measured.append({"axis_ratio": 0.99, "confidence": {"mask": 0.9}})
    row = adherence(name, rows, measured)
    assert row["n"] == 12 * len(values)
    assert row["mean"] == pytest.approx(1)


def test_mean_colour_is_over_the_whole_lesion():
    """Half white, half black lies in the middle, not at black."""
    from lesion.describe.adherence import MEASURES
    assert MEASURES["color"][0]({"colors": COLOURS | {"white": 0.5, "black": 0.5}}) == 2.5
