"""`python -m lesion COMMAND`: the commands that are not scripts of their own.

Each command is a module with `main(argv)`; only the chosen one is imported, so `--help` stays quick.
"""
import importlib
import sys

from lesion import __version__
from lesion.run import cli

COMMANDS = {
    "prepare": ("lesion.prepare", "make a data set from ISIC tiles: DIR/metadata.jsonl and the original JPEG files"),
    "label": ("lesion.web.label", "describe tiles in the browser: one key an answer"),
    "study": ("lesion.web.study", "ask readers which tiles are real"),
    "crossfit": ("lesion.classify.crossfit", "the experiment on every tile, by folds: LoRA, tiles and arms of each"),
    "pretrain": ("lesion.mini.pretrain", "train the built-in base model"),
    "verify": ("lesion.report.verify", "recompute every hash and number of what the commands wrote"),
    "convert": ("lesion.sd.convert", "make safetensors of a pickled checkpoint (.ckpt, .bin, .pt), running nothing in it"),
    "bench": ("lesion.bench.measure", "measure training and generation"),
    "tour": ("lesion.mini.tour", "the whole idea in minutes: demo tiles, LoRA, synthetic tiles, arms, report"),
}
HELP = "\n".join(["usage: python -m lesion COMMAND [flags]\n", *(f"  {name:10}{text}" for name, (_, text) in COMMANDS.items()),
                  "\n`python -m lesion COMMAND --help` lists a command's flags. The scripts train_lora.py, generate.py, classify.py and "
                  "evaluate.py stand beside this package."])


def main() -> None:
    """Print the list of commands, or run one."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help", "--version"):
        cli.run(lambda: print(__version__ if arguments[:1] == ["--version"] else HELP), "lesion")
    elif arguments[0] not in COMMANDS:
        print(f"lesion: no command {arguments[0]!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    else:
        module = importlib.import_module(COMMANDS[arguments[0]][0])
        cli.run(lambda: module.main(arguments[1:]), f"lesion {arguments[0]}")


if __name__ == "__main__":
    main()
