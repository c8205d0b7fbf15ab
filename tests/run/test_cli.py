"""Command lines: what flags allow, one line and exit code 2 for a user's errors, 130 for ctrl-C, quiet progress."""

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lesion.run import cli

ENV = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])}
ENV.pop("LESION_DEBUG", None)


def child(code, *arguments, **more):
    """Run a few lines of Python beside the package."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], env={**ENV, **more}, capture_output=True, text=True, timeout=60, encoding="utf-8"
    )


# --- flag types ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "text", "value"),
    [
        ((int, 1), "1", 1),
        ((int, 0, 5), "5", 5),
        ((float, 0), "0", 0.0),
        ((float, None, None, 0), "1e-30", 1e-30),
        ((float, None, 1, 0), "1", 1.0),
        ((float, 0, 1), "0.25", 0.25),
    ],
)
def test_numbers_allowed(limits, text, value):
    """Both ends of a closed range are allowed, and the type is the asked one."""
    result = cli.number(*limits)(text)
    assert result == value
    assert type(result) is limits[0]


@pytest.mark.parametrize(
    ("limits", "text", "says"),
    [
        ((int, 1), "0", "0 is out of range: allowed is at least 1"),
        ((int, 1), "1.5", "'1.5' is not a whole number"),
        ((int, 0, 5), "6", "allowed is from 0 to 5"),
        ((float, None, None, 0), "0", "allowed is greater than 0"),
        ((float, None, 1, 0), "1.01", "allowed is greater than 0 and at most 1"),
        ((float, 0), "nan", "allowed is at least 0"),
        ((float, 0), "inf", "allowed is at least 0"),
        ((float,), "-inf", "allowed is a finite number"),
        ((float, 0), "ten", "'ten' is not a number"),
        ((int, 0), "", "'' is not a whole number"),
    ],
)
def test_numbers_refused(limits, text, says):
    """What is not a number, not finite or out of range is refused with what is allowed."""
    with pytest.raises(argparse.ArgumentTypeError, match=says):
        cli.number(*limits)(text)


def test_resolution():
    """Sides are positive multiples of 64; the refusal proposes the nearest."""
    assert [cli.resolution(text) for text in ("64", "128", "512", "2048")] == [64, 128, 512, 2048]
    for text, says in (
        ("100", "try 128"),
        ("97", "try 128"),
        ("95", "try 64"),
        ("0", "from 64 to 2048"),
        ("-64", "from 64"),
        ("4096", "to 2048"),
        ("128.0", "whole number"),
    ):
        with pytest.raises(argparse.ArgumentTypeError, match=says):
            cli.resolution(text)


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [["--steps", "none"], ["--ste", "3"], ["--steps", "3", "two\nlines"], ["--steps"]])
def test_a_bad_flag_ends_in_one_line(flags, capsys):
    """Exit code 2 and one line on stderr that names the program; abbreviated flags are not guessed."""
    parser = cli.Parser(prog="draw.py")
    parser.add_argument("--steps", type=cli.number(int, low=1), default=7, help="sampling steps")
    with pytest.raises(SystemExit) as error:
        parser.parse_args(flags)
    out, err = capsys.readouterr()
    assert error.value.code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("draw.py: ")
    assert err.endswith("(see draw.py --help)\n")


def test_help_shows_defaults(capsys):
    """--help prints a flag's default beside its help."""
    parser = cli.Parser(prog="draw.py")
    parser.add_argument("--steps", type=int, default=7, help="sampling steps")
    with pytest.raises(SystemExit) as error:
        parser.parse_args(["--help"])
    assert error.value.code == 0
    assert "sampling steps (default: 7)" in capsys.readouterr().out


RUN = """
import sys
from lesion.run import cli
def main():
    print("before", flush=True)
    raise eval(sys.argv[1])
cli.run(main, "draw.py")
"""


