"""The vocabulary, its sentences and the draws."""
import itertools
import subprocess
import sys

import numpy as np
import pytest

from lesion.describe.prompts import FIXED_PROMPT, LABELS, NAMES, VOCABULARY, draw_attributes, from_sentence, to_sentence, validate


def random_attributes(rng) -> dict:
    """Any subset of the attributes, any values."""
    out = {}
    for name, attribute in VOCABULARY.items():
        if rng.random() < 0.2 or (name == "other_colors" and "color" not in out):
            continue
        allowed = [v for v in NAMES[name] if not (name == "other_colors" and v == out["color"])]
        out[name] = [v for v in allowed if rng.random() < 0.4] if attribute.many else str(rng.choice(allowed))
    return out


def test_golden_sentence():
    """A full sentence reads as English and does not change: prompts in old manifests stay readable."""
    attributes = {"surface": ["crust", "scale"], "color": "dark brown", "other_colors": ["black", "red"],
                  "size": "4 to 6 mm", "skin_tone": "light", "symmetry": "asymmetric", "shape": "oval",
                  "border": "irregular", "edge": "blurred"}
    sentence = to_sentence("malignant", attributes)
    assert sentence == ("a clinical photograph of a malignant skin lesion on light skin, 4 to 6 mm across, dark brown "
                        "with red and black, asymmetric, oval shape, irregular border, blurred edge, with scale and "
                        "crust")
    assert from_sentence(sentence) == ("malignant", validate(attributes))
    assert FIXED_PROMPT["benign"] == "a clinical photograph of a benign skin lesion"


def test_round_trip():
    """attributes -> sentence -> attributes is exact, missing attributes and empty lists included; different attributes
    give different sentences."""
    rng, seen = np.random.default_rng(0), {}
    for _ in range(3000):
        label, attributes = str(rng.choice(LABELS)), random_attributes(rng)
        sentence = to_sentence(label, attributes)
        assert from_sentence(sentence) == (label, attributes)
        assert list(from_sentence(sentence)[1]) == list(attributes)
        assert seen.setdefault(sentence, (label, attributes)) == (label, attributes)
    for name, attribute in VOCABULARY.items():  # every value of every attribute, alone
        for value in NAMES[name]:
            attributes = {name: [value] if attribute.many else value}
            if name == "other_colors":
                attributes["color"] = "red" if value != "red" else "black"
            assert from_sentence(to_sentence("benign", attributes)) == ("benign", attributes)


def test_forgiving_reading():
    """A sentence a person has edited is read whatever its case, spacing, order of parts and full stop."""
    edited = "  A clinical photograph of a benign skin lesion on tan skin ,red throughout,  Oval shape."
    assert from_sentence(edited) == \
        from_sentence("a clinical photograph of a benign skin lesion on tan skin, oval shape, red throughout")


@pytest.mark.parametrize(("sentence", "says"), [
    ("", "begins"), ("a photo of a cat", "begins"),
    ("a clinical photograph of a benign skin lesion on green skin", "green"),
    ("a clinical photograph of a benign skin lesion, square shape", "square shape"),
    ("a clinical photograph of a benign skin lesion, red, black", "twice"),
    ("a clinical photograph of a benign skin lesion, on light skin", "on light skin"),
    ("a clinical photograph of a benign skin lesion, red with red", "repeats"),
    ("a clinical photograph of a benign skin lesion, red with pink", "pink"),
    ("a clinical photograph of a benign skin lesion, with streaks", "streaks"),
    ("a clinical photograph of a benign skin lesion, mauve throughout", "mauve")])
def test_bad_sentences(sentence, says):
    """A sentence outside the grammar is refused in one line that names the part."""
    with pytest.raises(ValueError, match=says) as error:
        from_sentence(sentence)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("attributes", "says"), [
    ([], "object"), ({"tone": "light"}, "tone"), ({"size": "huge"}, "huge"), ({"size": None}, "None"),
    ({"size": ["under 3 mm"]}, "size"), ({"surface": "scale"}, "list"), ({"surface": ["scale", "scale"]}, "twice"),
    ({"other_colors": ["red"]}, "needs"),
    ({"color": "red", "other_colors": ["red"]}, "repeats"), ({"color": "red", "other_colors": [3]}, "3")])
