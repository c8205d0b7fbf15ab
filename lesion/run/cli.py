"""What every command line shares: one-line errors with exit code 2, flag types, progress. Standard library (and tqdm) only.

Proven by tests/run/test_cli.py.
"""
import argparse
import contextlib
import errno
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator

LONGEST = 2000  # signs of an error
ACTED_ON = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")  # by a terminal: all control codes but tab and newline


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, defaults shown in --help; a bad flag ends in one line and exit code 2."""

    def __init__(self, **settings):
        settings.setdefault("allow_abbrev", False)
        settings.setdefault("formatter_class", argparse.ArgumentDefaultsHelpFormatter)
        super().__init__(**settings)

    def error(self, message):
        self.exit(2, f"{self.prog}: {one_line(message)} (see {self.prog} --help)\n")


def one_line(error: object) -> str:
    """What an error says, on one line of at most LONGEST signs. A file's own words may stand in it: what a terminal
    would act upon is escaped."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = text if len(text) <= LONGEST else text[:LONGEST] + " ..."
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


class Printable:
    """A text stream to a terminal: names and texts of other people's files may stand in what is written, and signs that a terminal
    would act upon (control codes, switches of the writing direction) are escaped. Everything else is the stream's own."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text: str) -> int:
        return self.stream.write(ACTED_ON.sub(lambda sign: sign[0].encode("unicode_escape").decode(), text))

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


class Terminated(KeyboardInterrupt):
    """SIGTERM, as an exception: whatever tidies up after ctrl-C does so after it too."""


def run(main: Callable[[], None], prog: str) -> None:
    """Call `main`; what a user can cause (ValueError, a missing or unreadable file, a full disk) ends in one line and exit code
    2, ctrl-C in exit code 130, SIGTERM in 143. `LESION_DEBUG=1` shows the traceback instead."""
    code = 0
    own_stdout, sys.stdout = sys.stdout, sys.stdout and Printable(sys.stdout)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show does not stop the work
    with _handlers({"SIGTERM": _terminate, "SIGPIPE": signal.SIG_DFL}):  # `... | head` ends quietly
        try:
            main()
        except (ValueError, OSError) as error:
            if os.environ.get("LESION_DEBUG"):
                raise
            code, text = 2, one_line(error)
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                text = f"the disk is full ({error.filename or text}); what was finished before is whole: make room, and go on"
        except Terminated:
            code, text = 143, "terminated"
        except KeyboardInterrupt:
            code, text = 130, "interrupted"
        finally:
            sys.stdout = own_stdout
    if code:
        print(f"{prog}: {text}", file=sys.stderr)
        sys.exit(code)


def _terminate(*_) -> None:
    raise Terminated


def _as_born() -> None:
    """A forked worker dies of SIGTERM as ever: it is its parent who has a line to say."""
    if signal.getsignal(signal.SIGTERM) is _terminate:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_as_born)


@contextlib.contextmanager
def _handlers(wanted: dict[str, object]) -> Iterator[None]:
    """Signal handlers by name, given back at the end. Only the main thread may set any, and gets the signals; a thread of a
    notebook leaves them alone. A signal that the system lacks is left out."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    known = {getattr(signal, name): handler for name, handler in wanted.items() if hasattr(signal, name)}
    before = {number: signal.signal(number, handler) for number, handler in known.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


class Stop:
    """Ctrl-C and SIGTERM as a request: once the loop has set `patient`, the first is only noted in `number` (0: none), so that
    a step ends and is saved. One before that, and every second one, is noted and interrupts at once."""

    def __init__(self):
        self.number, self.patient = 0, False

    def take(self, number: int, *_) -> None:
        at_once, self.number = self.number or not self.patient, int(number)
        if at_once:
            self.interrupt(number)

    @staticmethod
    def interrupt(number: int) -> None:
        """Raise what `number` means: Terminated for SIGTERM, else KeyboardInterrupt."""
        raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


@contextlib.contextmanager
def stop_request() -> Iterator[Stop]:
    """A `Stop` that takes SIGINT and SIGTERM within the block; from a thread it takes none."""
    stop = Stop()
    with _handlers({"SIGINT": stop.take, "SIGTERM": stop.take}):
        yield stop


RECORDED = ("provenance", "base_sha256", "base_settings_sha256", "weights_sha256", "data_sha256", "color_norm", "tiles", "tag_frequency",
            "init_lora_sha256", "threads")  # in args.json, no flags


def with_recipe(parser: argparse.ArgumentParser, argv: list[str] | None) -> list[str]:
    """`argv` behind the flags of its --recipe FILE (JSON or YAML: names and values; a run's args.json will do): what stands
    on the line wins. Names take - or _; what args.json records beside the flags is passed over, and so is null."""
    argv = sys.argv[1:] if argv is None else list(argv)
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--recipe")
    path = early.parse_known_args(argv)[0].recipe
    if path is None:
        return argv
    from lesion.run import plain_yaml
    try:
        found = plain_yaml.read(path)
    except (OSError, ValueError) as error:
        parser.error(f"--recipe {path} cannot be read ({error})")
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        parser.error(f"--recipe {path} holds no flags: expected names and values, as in a run's args.json")
    given = []
    for name, value in found.items():
        if name not in RECORDED and value is not None and value is not False:
            values = [] if value is True else value if isinstance(value, list) else [value]
            given += [f"--{name.replace('_', '-')}", *map(str, values)]
    return given + argv


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