@pytest.mark.parametrize(
    ("raised", "says"),
    [
        ("ValueError('two\\n   lines')", "draw.py: two lines"),
        (
            "FileNotFoundError(2, 'No such file or directory', 'a.txt')",
            "draw.py: [Errno 2] No such file or directory: 'a.txt'",
        ),
        (
            "__import__('json').JSONDecodeError('Expecting value', 'x', 0)",
            "draw.py: Expecting value: line 1 column 1 (char 0)",
        ),
    ],
)
def test_a_user_error_ends_in_one_line(raised, says):
    """A ValueError or an unreadable file: exit code 2, the message on one line of stderr, no traceback."""
    done = child(RUN, raised)
    assert (done.returncode, done.stdout, done.stderr) == (2, "before\n", says + "\n")


def test_a_bug_keeps_its_traceback():
    """What no user can cause is not dressed up; LESION_DEBUG=1 shows the traceback of the rest too."""
    done = child(RUN, "ZeroDivisionError('ours')")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "Traceback" in child(RUN, "ValueError('theirs')", LESION_DEBUG="1").stderr


def test_control_c():
    """SIGINT ends in exit code 130 and one line."""
    code = (
        "import time\nfrom lesion.run import cli\n"
        "def main():\n    print('up', flush=True)\n    time.sleep(60)\n"
        "cli.run(main, 'draw.py')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler), encoding="utf-8"
    )
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "draw.py: interrupted\n"


def test_a_closed_pipe_is_not_an_error():
    """`... | head` ends without a traceback."""
    code = "from lesion.run import cli\ndef main():\n    while True:\n        print('line')\ncli.run(main, 'draw.py')"
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8"
    )
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == -signal.SIGPIPE


# --- progress --------------------------------------------------------------------------------------------------------


def test_progress_in_a_log_file_is_plain_lines(capfd, monkeypatch):
    """Without a terminal: whole lines, no carriage returns, the first and the last state and no flood between them,
    however often the loop sets a postfix."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    bar = cli.progress(range(2000), desc="draw", unit="tile")
    for number in bar:
        if number % 10 == 0:
            bar.set_postfix_str(f"loss {number}", refresh=False)
    err = capfd.readouterr().err
    assert "\r" not in err
    lines = err.splitlines()
    assert 1 <= len(lines) <= 3
    assert all(line.startswith("draw: ") for line in lines)
    assert "2000/2000" in lines[-1]
    assert "loss 1990" in lines[-1]


def test_progress_can_be_switched_off(capfd):
    """disable=True (the other processes of a distributed run) prints nothing and still passes the items."""
    assert list(cli.progress(range(5), disable=True)) == [0, 1, 2, 3, 4]
    assert capfd.readouterr().err == ""


# --- python -m lesion ------------------------------------------------------------------------------------------------


def test_a_terminal_is_not_steered(capsys):
    """What a file's own names and texts say is printed with its control codes escaped; line breaks, tabs and any script are not."""
    def main():
        print("a tile called \x1b]0;owned\x07\x9b2J\u202egnp.exe\r\tπ é 画\nnext")
    cli.run(main, "prog")
    assert capsys.readouterr().out == "a tile called \\x1b]0;owned\\x07\\x9b2J\\u202egnp.exe\\r\tπ é 画\nnext\n"


def test_the_dispatcher(run_script):
    """No argument lists the commands; an unknown one is refused in one line that lists them; --version answers."""
    listed = run_script("-m lesion")
    assert listed.returncode == 0
    assert all(name in listed.stdout for name in ("prepare", "label", "study", "pretrain", "bench"))
    unknown = run_script("-m lesion", "prepair")
    assert unknown.returncode == 2
    assert unknown.stderr.count("\n") == 1
    assert "'prepair'" in unknown.stderr
    assert "prepare" in unknown.stderr
    assert run_script("-m lesion", "--version").stdout.strip()[0].isdigit()


# --- --recipe --------------------------------------------------------------------------------------------------------


def recipe_parser():
    parser = cli.Parser(prog="x.py")
    parser.add_argument("--steps", type=cli.number(int, low=1), default=7)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--names", nargs="+", default=[])
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--base", default=None)
    parser.add_argument("--recipe")
    return parser


