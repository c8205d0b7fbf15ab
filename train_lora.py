"""Teach Stable Diffusion 1.5 a lesion class with LoRA (arXiv:2106.09685). Phase 1: U-Net; phase 2: U-Net and text encoder together.

    python train_lora.py --phase 1 --data data/isic2024 --base stable-diffusion-v1-5/stable-diffusion-v1-5
    python train_lora.py --phase 2 --data data/isic2024 --base stable-diffusion-v1-5/stable-diffusion-v1-5

Reads a prepared data set (python -m lesion prepare), writes RUN/lora.safetensors, metrics.jsonl, loss.png, samples/, checkpoints/.
The loop is in `train`, top to bottom; every random number in it is keyed by (seed, step), so a resumed run equals an uninterrupted one.
Many GPUs: torchrun --nproc-per-node N train_lora.py ...
"""
import os
import shlex
from pathlib import Path

from lesion.run import cli, cores, files, folders, lock, sums

FREE = ("steps", "resume", "sample_every", "sample_steps", "val_every", "checkpoint_every", "device", "out",
        "threads")  # may change on --resume
LOG_EVERY = 10  # steps between reads of the device: the loss is kept there until then
MAX_SKIPPED = 50  # fp16 steps in a row with overflow before the run is given up


def parse(argv=None):
    parser = cli.Parser(prog="train_lora.py", description=__doc__.splitlines()[0])
    group = parser.add_argument_group("what")
    group.add_argument("--phase", type=int, choices=(1, 2), default=2, help="1: U-Net; 2: U-Net and text encoder, from phase 1's LoRA")
    group.add_argument("--base", help="folder, .safetensors file or hub id; default: SD 1.5, for the demo set the built-in mini")
    group.add_argument("--tokenizer", type=Path, help="folder with vocab.json and merges.txt, for a single-file base")
    group.add_argument("--vae", help="another VAE, or one for a base without: folder, .safetensors file or hub id")
    group.add_argument("--data", type=Path, help="prepared data set; default: data/isic2024 if it is there, else the demo set")
    group.add_argument("--label", default="malignant", help="class to learn")
    group.add_argument("--out", type=Path, help="run folder; default: runs/<label>-phase<n>")
    group.add_argument("--init-lora", help="LoRA to start from, or `none`; phase 2's default: the newest phase 1 run of this data and base")
    group = parser.add_argument_group("LoRA")
    group.add_argument("--rank", type=cli.number(int, low=1), default=16, help="rank r of the update")
    group.add_argument("--alpha", type=cli.number(float, above=0), default=16.0, help="update is scaled by alpha / rank")
    group.add_argument(
        "--lora-targets", choices=("attention", "all"), default="attention", help="all: kohya's set, with projections and MLPs"
    )
    group.add_argument("--lora-format", choices=("kohya", "diffusers"), default="kohya", help="layout of the written files")
    group = parser.add_argument_group("recipe")
    group.add_argument("--steps", type=cli.number(int, low=1), help="optimizer steps; default: 1400, for mini 300")
    group.add_argument("--batch-size", type=cli.number(int, low=1), default=8, help="tiles a step and process")
    group.add_argument("--accumulate", type=cli.number(int, low=1), default=1, help="batches an optimizer step")
    group.add_argument("--lr", type=cli.number(float, above=0), help="peak learning rate of AdamW; default: 3e-5, for mini 5e-4")
    group.add_argument("--text-encoder-lr", type=cli.number(float, above=0), help="phase 2: the text encoder's; default: --lr")
    group.add_argument(
        "--text-encoder-steps", type=cli.number(int, low=1), help="phase 2: freeze the text encoder's LoRA after so many steps"
    )
    group.add_argument("--schedule", choices=("constant", "cosine"), default="constant", help="of the learning rate, after the warm-up")
    group.add_argument("--warmup-steps", type=cli.number(int, low=0), default=0, help="steps of linear warm-up")
    group.add_argument("--weight-decay", type=cli.number(float, low=0), default=0.01, help="of AdamW")
    group.add_argument("--clip", type=cli.number(float, above=0), default=1.0, help="largest norm of the gradient")
    group.add_argument(
        "--min-snr-gamma", type=cli.number(float, above=0), help="min-SNR weighting (arXiv:2303.09556); 5 is usual; default: off"
    )
    group.add_argument("--noise-offset", type=cli.number(float, low=0), default=0.0, help="noise added per channel, for wider brightness")
    group.add_argument("--caption-dropout", type=cli.number(float, low=0, high=1), default=0.1, help="share of empty prompts")
    group.add_argument("--resolution", type=cli.resolution, default=128, help="side of the tiles in pixels")
    group.add_argument("--views", type=int, choices=(1, 8), default=8, help="8: flips and quarter turns; 1: none")
    group.add_argument(
        "--precision", choices=("fp16", "bf16", "fp32"), help="default: fp16 on CUDA; on a CPU bf16 if it is quick with it, else fp32"
    )
    group.add_argument("--seed", type=cli.number(int, low=0), default=0, help="of everything random")
    group.add_argument(
        "--holdout", type=cli.number(float, low=0, high=0.9), default=0.0, help="share of training patients held back and validated on"
    )
    group = parser.add_argument_group("while it runs")
    group.add_argument("--recipe", metavar="FILE", help="flags from a JSON or YAML file, as a run's args.json; the line wins")
    group.add_argument("--log", choices=("none", "tensorboard"), default="none", help="also write curves to RUN/tensorboard")
    group.add_argument("--resume", action="store_true", help="go on from the run's newest checkpoint")
    group.add_argument("--checkpoint-every", type=cli.number(int, low=1), default=100, help="steps between checkpoints")
    group.add_argument("--val-every", type=cli.number(int, low=1), default=100, help="steps between validations")
    group.add_argument("--val-tiles", type=cli.number(int, low=0), default=32, help="held-out tiles to validate on")
    group.add_argument("--sample-every", type=cli.number(int, low=1), default=200, help="steps between sample sheets")
    group.add_argument("--sample-count", type=cli.number(int, low=0), default=8, help="tiles on a sample sheet; 0: none")
    group.add_argument("--sample-steps", type=cli.number(int, low=1, high=1000), default=30, help="DDIM steps of a sample")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    group.add_argument("--plain", action="store_true", help="on a CPU: the plain layers, not the faster ones of lesion/sd/fast.py")
    group.add_argument("--memory-gib", type=cli.number(float, low=0.1), help="on a CPU: for weights and their packed copies (default: "
                       "6.8, with which a run stays below 8); with 12, SD 1.5 in fp32 learns faster")
    return parser.parse_args(cli.with_recipe(parser, argv))


