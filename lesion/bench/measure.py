"""`python -m lesion bench`: how fast, part by part; beside diffusers and peft if asked.

Every figure is a median over steps after a warm-up; the device is synchronised before the clock is read. With --peer the two sides run
in processes of their own and take turns step by step, so that a noisy machine disturbs both alike. The last line is one JSON object.
Proven by tests/bench/test_measure.py.
"""
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from lesion.run import cli, folders

RANK = 16
PEER = folders.ROOT / "tests" / "peers" / "diffusers_peer.py"  # needs requirements-dev.txt


def parse(argv: list[str]):
    parser = cli.Parser(prog="lesion bench", description="Measure training, generation or loading.")
    parser.add_argument("what", choices=("train", "generate", "load"), help="`bench classify` has flags of its own")
    parser.add_argument("--base", default="random", help="checkpoint, or `random`: SD 1.5's sizes with random weights, nothing to download")
    parser.add_argument("--tokenizer", type=Path, help="for a single-file base")
    parser.add_argument("--phase", type=int, choices=(1, 2), default=1, help="train: 1 caches the text, 2 trains the text encoder")
    parser.add_argument("--batch-size", type=cli.number(int, low=1), default=4, help="tiles a step")
    parser.add_argument("--resolution", type=cli.resolution, default=128, help="side of the tiles")
    parser.add_argument("--precision", choices=("fp16", "bf16", "fp32"), default="fp32", help="as in train_lora.py")
    parser.add_argument("--steps", type=cli.number(int, low=1), default=8, help="measured steps (generate: sampling steps)")
    parser.add_argument("--warmup", type=cli.number(int, low=1), default=2, help="steps before the clock counts")
    parser.add_argument("--peer", choices=("diffusers",), help="also run diffusers + peft, taking turns")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--serve", action="store_true", help="be one side of a comparison: a step for each line of standard input")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    if argv[:1] == ["classify"]:
        from lesion.bench import classify

        classify.main(argv[1:])
        return
    args = parse(argv)
    if args.what == "load":
        print_load(args)
        return
    if args.peer:
        compare(args, argv)
        return
    from lesion.run import devices
    device = devices.device(args.device)
    if device.type == "cpu":
        devices.keep_freed_memory()
    step = {"train": training_step, "generate": generation}[args.what](args, device)
    if args.serve:
        serve(step)
        return
    parts = [step() for _ in range(args.warmup + (args.steps if args.what == "train" else 3))][args.warmup:]
    report(args, parts, {"device": str(device), "peak_mem_gib": round(devices.peak_mem_gib(device), 2)})


def report(args, parts: list[dict[str, float]], more: dict) -> None:
    medians = {name: statistics.median(part[name] for part in parts) for name in parts[0]}
    images_per_s = 1000 * args.batch_size / medians["total_ms"]
    for name, value in medians.items():
        print(f"{name:16}{value:10.1f}   {100 * value / medians['total_ms']:5.1f} %")
    print(f"{'images/s':16}{images_per_s:10.2f}")
    print(
        json.dumps(
            {
                "bench": args.what,
                "base": args.base,
                "batch_size": args.batch_size,
                "precision": args.precision,
                "resolution": args.resolution,
                "phase": args.phase,
                "measured": len(parts),
                "images_per_s": round(images_per_s, 3),
                **{name: round(value, 1) for name, value in medians.items()},
                **more,
            }
        )
    )


