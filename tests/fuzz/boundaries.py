"""Every place where the package reads what others wrote: `READERS`, and what was once wrong in one: `EXAMPLES`.

A reader has `start` (a folder, or the servers, made once a test), `cases` (a strategy of {file: bytes}, or of requests) and
`read`. tests/fuzz/test_fuzz.py says what must hold. A new reader is one more line in the file of its kind.
"""

from fuzz import people, runs, tiles, weights

PARTS = (tiles, weights, runs, people)
READERS = [reader for part in PARTS for reader in part.READERS]
EXAMPLES = {name: cases for part in PARTS for name, cases in part.EXAMPLES.items()}
