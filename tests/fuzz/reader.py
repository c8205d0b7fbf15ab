"""A reader under test, and what its files of readers share."""

from collections.abc import Callable
from dataclasses import dataclass

import layouts
from fuzz import hostile

ORIGIN = {"Origin": "http://localhost"}
TILE = layouts.jpeg(1, 20)


@dataclass(frozen=True)
class Reader:
    """`cases(kept)` and `read(kept, place, case)`; `kept` is what `start(place)` gave. apart: in a process of its own, since the
    library beneath is C and may not come back."""

    name: str
    cases: Callable
    read: Callable
    start: Callable = lambda place: place
    apart: bool = False


def each(*calls) -> None:
    """All calls, also where one refuses; then the first refusal."""
    refusals = []
    for call in calls:
        try:
            call()
        except (ValueError, OSError) as error:
            refusals.append(error)
    if refusals:
        raise refusals[0]


def only(name, strategy):
    """Cases of one file."""
    return strategy.map(lambda data: {name: data})


def must(call):
    """A call that must not refuse any more."""
    try:
        return call()
    except (ValueError, OSError) as error:
        raise AssertionError(f"taken, and then {error!r}") from error


def as_file(name, value):
    return {name: hostile.dumps(value).encode()}
