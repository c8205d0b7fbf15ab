"""`python -m lesion tour`: the whole idea on the demo set and the built-in base, in minutes: demo tiles, prompts, LoRA, synthetic tiles,
the arms of the experiment, the report.

Every step is one of the four scripts, printed as the command that a person would type, and run in this folder; the report is opened at the
end. Proven by tests/mini/test_tour.py.
"""
import shlex
import subprocess
import sys
import time
import webbrowser
from pathlib import Path

from lesion.run import cli, folders

QUICK = {"train_lora.py": ["--steps", "6", "--sample-every", "100", "--sample-steps", "2", "--sample-count", "2"],
         "generate.py": ["--steps", "2"], "classify.py": ["--epochs", "1", "--seeds", "1"], "evaluate.py": []}
STEPS = (("train_lora.py", ["--phase", "2"], "teach the built-in base what the demo set's malignant tiles look like"),
         ("generate.py", ["--count", "160", "--sampler", "dpmpp", "--steps", "20", "--gif"], "draw synthetic tiles with that LoRA"),
         ("classify.py", [], "train a small classifier on real tiles, on real and synthetic ones, and on the control"),
         ("evaluate.py", [], "measure what they find, and whether the pictures are faithful and new"))


def parse(argv: list[str]):
    """The flags; see --help."""
    parser = cli.Parser(prog="lesion tour", description=__doc__.split("\n\n")[0].split(": ", 1)[1])
    parser.add_argument("--quick", action="store_true", help="as few steps as can be: shows the chain, not the idea")
    parser.add_argument("--no-browser", action="store_true", help="do not open the report at the end")
    return parser.parse_args(argv)


def commands(quick: bool) -> list[tuple[list[str], str]]:
    """(script and flags, what it does) of each step."""
    return [([script, *flags, *(QUICK[script] if quick else [])], text) for script, flags, text in STEPS]


def main(argv: list[str]) -> None:
    args = parse(argv)
    began = time.monotonic()
    steps = commands(args.quick)
    for number, (command, text) in enumerate(steps, 1):
        print(f"\n[{number} of {len(steps)}] {text}\n$ python {shlex.join(command)}", flush=True)
        done = subprocess.run([sys.executable, str(folders.ROOT / command[0]), *command[1:]])
        if done.returncode:
            raise SystemExit(done.returncode)
    report = Path("report") / "report.html"
    print(f"\nthe whole chain took {(time.monotonic() - began) / 60:.1f} minutes; read {report}\n"
          "With tiles and a base of your own: README, section \"The real recipe\".", flush=True)
    if not args.no_browser:
        webbrowser.open(report.resolve().as_uri())