def compare(args, argv: list[str]) -> None:
    """Start both sides, let them take turns, print medians and their ratio (train: the whole step; generate: the U-Net's steps)."""
    if not PEER.is_file():
        raise ValueError(f"--peer needs the repository's {PEER.relative_to(folders.ROOT)} and requirements-dev.txt")
    flags = [flag for flag in argv if flag not in ("--peer", "diffusers", "--peer=diffusers")]
    commands = {"ours": [sys.executable, "-m", "lesion", "bench", *flags, "--serve"], "peer": [sys.executable, str(PEER), *flags]}
    sides = {name: subprocess.Popen(command, cwd=folders.ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8")
             for name, command in commands.items()}
    times: dict[str, list[float]] = {name: [] for name in sides}
    rounds = args.warmup + (args.steps if args.what == "train" else 3)
    for _ in cli.progress(range(rounds), desc="rounds"):
        for name, side in sides.items():
            side.stdin.write("go\n")
            side.stdin.flush()
            line = side.stdout.readline()
            if not line:
                raise ValueError(f"the {name} side stopped: {' '.join(commands[name])}")
            times[name].append(json.loads(line)["unet_ms" if args.what == "generate" else "total_ms"])
    peaks = {}
    for name, side in sides.items():
        side.stdin.close()
        peaks[name] = float(side.stdout.read() or "nan")
        side.wait()
    medians = {name: statistics.median(values[args.warmup:]) for name, values in times.items()}
    for name, value in medians.items():
        print(f"{name:8}{value:10.1f} ms   {1000 * args.batch_size / value:8.2f} images/s   {peaks[name]:6.2f} GiB")
    print(
        json.dumps(
            {
                "bench": args.what,
                "base": args.base,
                "batch_size": args.batch_size,
                "precision": args.precision,
                "phase": args.phase,
                "measured": args.steps,
                "ours_ms": round(medians["ours"], 1),
                "peer_ms": round(medians["peer"], 1),
                "peer_over_ours": round(medians["peer"] / medians["ours"], 3),
                "ours_gib": peaks["ours"],
                "peer_gib": peaks["peer"],
            }
        )
    )


def serve(step) -> None:
    """One step and one JSON line for each line of standard input; at its end the peak memory in GiB."""
    import torch

    from lesion.run import devices
    for _ in sys.stdin:
        print(json.dumps(step()), flush=True)
    print(round(devices.peak_mem_gib(torch.device("cuda" if torch.cuda.is_available() else "cpu")), 2), flush=True)


def networks(args, device):
    """The networks of --base; for `random`, SD 1.5's with small random weights."""
    import torch

    from lesion.run import devices
    from lesion.sd import checkpoint
    dtype = devices.DTYPES[args.precision]
    if args.base != "random":
        sd = checkpoint.load(args.base, device, dtype, args.tokenizer)
        return sd.unet, sd.vae, sd.text_encoder
    from lesion.sd.clip import CLIPTextEncoder
    from lesion.sd.unet import UNet
    from lesion.sd.vae import VAE
    with torch.device("meta"):
        all_three = UNet(), VAE(), CLIPTextEncoder()
    for network, kind in zip(all_three, (dtype, torch.float32, dtype)):
        network.to(kind).to_empty(device=device).eval().requires_grad_(False)
        for key, parameter in network.named_parameters():
            parameter.normal_(std=0.02) if parameter.ndim > 1 else parameter.fill_(float(key.endswith("weight")))
    return all_three


class Clock:
    """Laps in milliseconds, the device synchronised at each."""

    def __init__(self, device):
        from lesion.run import devices
        self.synchronize = lambda: devices.synchronize(device)
        self.synchronize()
        self.start = self.last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        self.synchronize()
        now = time.perf_counter()
        self.laps[name] = self.laps.get(name, 0.0) + 1000 * (now - self.last)
        self.last = now

    def total(self) -> dict[str, float]:
        return {**self.laps, "total_ms": 1000 * (self.last - self.start)}


def training_step(args, device):
    """One step of train_lora.py on made-up latents and texts: noise, text, U-Net forward, backward, clip + AdamW."""
    import torch

    from lesion.lora import layers
    from lesion.run import devices
    from lesion.sd import schedule
    from lesion.train.step import posterior_sample
    unet, vae, text_encoder = networks(args, device)
    scale = vae.config.scaling_factor
    g = torch.Generator().manual_seed(0)
    trained = [unet] + ([text_encoder] if args.phase == 2 else [])
    for network in trained:
        layers.inject(network, layers.target_paths(network, "attention"), RANK, RANK, g)
    parameters = [p for network in trained for p in layers.lora_parameters(network)]
    optimizer = torch.optim.AdamW(parameters, lr=3e-5)
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    side, count = args.resolution // 8, args.batch_size
    mean, logvar = torch.randn(count, 4, side, side, device=device), torch.full((count, 4, side, side), -6.0, device=device)
    token_ids = torch.randint(text_encoder.config.vocab_size, (count, 77), generator=g).to(device)
    context = torch.randn(count, 77, unet.config.cross_attention_dim, generator=g).to(device, unet.conv_in.weight.dtype)

    def step() -> dict[str, float]:
        clock = Clock(device)
        noise, posterior = (torch.randn(mean.shape, generator=g).to(device) for _ in range(2))
        timesteps = torch.randint(schedule.STEPS, (count,), generator=g).to(device)
        noisy = schedule.add_noise(posterior_sample(mean, logvar, posterior, scale), noise, timesteps)
        clock.lap("noise_ms")
        with devices.autocast(device, args.precision):
            text = text_encoder(token_ids) if args.phase == 2 else context
            clock.lap("text_ms")
            loss = (unet(noisy, timesteps, text).float() - noise).square().mean()
            clock.lap("forward_ms")
        scaler.scale(loss).backward()
        clock.lap("backward_ms")
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        clock.lap("optimizer_ms")
        return clock.total()
    return step


def generation(args, device):
    """One batch of generate.py: text, --steps DDIM steps with guidance, decoding."""
    import torch

    from lesion.run import devices
    from lesion.sd import pipeline
    from lesion.sd.checkpoint import StableDiffusion
    unet, vae, text_encoder = networks(args, device)
    sd = StableDiffusion(unet, vae, text_encoder, None, args.base)
    token_ids = torch.randint(text_encoder.config.vocab_size, (args.batch_size, 77)).to(device)

    @torch.no_grad()
    def step() -> dict[str, float]:
        clock = Clock(device)
        with devices.autocast(device, args.precision):
            context = text_encoder(torch.cat([token_ids, token_ids]))
            clock.lap("text_ms")
            latents = pipeline.draw(sd, *context.chunk(2), list(range(args.batch_size)), args.resolution, steps=args.steps)
            clock.lap("unet_ms")
        pipeline.decode(sd, latents)
        clock.lap("decode_ms")
        return clock.total()
    return step


def print_load(args) -> None:
    """Time from a cold process's imports done to networks ready."""
    from lesion.run import devices
    from lesion.sd import checkpoint
    if args.base == "random":
        raise ValueError("bench load needs --base (a folder, a .safetensors file or a hub id)")
    device = devices.device(args.device)
    clock = Clock(device)
    checkpoint.load(args.base, device, devices.DTYPES[args.precision], args.tokenizer)
    clock.lap("load_ms")
    report(args, [clock.total()], {"device": str(device), "peak_mem_gib": round(devices.peak_mem_gib(device), 2)})
