"""YAML that others wrote: read as plain data, within bounds. No aliases (nine lines of them make 10^9
entries), no nesting without end, no long file; whatever PyYAML's constructors raise is a ValueError.

Proven by tests/run/test_cli.py, tests/sd/test_configs.py and tests/fuzz.
"""
from pathlib import Path

import yaml

from lesion.run import files

LARGEST_FILE = 1 << 17  # bytes of YAML; JSON is quick and may have more
DEEPEST = 32


class _Loader(yaml.SafeLoader):
    depth = 0

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise ValueError("it uses YAML aliases, which are not needed here")
        self.depth += 1
        if self.depth > DEEPEST:
            raise ValueError("nested too deeply")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def read(path: Path) -> object:
    """The value of a YAML or JSON file. ValueError, naming the file: neither, too long, too deep, with aliases."""
    data = Path(path).read_bytes()
    try:
        return files.parse_json(data)
    except ValueError:
        pass
    if len(data) > LARGEST_FILE:
        raise ValueError(f"{path} has {len(data):,} bytes and is not JSON: YAML is read up to {LARGEST_FILE:,} bytes")
    try:
        return yaml.load(data.decode("utf-8-sig"), _Loader)  # a SafeLoader
    except Exception as error:  # KeyError, AttributeError, IndexError, OverflowError ...
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split()) or type(error).__name__}") from None
