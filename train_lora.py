"""Teach Stable Diffusion 1.5 a lesion class with LoRA (arXiv:2106.09685). Phase 1: U-Net; phase 2: U-Net and text encoder together.

    python train_lora.py --phase 1 --data data/isic2024 --base stable-diffusion-v1-5/stable-diffusion-v1-5
    python train_lora.py --phase 2 --data data/isic2024 --base stable-diffusion-v1-5/stable-diffusion-v1-5

Reads a prepared data set (python -m lesion prepare), writes RUN/lora.safetensors, metrics.jsonl, loss.png, samples/, checkpoints/.
The loop is in `train`, top to bottom; every random number in it is keyed by (seed, step), so a resumed run equals an uninterrupted one.
Many GPUs: torchrun --nproc-per-node N train_lora.py ...
"""
from pathlib import Path

from lesion.run import cli, files, folders

FREE = ("steps", "resume", "sample_every", "sample_steps", "val_every", "checkpoint_every", "device", "out")  # may change on --resume
LOG_EVERY = 10  # steps between reads of the device: the loss is kept there until then
MAX_SKIPPED = 50  # fp16 steps in a row with overflow before the run is given up
VAL_TIMESTEPS = (125, 375, 625, 875)  # the middle of each quartile


def parse(argv=None):
    parser = cli.Parser(prog="train_lora.py", description=__doc__.splitlines()[0])
    group = parser.add_argument_group("what")
    group.add_argument("--phase", type=int, choices=(1, 2), default=2, help="1: U-Net; 2: U-Net and text encoder, from phase 1's LoRA")
    group.add_argument("--base", help="folder, .safetensors file or hub id; default: SD 1.5, for the demo set the built-in mini")
    group.add_argument("--tokenizer", type=Path, help="folder with vocab.json and merges.txt, for a single-file base")
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
    group.add_argument("--steps", type=cli.number(int, low=1), help="optimizer steps; default: 1400, for mini 600")
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
    group.add_argument("--precision", choices=("fp16", "bf16", "fp32"), default=None, help="default: fp16 on CUDA, fp32 on the CPU")
    group.add_argument("--seed", type=cli.number(int, low=0), default=0, help="of everything random")
    group.add_argument(
        "--holdout", type=cli.number(float, low=0, high=0.9), default=0.0, help="share of training patients held back and validated on"
    )
    group = parser.add_argument_group("while it runs")
    group.add_argument("--resume", action="store_true", help="go on from the run's newest checkpoint")
    group.add_argument("--checkpoint-every", type=cli.number(int, low=1), default=100, help="steps between checkpoints")
    group.add_argument("--val-every", type=cli.number(int, low=1), default=100, help="steps between validations")
    group.add_argument("--val-tiles", type=cli.number(int, low=0), default=32, help="held-out tiles to validate on")
    group.add_argument("--sample-every", type=cli.number(int, low=1), default=200, help="steps between sample sheets")
    group.add_argument("--sample-count", type=cli.number(int, low=0), default=8, help="tiles on a sample sheet; 0: none")
    group.add_argument("--sample-steps", type=cli.number(int, low=1, high=1000), default=30, help="DDIM steps of a sample")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    return parser.parse_args(argv)


def main(argv=None) -> None:
    args = parse(argv)
    args.data, args.base, what = folders.default_inputs(args.data, args.base)
    folders.fill_recipe(args)
    print(f"learning {args.label!r} (phase {args.phase}) from {what}", flush=True)
    if args.data == folders.DEMO and not (folders.DEMO / files.MANIFEST).is_file():
        from lesion.mini import phantoms
        print(f"drawing the demo set into {folders.DEMO}", flush=True)
        phantoms.write_demo(folders.DEMO, progress=cli.progress)
    train(args)