@pytest.mark.parametrize(("name", "text"), [
    ("args.json", '{"steps": 5, "batch_size": 3, "names": ["a", "b"], "fast": true, "base": null, "base_sha256": "ff", "provenance": {}}'),
    ("r.yaml", "steps: 5\nbatch-size: 3\nnames: [a, b]\nfast: true\n")])
def test_a_recipe_gives_flags_and_the_line_wins(tmp_path, name, text):
    """JSON and YAML alike; null and what args.json records beside the flags are passed over; a flag on the line overrides."""
    (tmp_path / name).write_text(text, encoding="utf-8")
    parser = recipe_parser()
    args = parser.parse_args(cli.with_recipe(parser, ["--steps", "2", "--recipe", str(tmp_path / name)]))
    assert (args.steps, args.batch_size, args.names, args.fast, args.base) == (2, 3, ["a", "b"], True, None)
    assert cli.with_recipe(parser, ["--steps", "2"]) == ["--steps", "2"]


@pytest.mark.parametrize(("text", "says"), [("[1, 2]", "holds no flags"), ("{", "cannot be read"), ("speed: 3", "unrecognized"),
                                            ("steps: 0", "allowed is at least 1"), ("steps: many", "not a whole number")])
def test_a_bad_recipe_ends_in_one_line(tmp_path, capsys, text, says):
    """No flags in it, not YAML, a name that is no flag, a value the flag would not take: exit code 2, one line."""
    (tmp_path / "r.yaml").write_text(text, encoding="utf-8")
    parser = recipe_parser()
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args(cli.with_recipe(parser, ["--recipe", str(tmp_path / "r.yaml")]))
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1


# --- signals and full disks --------------------------------------------------------------------------------------------

SLEEPS = """
import sys, time
from lesion.run import cli
def main():
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        print("tidied", flush=True)
cli.run(main, "draw.py")
"""


@pytest.mark.parametrize(("number", "code", "word"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")])
def test_a_signal_ends_in_one_line(number, code, word):
    """SIGTERM is exit code 143, ctrl-C 130; either way what tidies up does so, and one line says what happened."""
    process = subprocess.Popen([sys.executable, "-c", SLEEPS], env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (code, "tidied\n", f"draw.py: {word}\n")


def test_a_full_disk_is_one_line(capsys):
    """ENOSPC says which file, and that what was finished is whole."""
    def main():
        raise OSError(28, "No space left on device", "run/x.tmp")
    with pytest.raises(SystemExit) as error:
        cli.run(main, "draw.py")
    assert error.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "the disk is full (run/x.tmp)" in err


def test_handlers_are_given_back():
    """After a command, also one that failed, a notebook's ctrl-C is the notebook's again."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)]

    def main():
        assert signal.getsignal(signal.SIGTERM) is not before[1]
        with cli.stop_request():
            assert signal.getsignal(signal.SIGINT) is not before[0]
        raise ValueError("no")
    with pytest.raises(SystemExit):
        cli.run(main, "draw.py")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)] == before


def test_a_thread_takes_no_signals():
    """In a thread, where Python forbids handlers, a command runs without any."""
    import threading
    done = []

    def main():
        with cli.stop_request() as stop:
            done.append(stop.number)
    thread = threading.Thread(target=cli.run, args=(main, "draw.py"))
    thread.start()
    thread.join()
    assert done == [0]


def test_a_request_to_stop():
    """Before the loop a signal interrupts at once; in it the first is noted, the second interrupts at once; SIGTERM is told apart."""
    with pytest.raises(KeyboardInterrupt), cli.stop_request():
        signal.raise_signal(signal.SIGINT)
    with cli.stop_request() as stop:
        stop.patient = True
        signal.raise_signal(signal.SIGINT)
        assert stop.number == signal.SIGINT
        with pytest.raises(cli.Terminated):
            signal.raise_signal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt) as error:
        cli.Stop.interrupt(signal.SIGINT)
    assert not isinstance(error.value, cli.Terminated)
