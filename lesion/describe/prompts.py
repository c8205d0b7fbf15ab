"""One vocabulary for what a tile shows, and the sentence that says it.

`VOCABULARY` is the only table of attributes in the project: the labelling app asks for them in this order with these
keys, `to_sentence` writes them as a prompt, `draw_attributes` draws them for generation, the evaluation groups by them.
Tiles are clinical photographs, not dermoscopy, so the words are the clinical ABCD criteria (asymmetry, border, colour,
diameter: Abbasi et al., JAMA 2004;292:2771) with the six colours of the ABCD rule (Stolz et al., 1994), skin tone by
individual typology angle (Chardon et al., 1991; Del Bino & Bernerd, 2013), and surface words only people can judge.
Standard library and numpy only. Proven by tests/describe/test_prompts.py.

A set of attributes is a dict: name -> value name, or a list of value names for the attributes with `many`. A missing
name means "not known"; an empty list means "looked at, and there is none", which the sentence says too.
"""
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

LABELS = ("benign", "malignant")


@dataclass(frozen=True)
class Value:
    """One answer to an attribute's question."""
    name: str    # as stored in `attributes`
    phrase: str  # as the sentence says it
    key: str     # the key that answers it
    help: str    # one line for the person who labels


@dataclass(frozen=True)
class Attribute:
    """One question about a tile, and its answers."""
    name: str
    title: str              # the question's heading
    help: str
    values: tuple[Value, ...]
    many: bool = False      # several values at once, stored as a list in the table's order
    none_phrase: str = ""   # what the sentence says for an empty list


_COLORS = (
    Value("white", "white", "1", "paler than the skin around it: regression, scar, pearly"),
    Value("red", "red", "2", "pink to red: blood, inflammation, no pigment"),
    Value("light brown", "light brown", "3", "tan to light brown"),
    Value("dark brown", "dark brown", "4", "chocolate to dark coffee"),
    Value("blue-grey", "blue-grey", "5", "blue, slate or grey"),
    Value("black", "black", "6", "black or nearly so"),
)

_TABLE = (
    Attribute("skin_tone", "Skin tone", "of the skin around the lesion, by individual typology angle (ITA)", (
        Value("very light", "on very light skin", "1", "ITA over 55 degrees"),
        Value("light", "on light skin", "2", "ITA 41 to 55"),
        Value("intermediate", "on intermediate skin", "3", "ITA 28 to 41"),
        Value("tan", "on tan skin", "4", "ITA 10 to 28"),
        Value("brown", "on brown skin", "5", "ITA -30 to 10"),
        Value("dark", "on dark skin", "6", "ITA under -30"))),
    Attribute("size", "Size", "longest diameter; the tile is 15 mm across", (
        Value("under 3 mm", "under 3 mm across", "1", "a small mole"),
        Value("3 to 4 mm", "3 to 4 mm across", "2", "a quarter of the tile at most"),
        Value("4 to 6 mm", "4 to 6 mm across", "3", "up to the 6 mm of the ABCD rule"),
        Value("6 to 9 mm", "6 to 9 mm across", "4", "over the 6 mm of the ABCD rule"),
        Value("over 9 mm", "over 9 mm across", "5", "more than 60 % of the tile"))),
    Attribute("color", "Main colour", "the colour that covers most of the lesion", _COLORS),
    Attribute("other_colors", "Other colours", "every other colour clearly present: a tenth of the lesion or more",
              _COLORS, many=True, none_phrase="throughout"),
    Attribute("symmetry", "Symmetry", "fold the lesion in thought along both axes: shape and colours", (
        Value("symmetric", "symmetric", "1", "the halves match along at least one axis"),
        Value("asymmetric", "asymmetric", "2", "no axis gives matching halves"))),
    Attribute("shape", "Shape", "of the outline, small notches aside", (
        Value("round", "round shape", "1", "about as long as wide"),
        Value("oval", "oval shape", "2", "an even oval"),
        Value("irregular", "irregular shape", "3", "neither round nor oval"))),
    Attribute("border", "Border", "how even the outline runs", (
        Value("smooth", "smooth border", "1", "an even line"),
        Value("irregular", "irregular border", "2", "ragged, notched or scalloped"))),
    Attribute("edge", "Edge", "how abruptly the lesion ends", (
        Value("sharp", "sharp edge", "1", "ends at a clear line"),
        Value("blurred", "blurred edge", "2", "fades into the skin"))),
    Attribute("surface", "Surface", "what lies on the lesion; left to people, never measured", (
        Value("scale", "scale", "1", "flakes, dry white plates"),
        Value("crust", "crust", "2", "dried blood or serum"),
        Value("ulcer", "ulcer", "3", "an open or eroded place"),
        Value("erythema", "erythema", "4", "redness around the lesion")), many=True,
              none_phrase="with an intact surface"),
)
VOCABULARY: dict[str, Attribute] = {attribute.name: attribute for attribute in _TABLE}
NAMES: dict[str, tuple[str, ...]] = {name: tuple(v.name for v in a.values) for name, a in VOCABULARY.items()}
_PHRASE = {(name, v.name): v.phrase for name, a in VOCABULARY.items() for v in a.values}
_VALUE = {v.phrase: (name, v.name) for name, a in VOCABULARY.items() if not a.many for v in a.values}
_HEAD = "a clinical photograph of a {} skin lesion"


