"""Annotators beside each other: Cohen's kappa (1960) for each attribute and pair of people.

Two people who accept the same measured suggestion agree with it, not with each other. Pairs of answers are therefore
counted apart: blind, where neither had a suggestion in view, and suggested, where at least one had.
Proven by tests/web/test_label.py.
"""
from itertools import combinations
from pathlib import Path

import numpy as np

from lesion.describe.prompts import VOCABULARY
from lesion.stats.readers import cohen_kappa
from lesion.web import label_folder

UNSEEN = "given"  # what a journal calls an answer given with no suggestion in view; of others it is not known
SETTLED = ("agreed", "adjudicated")  # not an answer of one person's own


def agreement(folder: Path) -> list[dict]:
    """Cohen's kappa for each attribute and pair of annotators, over the tiles both have answered, blind and suggested apart.

    "Cannot tell" counts as an answer. An attribute with several values counts each value's yes or no as one decision.
    Answers that adjudication settled are left out. Rows: first, second, view (blind or suggested), attribute, tiles,
    agree (share of equal answers), kappa (None where both only gave one answer). ValueError with fewer than two annotators.
    """
    said = {name: label_folder.read_labels(folder, name).tiles for name in label_folder.annotators(folder)}
    said = {name: tiles for name, tiles in said.items() if not any(
        word in SETTLED for tile in tiles.values() for word in tile.was.values())}
    if len(said) < 2:
        raise ValueError(f"{folder} has answers of {len(said)} annotator{'s' * (len(said) != 1)}: agreement needs two, "
                         "each labelling with a name of their own (--annotator)")
    table = []
    for first, second in combinations(said, 2):
        for view in ("blind", "suggested"):
            for attribute in VOCABULARY.values():
                pairs = _pairs(said[first], said[second], attribute.name, view)
                a, b = (np.array([_codes(attribute, pair[n]) for pair in pairs]).ravel() for n in (0, 1))
                table.append({"first": first, "second": second, "view": view, "attribute": attribute.name,
                              "tiles": len(pairs), "agree": float((a == b).mean()) if len(pairs) else None,
                              "kappa": cohen_kappa(a, b) if len(pairs) else None})
    return table


def _pairs(first: dict, second: dict, attribute: str, view: str) -> list[tuple]:
    """Both answers to `attribute` of every tile that both answered under this view."""
    pairs = []
    for name, one in first.items():
        other = second.get(name)
        if other and attribute in one.answers and attribute in other.answers:
            shown = any(tile.was.get(attribute) != UNSEEN for tile in (one, other))
            if shown == (view == "suggested"):
                pairs.append((one.answers[attribute], other.answers[attribute]))
    return pairs


def _codes(attribute, value) -> list[int]:
    """The answer as numbers: one, or a yes/no for each value of a `many` attribute; -1 is "cannot tell"."""
    values = [each.name for each in attribute.values]
    if attribute.many:
        return [-1 if value is None else int(each in value) for each in values]
    return [-1 if value is None else values.index(value)]