def train(args) -> None:
    import signal
    from functools import partial

    import numpy as np
    import torch

    from lesion.lora import formats
    from lesion.run import devices
    from lesion.sd import checkpoint, schedule
    from lesion.tiles.seen import files_seen, train_files
    from lesion.train import setup, watch
    from lesion.train.checkpoint import load_checkpoint, save_checkpoint
    from lesion.train.latents import encode, plan
    from lesion.train.step import Denoiser, posterior_sample

    # --- set-up: process, data, base ---
    rank, world, device = devices.process(args.device)
    first_rank = rank == 0
    say = partial(print, flush=True) if first_rank else None
    args.precision = args.precision or ("fp16" if device.type == "cuda" else "fp32")
    args.out = args.out or (folders.newest(f"{args.label}-phase{args.phase}*", "checkpoint.safetensors") if args.resume else None) \
        or folders.next_folder(f"{args.label}-phase{args.phase}")
    tiles, held_out = setup.tiles_of_class(args, say)
    sd = checkpoint.load(args.base, device, devices.DTYPES[args.precision], args.tokenizer)
    seen = train_files(args.data, tiles.rows)
    recipe = setup.recipe(args, sd, seen)

    # --- LoRA: float32 factors beside frozen weights; the run folder, once nothing is left to refuse ---
    networks = setup.add_lora(args, sd, recipe["init_lora"])
    groups = setup.parameter_groups(args, networks)
    parameters = [p for group in groups for p in group["params"]]
    if first_rank:
        folders.open_run(args.out, recipe, args.resume, FREE)
        seen = files_seen(seen, formats.find(Path(recipe["init_lora"])) if recipe["init_lora"] else None)
        seen and files.write_json(args.out / "train_files.json", seen)
        say(f"{len(tiles.rows)} tiles, {len(held_out.rows)} held out; LoRA of rank {args.rank} on {' and '.join(networks)}"
            f"{', from ' + recipe['init_lora'] if recipe['init_lora'] else ''}: {sum(p.numel() for p in parameters):,} parameters; "
            f"{device}, {args.precision}; run folder {args.out}")

    # --- what does not change is computed once: latents of every view to come, texts ---
    batch = args.batch_size * args.accumulate * world
    chosen, views = plan(len(tiles.rows), batch, args.steps, args.seed, args.views)
    pairs = np.stack([chosen.ravel(), views.ravel()], 1)
    mean, logvar = encode(sd.vae, tiles.images_u8, pairs, args.data / ".cache", device, setup.bar("latents", "tile", first_rank))
    texts = setup.Texts(sd, [row["text"] for row in tiles.rows], trained=args.phase == 2, say=say)
    validate = watch.validation(args, sd, held_out, VAL_TIMESTEPS, device)
    sample = watch.sampling(args, sd, tiles.rows, device)

    # --- optimizer, fp16 loss scale, state ---
    model = devices.distributed(Denoiser(sd.unet, sd.text_encoder), world, device)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=args.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    done, skipped = load_checkpoint(args.out, networks, optimizer, scaler) if args.resume else (0, 0)
    if done > args.steps:
        raise ValueError(f"{args.out} has done {done} steps already: --steps {args.steps} is fewer")
    log = watch.Log(args, device, tiles.rows, done, batch)
    first_rank and log.open(done)
    stopping = []
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda *_: stopping.append(True))  # finish the step, checkpoint, leave

    if first_rank and done == 0:
        validate and log.validation(0, validate())
        sample(args.out / "samples" / "step-000000.png")
    in_a_row = 0
    log.restart_clock()
    bar = cli.progress(total=args.steps, initial=done, desc="train", unit="step", disable=not first_rank)
    start = done
    for step in range(start, args.steps):
        factor = setup.lr_factor(args, step)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        if step == max(args.text_encoder_steps or args.steps, start) and args.phase == 2:  # its budget is spent
            for p in groups[1]["params"]:
                p.requires_grad_(False)
            model = devices.distributed(Denoiser(sd.unet, sd.text_encoder), world, device)

        # --- every random number of this step, for the whole batch of all processes ---
        g = devices.generator(args.seed, step)
        shape = (batch, *mean.shape[2:])
        all_timesteps = torch.randint(schedule.STEPS, (batch,), generator=g)
        all_noise = torch.randn(shape, generator=g) + args.noise_offset * torch.randn(*shape[:2], 1, 1, generator=g)
        all_posterior = torch.randn(shape, generator=g)
        all_dropped = torch.rand(batch, generator=g) < args.caption_dropout

        losses, mine = [], []
        for micro in range(args.accumulate):
            part = slice((micro * world + rank) * args.batch_size, (micro * world + rank + 1) * args.batch_size)
            tile, view = chosen[step, part], views[step, part]
            mine.append(np.arange(batch)[part])
            timesteps, noise, posterior = (x[part].to(device) for x in (all_timesteps, all_noise, all_posterior))
            latents = posterior_sample(mean[tile, view], logvar[tile, view], posterior, sd.latent_scale)
            noisy_latents = schedule.add_noise(latents, noise, timesteps)
            text = texts(tile, all_dropped[part])
            with devices.no_sync(model, micro + 1 < args.accumulate), devices.autocast(device, args.precision):
                noise_pred = model(noisy_latents, timesteps, text)
                error = (noise_pred.float() - noise).square().mean(dim=(1, 2, 3))  # [B], arXiv:2006.11239, eq. 14
                weight = 1.0 if args.min_snr_gamma is None else schedule.min_snr_weight(timesteps, args.min_snr_gamma)
                loss = (weight * error).mean() / args.accumulate
                scaler.scale(loss).backward()
            losses.append(error.detach())

        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, args.clip)
        scale = scaler.get_scale()
        scaler.step(optimizer)  # does nothing if a gradient overflowed
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        overflowed = scaler.get_scale() < scale
        skipped, in_a_row = skipped + overflowed, (in_a_row + 1) * overflowed
        if in_a_row == MAX_SKIPPED:
            raise ValueError(f"step {step}: {MAX_SKIPPED} steps in a row overflowed in fp16; use --precision bf16 or fp32")

        # --- book-keeping ---
        done = step + 1
        last = done == args.steps or bool(stopping)
        mine = np.concatenate(mine)
        log.step(done, torch.cat(losses), all_timesteps[mine], chosen[step, mine], grad_norm, optimizer.param_groups[0]["lr"], skipped)
        if first_rank:
            bar.update()
            if last or done % LOG_EVERY == 0 or done % args.checkpoint_every == 0 or done % args.val_every == 0:
                bar.set_postfix_str(log.flush(), refresh=False)
            if validate and (done == args.steps or done % args.val_every == 0):
                log.validation(done, validate())
            if done == args.steps or done % args.sample_every == 0:
                sample(args.out / "samples" / f"step-{done:06d}.png")
            if last or done % args.checkpoint_every == 0:
                save_checkpoint(args, networks, optimizer, scaler, done, skipped, recipe)
            if not log.waiting:
                log.restart_clock()
        if last:  # not `stopping`: a signal during validation or sampling comes too late for this step's checkpoint
            break
    bar.close()

    if first_rank and done < args.steps:
        say(f"stopped after step {done}; go on with: python train_lora.py --resume --out {args.out} (and the same flags)")
        raise KeyboardInterrupt
    if first_rank:
        watch.loss_curve(args.out / "metrics.jsonl", args.out / "loss.png")
        watch.before_and_after(args.out / "samples", args.steps)
        say(
            f"LoRA: {args.out / 'lora.safetensors'}\nloss: {args.out / 'loss.png'}\n"
            f"before and after: {args.out / 'samples' / 'before-after.png'}\n"
            f"next: python generate.py --lora {args.out / 'lora.safetensors'} --base {args.base} --prompts-from {args.data} --count 16"
        )


if __name__ == "__main__":
    cli.run(main, "train_lora.py")
