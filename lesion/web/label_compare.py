"""Annotators beside each other: Cohen's kappa (1960) for each attribute and pair of people.

Proven by tests/web/test_label.py.
"""
from itertools import combinations
from pathlib import Path

import numpy as np

from lesion.describe.prompts import VOCABULARY
from lesion.stats.readers import cohen_kappa
from lesion.web import label_folder


def agreement(folder: Path) -> list[dict]:
    """Cohen's kappa for each attribute and pair of annotators, over the tiles both have answered.

    "Cannot tell" counts as an answer. An attribute with several values counts each value's yes or no as one decision.
    Rows: first, second, attribute, tiles, agree (share of equal answers), kappa (None where both only gave one answer).
    ValueError with fewer than two annotators.
    """
    names = label_folder.annotators(folder)
    if len(names) < 2:
        raise ValueError(f"{folder} has answers of {len(names)} annotator{'s' * (len(names) != 1)}: agreement needs two, "
                         "each labelling with a name of their own (--annotator)")
    said = {name: label_folder.read_labels(folder, name).tiles for name in names}
    table = []
    for first, second in combinations(names, 2):
        for attribute in VOCABULARY.values():
            pairs = [(tile.answers[attribute.name], said[second][key].answers[attribute.name])
                     for key, tile in said[first].items() if attribute.name in tile.answers and key in said[second]
                     and attribute.name in said[second][key].answers]
            a, b = (np.array([_codes(attribute, pair[n]) for pair in pairs]).ravel() for n in (0, 1))
            table.append({"first": first, "second": second, "attribute": attribute.name, "tiles": len(pairs),
                          "agree": float((a == b).mean()) if len(pairs) else None,
                          "kappa": cohen_kappa(a, b) if len(pairs) else None})
    return table


def _codes(attribute, value) -> list[int]:
    """The answer as numbers: one, or a yes/no for each value of a `many` attribute; -1 is "cannot tell"."""
    values = [each.name for each in attribute.values]
    if attribute.many:
        return [-1 if value is None else int(each in value) for each in values]
    return [-1 if value is None else values.index(value)]
