"""JSON and YAML that came with a checkpoint: plain data within bounds, or a ValueError. As
lesion/run/files.py and plain_yaml.py have it for the rest: this room imports nothing of ours.

Proven by tests/sd/test_configs.py and tests/fuzz.
"""
import json
import re
from pathlib import Path

import yaml

DEEPEST = 32  # lists and objects within each other
LONGEST_NUMBER = 300  # digits: a float has 308
HALF = re.compile(r"\\u[dD][89a-fA-F]")  # half a surrogate pair, as JSON escapes it
LARGEST_YAML = 1 << 16  # bytes; v1-inference.yaml has 2,000


def of_json(data: bytes | str) -> object:
    """The value of a JSON text. ValueError: not JSON, nested too deeply, half a character, a number no float holds."""
    text = data if isinstance(data, str) else data.decode(json.detect_encoding(data))
    try:
        value = json.loads(text, parse_int=_whole)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if text.count("[") + text.count("{") > DEEPEST and _is_deep(value, DEEPEST):
        raise ValueError("nested too deeply")
    if HALF.search(text):
        json.dumps(value, ensure_ascii=False).encode()  # UnicodeEncodeError is a ValueError
    return value


def _whole(text: str) -> int:
    if len(text) > LONGEST_NUMBER:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _is_deep(value: object, left: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return left < 0 or any(_is_deep(item, left - 1) for item in inner)


class _Loader(yaml.SafeLoader):
    depth = 0

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise ValueError("it uses YAML aliases, which no checkpoint's description needs")
        self.depth += 1
        if self.depth > DEEPEST:
            raise ValueError("nested too deeply")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def of_yaml(file: Path) -> object:
    """The value of a YAML file without aliases. ValueError, whatever PyYAML's constructors raise."""
    if file.stat().st_size > LARGEST_YAML:
        raise ValueError(f"it has {file.stat().st_size:,} bytes: at most {LARGEST_YAML:,} are read")
    try:
        return yaml.load(file.read_bytes().decode(), _Loader)  # a SafeLoader
    except Exception as error:  # KeyError, AttributeError, IndexError, OverflowError ... of what is tagged wrongly
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None