def validate(attributes: dict) -> dict:
    """The same attributes in canonical order (names and lists in the table's order).

    Raises ValueError for an unknown name or value, a value twice, and other colours without or repeating the main one.
    """
    if not isinstance(attributes, dict):
        raise ValueError(f"attributes must be an object of name: value, got {type(attributes).__name__}")
    if unknown := [name for name in attributes if name not in VOCABULARY]:
        raise ValueError(f"no attribute {unknown[0]!r}: allowed are {', '.join(VOCABULARY)}")
    canonical = {name: _check(name, attributes[name]) for name in VOCABULARY if name in attributes}
    if "other_colors" in canonical:
        if "color" not in canonical:
            raise ValueError("attribute 'other_colors' needs a main 'color': give one, or leave 'other_colors' out")
        if canonical["color"] in canonical["other_colors"]:
            raise ValueError(f"'other_colors' repeats the main colour {canonical['color']!r}: take it out of the list")
    return canonical


def _check(name: str, value: object) -> str | list[str]:
    many, allowed = VOCABULARY[name].many, NAMES[name]
    if many and not isinstance(value, list | tuple):
        raise ValueError(f"attribute {name!r} is {value!r}: it must be a list of {', '.join(allowed)} (may be empty)")
    for item in value if many else [value]:
        if not isinstance(item, str) or item not in allowed:
            raise ValueError(f"attribute {name!r} has no value {item!r}: allowed are {', '.join(allowed)}")
    if many and len(set(value)) < len(value):
        raise ValueError(f"attribute {name!r} lists a value twice: {', '.join(value)}")
    return [item for item in allowed if item in value] if many else value


def to_sentence(label: str, attributes: dict | None = None) -> str:
    """The prompt for a label and any known attributes; the longest is 62 CLIP tokens with the two end marks.

    Raises ValueError for a label or attribute outside the vocabulary.
    """
    if label not in LABELS:
        raise ValueError(f"no label {label!r}: allowed are {', '.join(LABELS)}")
    known = validate(attributes or {})
    parts = [_part(known, name) for name in VOCABULARY if name in known and name not in ("skin_tone", "other_colors")]
    head = _HEAD.format(label)
    if "skin_tone" in known:
        head += " " + _PHRASE["skin_tone", known["skin_tone"]]
    return ", ".join([head, *parts])


def _part(known: dict, name: str) -> str:
    if name == "surface":
        chosen = known[name]
        return "with " + _join(chosen) if chosen else VOCABULARY[name].none_phrase
    phrase = _PHRASE[name, known[name]]
    if name == "color" and "other_colors" in known:
        others = known["other_colors"]
        phrase += " with " + _join(others) if others else " " + VOCABULARY["other_colors"].none_phrase
    return phrase


