"""Do drawn tiles show what their prompts asked for? Each asked attribute beside the measure that it should move.

Proven by tests/describe/test_adherence.py.
"""
import numpy as np

from lesion.describe import attributes, prompts
from lesion.stats import fidelity

MEASURES = {  # attribute -> (the measure it should move, its words)
    "skin_tone": (lambda m: -m["ita"], "typology angle, falling"),
    "size": (lambda m: m["diameter_mm"], "longest diameter"),
    "color": (lambda m: sum(place * share for place, share in enumerate(m["colors"].values())), "mean colour, white to black"),
    "other_colors": (lambda m: sum(share >= attributes.OTHER_COLOR_SHARE for share in m["colors"].values()),
                     "number of colours"),
    "symmetry": (lambda m: m["asymmetry"], "asymmetry"),
    "shape": (lambda m: -m["axis_ratio"], "length over width"),
    "border": (lambda m: m["irregularity"], "irregularity of the outline"),
    "edge": (lambda m: m["edge_width_mm"], "width of the edge"),
}


def adherence(name: str, rows: list[dict], measured: list[dict]) -> dict:
    """Spearman correlation of attribute `name` as asked and as measured, with its 95 % interval (fidelity.adherence).

    rows: manifest rows [M] of the tiles, their `attributes` as asked; measured: attributes.measure of each tile [M].
    Tiles that were not asked for it or that show no lesion are left out. {attribute, measure, n, mean, low, high}; the last three
    are None where fewer than 10 tiles are left or one side does not vary.
    """
    measure, words = MEASURES[name]
    pairs = []
    for row, found in zip(rows, measured):
        value = (row.get("attributes") or {}).get(name)
        if value is None or (name != "skin_tone" and found["confidence"].get("mask", 0) < attributes.SEEN) \
                or (name == "shape" and value == "irregular"):
            continue
        order = len(value) if isinstance(value, list) else prompts.NAMES[name].index(value)
        pairs.append((order, measure(found)))
    result = fidelity.adherence(*np.array(pairs, float).reshape(-1, 2).T)
    r, low, high = result or (None, None, None)
    return {"attribute": name, "measure": words, "n": len(pairs), "mean": r, "low": low, "high": high}