def main(argv=None) -> None:
    args = parse(argv)
    data, base, what = folders.default_inputs(args.data, args.base)
    print(f"learning {args.label!r} (phase {args.phase}) from {what}", flush=True)
    if data == folders.DEMO and not (data / files.MANIFEST).is_file():
        from lesion.mini import phantoms
        print(f"drawing the demo set into {data}", flush=True)
        phantoms.write_demo(data, progress=cli.progress)
        sums.write(data)
    name = f"{args.label}-phase{args.phase}"
    out = args.out or (folders.newest(f"{name}*", "args.json") if args.resume else None) or folders.next_folder(name)
    with lock.owner(out, wanted=int(os.environ.get("RANK", 0)) == 0), cli.stop_request() as stop:
        train({**vars(args), "data": data, "base": base}, out, args.resume, stop)


def train(flags: dict, out: Path, resume: bool, stop: cli.Stop) -> None:
    import numpy as np
    import torch

    from lesion.lora import formats, layers
    from lesion.run import devices
    from lesion.run.optim import warmup_cosine
    from lesion.sd import checkpoint, fast
    from lesion.tiles.seen import files_seen, train_files
    from lesion.train import setup, watch
    from lesion.train.checkpoint import STATES, Progress, load_checkpoint, lora_of_step, save_checkpoint, write_loras
    from lesion.train.latents import encode, plan
    from lesion.train.step import Batch, Denoiser, adamw, backward, draw_step, update

    # --- set-up: process, recipe, data, base ---
    rank, world, device = devices.process(flags["device"])
    first_rank = rank == 0
    recipe = setup.Recipe.of_flags(flags, device)

    def say(text: str) -> None:
        if first_rank:
            print(text, flush=True)

    def progress(text: str):
        return lambda items, **more: cli.progress(items, **{**more, "desc": text, "unit": "tile", "disable": not first_rank})
    tiles, held_out = setup.tiles_of_class(recipe, say, progress("tiles"))
    sd = checkpoint.load(recipe.base, device, devices.DTYPES[recipe.precision], recipe.tokenizer, recipe.vae)
    for note in sd.notes:
        say(f"note: {note}")
    seen = train_files(recipe.data, tiles.rows)
    earlier = files.read_json(out / "args.json") if resume and (out / "args.json").is_file() else None
    threads = cores.use_free((earlier or {}).get("threads")) if device.type == "cpu" else None
    record = setup.record_of(recipe, sd, seen, earlier) | {"threads": threads}

    # --- LoRA: float32 factors beside frozen weights; optimizer, fp16 loss scale, state ---
    networks = setup.add_lora(recipe, sd, record["init_lora"])
    groups = setup.parameter_groups(recipe, networks)
    parameters = [p for group in groups for p in group["params"]]
    if first_rank:
        folders.check_run(out, record, resume, FREE)
    optimizer = adamw(groups, recipe.lr, recipe.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "fp16")
    at = load_checkpoint(out, networks, optimizer, scaler, say) if resume else Progress()
    done = at.step
    if done > recipe.steps:
        raise ValueError(f"{out} has done {done} steps already: --steps {recipe.steps} is fewer")

    # --- the run folder, now that nothing is left to refuse ---
    if first_rank:
        sums.require_unless_gone(out, but=STATES)
        folders.open_run(out, record, resume, FREE)
        sums.begin(out)
        seen = files_seen(seen, formats.find(Path(record["init_lora"])) if record["init_lora"] else None)
        if seen:
            files.write_json(out / "train_files.json", seen)
        say(f"{len(tiles.rows)} tiles, {len(held_out.rows)} held out; LoRA of rank {recipe.rank} on {' and '.join(networks)}"
            f"{', from ' + record['init_lora'] if record['init_lora'] else ''}: {sum(p.numel() for p in parameters):,} parameters; "
            f"{device}, {recipe.precision}{f', {threads} threads' if threads else ''}; run folder {out}")
    if device.type == "cpu" and not recipe.plain:
        say(fast.use(sd.unet, sd.text_encoder, sd.vae, memory_gib=recipe.memory_gib))

    # --- what does not change is computed once: latents of every view to come, texts ---
    batch_size = recipe.batch_size * recipe.accumulate * world  # of one optimizer step, over all processes
    chosen, views = plan(len(tiles.rows), batch_size, recipe.steps, recipe.seed, recipe.views)
    pairs = np.stack([chosen.ravel(), views.ravel()], 1)
    mean, logvar = encode(sd.vae, tiles.images_u8, pairs, recipe.data / ".cache", device, progress("latents"))
    texts = setup.Texts(sd, [row["text"] for row in tiles.rows], trained=recipe.phase == 2, say=say)
    validate = watch.validation(recipe, sd, held_out, device) if first_rank else None
    sample = watch.sampling(recipe, sd, tiles.rows, device)

    model = devices.distributed(Denoiser(sd.unet, sd.text_encoder), world, device)
    log = watch.Log(out, device, tiles.rows, done, batch_size, writes=first_rank, curves=flags["log"] == "tensorboard")
    if first_rank:
        log.open(done)
        if done == recipe.steps or (done and not lora_of_step(out, done).is_file()):
            write_loras(out, recipe, record, networks, done)  # a kill came between the state and these
        if done and recipe.schedule == "cosine" and earlier["steps"] != recipe.steps:
            before, now = (warmup_cosine(recipe.lr, done, n, recipe.warmup_steps) for n in (earlier["steps"], recipe.steps))
            say(f"--steps was {earlier['steps']} and is {recipe.steps}: the cosine is drawn anew over all of them, so at step {done} "
                f"the learning rate goes from {before:.3g} to {now:.3g}")
    if first_rank and done == 0:
        if validate:
            log.validation(0, validate())
        sample(out / "samples" / "step-000000.png")

    stop.patient = True  # from here on a signal lets the step end and be saved
    log.restart_clock()
    bar = cli.progress(total=recipe.steps, initial=done, desc="train", unit="step", disable=not first_rank)
    start = done
    for step in range(start, recipe.steps):
        # [learning rate] warm-up, then constant or a cosine; the text encoder may have a budget of steps of its own
        share = warmup_cosine(1.0, step, recipe.steps, recipe.warmup_steps, recipe.schedule)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * share
        if recipe.phase == 2 and step == max(recipe.text_encoder_steps or recipe.steps, start):
            for p in layers.lora_parameters(sd.text_encoder):
                p.requires_grad_(False)
            model = devices.distributed(Denoiser(sd.unet, sd.text_encoder), world, device)  # what it averages has changed

        # [accumulation] the gradient of the mean over all micro-batches of all processes
        draws = draw_step(recipe.seed, step, (batch_size, *mean.shape[2:]), recipe.noise_offset, recipe.caption_dropout)
        errors, mine = [], []
        for micro in range(recipe.accumulate):
            first = (micro * world + rank) * recipe.batch_size
            part = slice(first, first + recipe.batch_size)
            tile, view, some = chosen[step, part], views[step, part], draws.rows(part)
            batch = Batch(mean[tile, view], logvar[tile, view], some.to(device), **texts(tile, some.dropped))
            with devices.no_sync(model, micro + 1 < recipe.accumulate):
                errors.append(backward(model, batch, sd.latent_scale, scaler, recipe.min_snr_gamma, recipe.accumulate, recipe.precision))
            mine.append(np.arange(batch_size)[part])

        # [update] unscale, clip, AdamW; a step that overflowed in fp16 is void
        grad_norm, overflowed = update(optimizer, scaler, parameters, recipe.clip)
        done = step + 1
        at = Progress(done, at.skipped + overflowed, (at.in_a_row + 1) * overflowed)
        if at.in_a_row >= MAX_SKIPPED:
            raise ValueError(f"step {step}: {MAX_SKIPPED} steps in a row overflowed in fp16; use --precision bf16 or fp32")

        # [book-keeping] a signal to one process stops all of them here, a loss that is not finite in one of them at the next check
        stopped = devices.agree(stop.number, world)
        last = done == recipe.steps or bool(stopped)
        mine = np.concatenate(mine)
        log.step(done, torch.cat(errors), draws.timesteps[mine], chosen[step, mine], grad_norm, optimizer.param_groups[0]["lr"], at.skipped)
        if last or done % LOG_EVERY == 0 or done % recipe.checkpoint_every == 0 or done % recipe.val_every == 0:
            bar.set_postfix_str(log.flush(world), refresh=False)
        if first_rank:
            bar.update()
            if validate and (done == recipe.steps or done % recipe.val_every == 0):
                log.validation(done, validate())
            if done == recipe.steps or done % recipe.sample_every == 0:
                sample(out / "samples" / f"step-{done:06d}.png")
            if last or done % recipe.checkpoint_every == 0:
                save_checkpoint(out, recipe, record, networks, optimizer, scaler, at)
            if not log.waiting:
                log.restart_clock()
        if last:  # a signal during validation or sampling comes too late for this step's checkpoint
            break
    bar.close()

    if done < recipe.steps:
        say(f"stopped after step {done}; go on with: python train_lora.py --resume --out {out} (and the same flags)")
        stop.interrupt(stopped)
    if first_rank:
        watch.loss_curve(out / "metrics.jsonl", out / "loss.png")
        watch.before_and_after(out / "samples", recipe.steps)
        sums.write(out, but=("timing.jsonl",))  # times differ from run to run, the sums shall not
        following = shlex.join(["python", "generate.py", "--lora", str(out / "lora.safetensors"), "--base", recipe.base,
                                "--prompts-from", str(recipe.data), "--count", "16"])
        say(f"LoRA: {out / 'lora.safetensors'}\nloss: {out / 'loss.png'}\n"
            f"before and after: {out / 'samples' / 'before-after.png'}\n"
            f"next: {following}")


if __name__ == "__main__":
    cli.run(main, "train_lora.py")
