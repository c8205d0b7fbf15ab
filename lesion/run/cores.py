"""How many cores are free: two threads that wait for each other in turns are several times slower where one shares its core.

Measured on two cores beside one busy process (`python -m lesion bench train --beside 1`): docs/RESULTS.md.
Proven by tests/run/test_cores.py.
"""
import os
from pathlib import Path

STAT = Path("/proc/stat")


def sample() -> tuple[float, float, float] | None:
    """(seconds of all cores together, seconds they were busy, seconds this process was) since the start; None where unknown."""
    try:
        ticks = [int(word) for word in STAT.read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]]
        scale = os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, AttributeError):
        return None  # not Linux
    own = os.times()
    return sum(ticks) / scale, (sum(ticks) - ticks[3] - ticks[4]) / scale, own.user + own.system


BEGUN = sample()  # when the program started: by the time it asks, it has imported PyTorch, which takes a second or two


def free(cores: int, begun: tuple | None, now: tuple | None) -> int:
    """Of `cores`, those that other processes left idle between two samples, rounded, at least 1; all where nothing is known."""
    if begun is None or now is None or now[0] <= begun[0]:
        return cores
    total, busy, own = (b - a for a, b in zip(begun, now))
    others = max(0.0, busy - own) * (os.cpu_count() or 1) / total
    return min(cores, max(1, round((os.cpu_count() or 1) - others)))


def use_free(before: int | None = None) -> int:
    """Let PyTorch use the cores that are free now, or `before`: what the run had that goes on, since another number of threads
    adds in another order. Unchanged where OMP_NUM_THREADS says how many. Returns the number."""
    import torch
    if "OMP_NUM_THREADS" not in os.environ:
        known = isinstance(before, int) and 0 < before <= (os.cpu_count() or 1)
        torch.set_num_threads(before if known else free(torch.get_num_threads(), BEGUN, sample()))
    return torch.get_num_threads()
