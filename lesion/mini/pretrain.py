"""`python -m lesion pretrain`: how the built-in base model `mini` was made, stage by stage.

vae: the autoencoder (lesion/mini/vae.py). texture: its decoder against a critic (texture.py). unet: tokenizer, text encoder and
U-Net on its latents (unet.py). check: figures on split `val` (check.py, samples.py). Each stage resumes to the bit.
On several cores stage unet goes fastest as a process a core, one thread each (measured; docs in the card of `mini`):
OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m -- lesion pretrain --stage unet ...
Proven by tests/mini/test_pretrain.py.
"""
import contextlib
import json
from pathlib import Path

from lesion.run import cli, lock, sums

NETWORKS = ("text_encoder", "unet", "vae")  # the folders of a model


def parse(argv: list[str]):
    """The flags; see --help."""
    parser = cli.Parser(prog="lesion pretrain", description="Train the built-in base model from the benign training tiles of a "
                        "prepared data set (split `train` only).")
    group = parser.add_argument_group("what")
    group.add_argument("--data", type=Path, required=True, help="prepared data set")
    group.add_argument("--out", type=Path, required=True, help="folder of the model: SD 1.5's layout, checkpoints, logs, samples")
    group.add_argument("--stage", choices=("vae", "texture", "unet", "check"), required=True,
                       help="vae; texture (its decoder again, latents kept) and unet read OUT/vae; check measures")
    group.add_argument("--start", type=Path, help="begin with the weights of this model (its averaged weights; no optimizer state)")
    group.add_argument("--resume", action="store_true", help="go on from OUT's newest checkpoint")
    group.add_argument("--change-flags", action="store_true", help="with --resume: go on although flags differ; recorded")
    group = parser.add_argument_group("recipe")
    group.add_argument(
        "--steps", type=cli.number(int, low=1), default=10000, help="optimizer steps; the learning rate falls to 0 at the last"
    )
    group.add_argument("--batch-size", type=cli.number(int, low=1), default=8, help="tiles (vae: crops) a step")
    group.add_argument("--lr", type=cli.number(float, above=0), default=1e-3, help="peak learning rate of AdamW")
    group.add_argument("--warmup-steps", type=cli.number(int, low=0), default=200, help="steps of linear warm-up")
    group.add_argument("--ema", type=cli.number(float, low=0, high=0.99999), default=0.999, help="decay of the weights' moving average")
    group.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto",
                       help="auto: bf16 where the processor has it, else fp32")
    group.add_argument("--crop", type=int, choices=(64, 128), default=64, help="vae: side of the random crops in pixels")
    group.add_argument("--kl-weight", type=cli.number(float, low=0), default=5e-4, help="vae: weight of the KL term per latent value")
    group.add_argument("--chroma-weight", type=cli.number(float, low=0), default=3.0, help="vae: of colour errors over brightness errors")
    group.add_argument("--chroma-field", type=cli.number(float, low=0), default=0.1, help="vae: spread of random local colour, of 2")
    group.add_argument("--square-weight", type=cli.number(float, low=0), default=5.0, help="vae: of squared over absolute colour errors")
    group.add_argument("--texture-weight", type=cli.number(float, low=0), default=0.5, help="vae, texture: weight of texture energy")
    group.add_argument("--adversarial-weight", type=cli.number(float, low=0), default=0.02, help="texture: weight of the critic's score")
    group.add_argument("--caption-dropout", type=cli.number(float, low=0, high=1), default=0.1, help="unet: share of empty captions")
    group.add_argument("--rare-power", type=cli.number(float, low=0, high=1), default=0.0,
                       help="texture, unet: tiles are drawn in proportion to (1 / frequency of their rarest word) to this power")
    group.add_argument("--seed", type=cli.number(int, low=0), default=0, help="of everything random")
    group = parser.add_argument_group("check")
    group.add_argument("--features", type=Path, help="baseline classifier (model.safetensors) to compare tiles by")
    group.add_argument("--samples", type=Path, nargs="+", metavar="DIR", help="judge these folders of generate.py")
    group = parser.add_argument_group("while it runs")
    group.add_argument("--checkpoint-every", type=cli.number(int, low=1), default=500, help="steps between checkpoints and checks")
    group.add_argument("--stop-at", type=cli.number(int, low=1), default=None, help="checkpoint and stop after this step, to change a flag")
    group.add_argument("--stop-after-minutes", type=cli.number(float, above=0), default=None, help="checkpoint and stop after so long")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Train a stage, or print a check's figures as JSON lines."""
    args = parse(argv)
    from lesion.run import devices
    devices.keep_freed_memory()
    if args.stage == "check":
        from lesion.mini import check, samples
        results = samples.check(args.data, args.samples, args.features) if args.samples else [
            check.check(args.data, args.out, args.features, args.seed)]
        for row in results:
            print(json.dumps(row))
        return
    from lesion.mini import texture, unet, vae
    stage = {"vae": vae.train, "texture": texture.train, "unet": unet.train}[args.stage]
    rank, world, _ = devices.process("cpu")
    if world > 1 and (args.stage != "unet" or args.batch_size % world):
        raise ValueError(f"{world} processes share the steps of --stage unet alone, and a batch that they can divide")
    with lock.owner(args.out, wanted=rank == 0), contextlib.nullcontext() if rank else sums.over(args.out):
        stage(recipe_of(args), sitting_of(args, rank, world))


def recipe_of(args):
    """The recipe of parsed flags, precision and starting weights resolved. ValueError for a --start that is no model."""
    from dataclasses import fields

    import torch

    from lesion.mini.loop import Recipe, data_sha256
    from lesion.run.state import files_sha256
    from lesion.sd import fast
    known = {field.name: getattr(args, field.name) for field in fields(Recipe) if hasattr(args, field.name)}
    if args.precision == "auto":
        known["precision"] = fast.default_precision(torch.device("cpu"))
    weights = [path for name in NETWORKS for path in sorted((args.start / name).glob("*.safetensors"))] if args.start else []
    if args.start and not weights:
        raise ValueError(f"--start {args.start} holds no model: give a folder as this command writes it")
    return Recipe(**known, start_sha256=files_sha256(weights) if weights else None, data_sha256=data_sha256(args.data))


def sitting_of(args, rank: int = 0, world: int = 1):
    """Where the stage reads and writes, when it pauses, and this process's part."""
    from dataclasses import fields

    from lesion.mini.loop import Sitting
    flags = {field.name: getattr(args, field.name) for field in fields(Sitting) if hasattr(args, field.name)}
    return Sitting(**flags, rank=rank, world=world)