def test_bad_attributes(attributes, says):
    """Attributes outside the vocabulary are refused in one line that says what is wrong."""
    with pytest.raises(ValueError, match=says):
        validate(attributes)


def test_bad_label():
    """Labels are benign and malignant only."""
    with pytest.raises(ValueError, match="melanoma"):
        to_sentence("melanoma", {})


def test_table_is_usable():
    """Keys, names and phrases are unique within an attribute and phrases across all: no answer is ambiguous."""
    phrases = [v.phrase for a in VOCABULARY.values() if not a.many for v in a.values]
    assert len(set(phrases)) == len(phrases)
    for attribute in VOCABULARY.values():
        for field in ("name", "phrase", "key"):
            found = [getattr(v, field) for v in attribute.values]
            assert len(set(found)) == len(found)
        assert all(len(v.key) == 1 and v.help for v in attribute.values)
        assert bool(attribute.none_phrase) == attribute.many
    dermoscopy = {"network", "streaks", "veil", "globules", "dots", "dermoscopic"}
    assert not dermoscopy & set(" ".join(p.phrase for a in VOCABULARY.values() for p in a.values).split())


def test_never_over_77_tokens(shared):
    """The longest sentence fits CLIP's 77 positions. CLIP splits at spaces and punctuation, so a sentence's length is
    the sum of its words' and the longest choice in every slot gives the longest sentence; random ones confirm it."""
    from transformers import CLIPTokenizer
    clip = CLIPTokenizer(str(shared / "clip_tokenizer/vocab.json"), str(shared / "clip_tokenizer/merges.txt"))

    def length(label, attributes):
        return len(clip(to_sentence(label, attributes)).input_ids)

    slots = [n for n in VOCABULARY if not VOCABULARY[n].many and n != "color"]
    longest = {n: max(NAMES[n], key=lambda v, n=n: length("benign", {n: v})) for n in slots}
    longest["surface"] = list(NAMES["surface"])
    most = max(length(label, {**longest, "color": c, "other_colors": [o for o in NAMES["color"] if o != c]})
               for label, c in itertools.product(LABELS, NAMES["color"]))
    rng = np.random.default_rng(1)
    assert all(length("malignant", random_attributes(rng)) <= most for _ in range(300))
    assert most == 62  # the docstring's figure
    assert most <= 77


def test_draws_follow_the_rows():
    """Draws are whole training combinations, equally often up to one; the same seed gives the same draws, a longer list
    begins with the shorter, and rows of other splits or without attributes are never drawn."""
    rows = [{"attributes": {"size": size, "color": "red"}, "split": "train"} for size in NAMES["size"]]
    rows += [{"attributes": {"size": "over 9 mm", "color": "white"}, "split": "test"}, {"split": "train"},
             {"attributes": {}}]
    drawn = draw_attributes(rows, 12, seed=3)
    assert sorted(drawn.count(row["attributes"]) for row in rows[:5]) == [2, 2, 2, 3, 3]
    assert drawn == draw_attributes(rows, 20, seed=3)[:12]
    assert drawn != draw_attributes(rows, 12, seed=4)
    assert draw_attributes(rows, 0, seed=3) == []


def test_balanced_draws():
    """Balanced over skin tones: every tone equally often, in the rows or not; the lesion's words stay the rows'."""
    rows = [{"attributes": {"skin_tone": "light", "size": size}} for size in NAMES["size"]]
    drawn = draw_attributes(rows, 60, seed=0, balance="skin_tone")
    assert [sum(d["skin_tone"] == tone for d in drawn) for tone in NAMES["skin_tone"]] == [10] * 6
    assert [d["size"] for d in drawn] == [d["size"] for d in draw_attributes(rows, 60, seed=0)]
    assert rows[0]["attributes"]["skin_tone"] == "light"


def test_bad_draws():
    """No labelled training row, or an unknown balance, is a one-line error."""
    with pytest.raises(ValueError, match="label some"):
        draw_attributes([{"split": "train"}], 3, 0)
    with pytest.raises(ValueError, match="age"):
        draw_attributes([{"attributes": {"color": "red"}}], 3, 0, balance="age")


def test_imports_are_light():
    """The command modules import this at their top, so it must not pull in anything heavy."""
    code = "import sys, lesion.describe.prompts; print([m for m in ('torch', 'skimage', 'scipy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8").stdout.strip() == "[]"
