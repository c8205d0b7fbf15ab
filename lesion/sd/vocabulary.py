"""The tokenizer's files: whole, and of the text encoder's own vocabulary. Read before the first prompt is: a wrong id
is no error later.

CLIP's byte-pair vocabulary (arXiv:1508.07909): 256 bytes, the same at a word's end, one token a merge, begin and end of
text. Proven by tests/sd/test_vocabulary.py.
"""
from pathlib import Path

from lesion.sd import plain

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
BYTES = 512  # 256, in the middle of a word and at its end


def tokenizer_files(folder: Path) -> list[str]:
    """What the folder keeps its vocabulary in: tokenizer.json, or vocab.json and merges.txt, or all three. ValueError
    if neither."""
    missing = [name for name in ("vocab.json", "merges.txt") if not (folder / name).is_file()]
    found = ["tokenizer.json"] if (folder / "tokenizer.json").is_file() else []
    if missing and not found:
        raise ValueError(f"tokenizer folder {folder} has no {' and no '.join(missing)}; give --tokenizer DIR")
    return found if missing else [*found, "vocab.json", "merges.txt"]


def check_vocabulary(folder: Path, rows: int) -> None:
    """The tokenizer's files are whole, and its tokens are the `rows` of the text encoder's embedding, one each.

    A token beyond the embedding has no row, and with fewer tokens than rows every word would be drawn from another
    word's row. ValueError, one line: damaged or empty files, merges that do not make the vocabulary, other numbers of
    tokens than rows.
    """
    folder = Path(folder)
    found = tokenizer_files(folder)
    whole = _json(folder / "tokenizer.json") if "tokenizer.json" in found else {}
    both = []
    if "tokenizer.json" in found:
        model = whole.get("model")
        if not isinstance(model, dict) or not isinstance(model.get("merges"), list):
            raise ValueError(f"{folder / 'tokenizer.json'} holds no byte-pair model; give --tokenizer DIR")
        both.append(_whole_vocabulary(folder / "tokenizer.json", model.get("vocab"), model["merges"]))
    if "vocab.json" in found:
        try:
            lines = (folder / "merges.txt").read_text(encoding="utf8").split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{folder / 'merges.txt'} is not UTF-8 ({error}); give --tokenizer DIR") from None
        merges = [line for line in lines if line.strip() and not line.startswith("#version")]
        both.append(_whole_vocabulary(folder / "vocab.json", _json(folder / "vocab.json"), merges))
    if both[0] != both[-1]:
        raise ValueError(
            f"tokenizer folder {folder}: tokenizer.json and vocab.json hold different vocabularies; give --tokenizer "
            "DIR"
        )
    config = _json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    if type(config.get("model_max_length", 77)) not in (int, float):
        raise ValueError(f"tokenizer folder {folder}: model_max_length {config['model_max_length']!r} is no number; give --tokenizer DIR")
    pad = config.get("pad_token", END)
    pad = pad.get("content") if isinstance(pad, dict) else pad
    if pad not in (END, None):
        raise ValueError(
            f"tokenizer folder {folder} pads with {pad!r} and Stable Diffusion 1.x with {END!r}; give --tokenizer DIR"
        )
    new = _added_tokens(folder, whole.get("added_tokens"), config) - both[0].keys()
    size = len(both[0]) + len(new)
    if size != rows:
        words = f", {len(new)} of them added to CLIP's" if new else ""
        raise ValueError(
            f"tokenizer folder {folder} has {size} tokens{words}, and the text encoder's embedding {rows} rows: they "
            "do not "
            "belong together; give the --tokenizer DIR that this text encoder was trained with"
        )


def _added_tokens(folder: Path, entries: object, config: dict) -> set[str]:
    """Tokens that were added to the vocabulary (textual inversion, special ones), in each of the places where
    transformers keeps them."""
    special = folder / "special_tokens_map.json"
    named = {**config, **(_json(special) if special.is_file() else {})}
    added = [*_tokens(entries or [])]
    for name, value in named.items():
        if name.endswith(("_token", "_tokens", "_tokens_decoder")) or isinstance(value, dict) and "content" in value:
            added += [] if value is None or isinstance(value, bool) else _tokens(value)
    if (folder / "added_tokens.json").is_file():
        added += list(_json(folder / "added_tokens.json"))
    if not all(isinstance(token, str) for token in added):
        raise ValueError(f"tokenizer folder {folder}: an added token is not a text; give --tokenizer DIR")
    return set(added)


def _tokens(value: object) -> list:
    """The tokens of an entry as transformers writes it: a text, an object with `content`, or several of them."""
    if isinstance(value, dict):
        value = [value["content"]] if "content" in value else list(value.values())
    return [token for one in value for token in _tokens(one)] if isinstance(value, list) else [value]


def _whole_vocabulary(file: Path, ids: object, merges: list) -> dict[str, int]:
    """`ids` {token: id}, once it is one to one with 0..n-1 and every token but the 512 bytes' and the two ends is made
    by a merge.

    That their numbers agree, and that merges from first to last make tokens, is enough: the whole comparison would slow
    every start.
    """
    numbers = set(map(id_of, ids.values())) if isinstance(ids, dict) else {}
    if not numbers or len(numbers) != len(ids) or min(numbers) != 0 or max(numbers) != len(ids) - 1:
        raise ValueError(
            f"{file} is damaged: expected tokens with the ids 0, 1, 2 ..., each once; give --tokenizer DIR"
        )
    pairs = [
        pair.split() if isinstance(pair, str) else pair for pair in merges[:: max(1, len(merges) // 200)] + merges[-1:]
    ]
    made = [
        isinstance(pair, list)
        and len(pair) == 2
        and all(isinstance(part, str) for part in pair)
        and "".join(pair) in ids
        for pair in pairs
    ]
    if len(merges) != len(ids) - BYTES - 2 or not all(made) or not {BEGIN, END} <= ids.keys():
        raise ValueError(
            f"{file}: its {len(ids)} tokens and the {len(merges)} merges do not belong together, or one of them is "
            "cut short or "
            f"empty (CLIP's has a token for {BYTES} bytes, for each merge, and for begin and end of text); give "
            "--tokenizer DIR"
        )
    return ids


def id_of(value: object) -> int:
    """A token's id; -1 for what is none."""
    return value if type(value) is int else -1


def _json(file: Path) -> dict:
    try:
        value = plain.of_json(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {one_line(error)}; give --tokenizer DIR") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(value).__name__}; give --tokenizer DIR")
    return value


def one_line(error: Exception) -> str:
    """The error's text, or its type's name, on one line of at most 200 characters."""
    return (" ".join(str(error).split()) or type(error).__name__)[:200]
