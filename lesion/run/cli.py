"""What every command line shares: one-line errors with exit code 2, flag types, progress. Standard library (and tqdm) only.

Proven by tests/run/test_cli.py.
"""
import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterable


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, defaults shown in --help; a bad flag ends in one line and exit code 2."""

    def __init__(self, **settings):
        settings.setdefault("allow_abbrev", False)
        settings.setdefault("formatter_class", argparse.ArgumentDefaultsHelpFormatter)
        super().__init__(**settings)

    def error(self, message):
        self.exit(2, f"{self.prog}: {' '.join(message.split())} (see {self.prog} --help)\n")


def run(main: Callable[[], None], prog: str) -> None:
    """Call `main`; what a user can cause (ValueError, a missing or unreadable file) ends in one line and exit code 2,
    ctrl-C in exit code 130. `LESION_DEBUG=1` shows the traceback instead."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `... | head` ends quietly
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show does not stop the work
    try:
        main()
    except (ValueError, OSError) as error:
        if os.environ.get("LESION_DEBUG"):
            raise
        print(f"{prog}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        sys.exit(130)


def number(kind: type, low: float | None = None, high: float | None = None, above: float | None = None) -> Callable:
    """An argparse type: a finite int or float in [low, high], or greater than `above`."""
    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {'a whole number' if kind is int else 'a number'}") from None
        if value != value or abs(value) == float("inf") or (low is not None and value < low) \
                or (high is not None and value > high) or (above is not None and value <= above):
            allowed = f"greater than {above}" if above is not None and high is None else \
                f"greater than {above} and at most {high}" if above is not None else \
                f"from {low} to {high}" if high is not None else f"at least {low}" if low is not None else "a finite number"
            raise argparse.ArgumentTypeError(f"{text} is out of range: allowed is {allowed}")
        return value
    return parse


def resolution(text: str) -> int:
    """An argparse type: a positive multiple of 64 (the U-Net halves the latents, side/8, three times)."""
    value = number(int, low=64, high=2048)(text)
    if value % 64:
        raise argparse.ArgumentTypeError(f"{value} is not a multiple of 64: the U-Net halves side/8 three times; try "
                                         f"{max(64, round(value / 64) * 64)}")
    return value


def progress(items: Iterable | None = None, **settings):
    """A tqdm bar on a terminal; otherwise plain lines, one every ten seconds at most."""
    from tqdm import tqdm
    settings.setdefault("dynamic_ncols", True)
    if not sys.stderr.isatty():
        settings.setdefault("mininterval", 10.0)
        settings.setdefault("maxinterval", 30.0)
        settings.setdefault("ascii", True)
        settings["file"] = _Lines()
    return tqdm(items, **settings)


class _Lines:
    """Turns tqdm's carriage returns into lines, for log files and pipes."""

    def write(self, text: str) -> None:
        text = text.replace("\r", "").strip()
        if text:
            print(text, file=sys.stderr, flush=True)

    def flush(self) -> None:
        sys.stderr.flush()