def _join(names: Iterable[str]) -> str:
    return " and ".join(names)  # no commas: they separate the parts of the sentence


def from_sentence(sentence: str) -> tuple[str, dict]:
    """(label, attributes) of a sentence: the exact inverse of `to_sentence`.

    Case, spaces, a final full stop and the order of the parts do not matter; a part not understood raises ValueError.
    """
    text = " ".join(str(sentence).lower().split()).removesuffix(".")
    head, *parts = [part.strip() for part in text.split(",")]
    label, found = _read_head(head)
    for part in parts:
        for name, value in _read_part(part).items():
            if name in found:
                raise ValueError(f"the sentence gives {name!r} twice, the second time as {part!r}: keep one")
            found[name] = value
    return label, validate(found)


def _read_head(head: str) -> tuple[str, dict]:
    for label in LABELS:
        start = _HEAD.format(label)
        if head == start:
            return label, {}
        if head.startswith(start + " ") and _VALUE.get(head[len(start) + 1:], ("",))[0] == "skin_tone":
            return label, {"skin_tone": _VALUE[head[len(start) + 1:]][1]}
    raise ValueError(f"a sentence begins {_HEAD.format('benign|malignant')!r}, then perhaps 'on light skin'; "
                     f"got {head!r}")


def _read_part(part: str) -> dict:
    if part == VOCABULARY["surface"].none_phrase:
        return {"surface": []}
    if part.startswith("with "):
        return {"surface": part.removeprefix("with ").split(" and ")}
    if part in _VALUE and not part.startswith("on "):
        name, value = _VALUE[part]
        return {name: value}
    if part.endswith(" throughout"):
        return {"color": part.removesuffix(" throughout"), "other_colors": []}
    color, separator, others = part.partition(" with ")
    if separator:
        return {"color": color, "other_colors": others.split(" and ")}
    known = [phrase for phrase in _VALUE if not phrase.startswith("on ")]
    raise ValueError(f"{part!r} is not in the vocabulary: a part is one of {', '.join(known)}, or a colour with "
                     "others, or 'with' a surface word")


FIXED_PROMPT: dict[str, str] = {label: to_sentence(label) for label in LABELS}


def draw_attributes(rows: list[dict], count: int, seed: int, balance: str | None = None) -> list[dict]:
    """Draw `count` attribute combinations from the training rows of a manifest (no `split` counts as training).

    Whole combinations are drawn, so that what belongs together stays together: rows are shuffled anew each time all
    have been used, so every row is drawn equally often up to one, and the first n draws do not depend on `count`.
    `balance="skin_tone"` then replaces the tones by the six in turn, shuffled in every round of six, whether or not
    the rows have them: the pictures differ in tone and in nothing else that was asked for.
    Raises ValueError where no training row has attributes, or for another `balance`.
    """
    if balance not in (None, "skin_tone"):
        raise ValueError(f"cannot balance over {balance!r}: allowed is 'skin_tone', or nothing")
    known = [validate(row["attributes"]) for row in rows
             if row.get("attributes") and (row.get("split") or "train") == "train"]
    if not known:
        raise ValueError(f"none of the {len(rows)} rows is a training row with attributes: label some with "
                         "`python -m lesion label`, or use the fixed prompt")
    drawn = [dict(known[i]) for i in _rounds(len(known), count, seed, 0)]
    if balance:
        tones = NAMES["skin_tone"]
        drawn = [validate({**d, "skin_tone": tones[i]}) for d, i in zip(drawn, _rounds(len(tones), count, seed, 1))]
    return drawn


def _rounds(size: int, count: int, seed: int, stream: int) -> np.ndarray:
    """`count` indices below `size`: one keyed shuffle after another."""
    rounds = [np.random.default_rng([seed, stream, i]).permutation(size) for i in range(-(-count // size))]
    return np.concatenate([np.zeros(0, int), *rounds])[:count]
