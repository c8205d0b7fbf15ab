"""`python -m lesion bench`: how fast, beside diffusers and peft if asked.

Every figure is a percentile over steps after a warm-up; the device is synchronised once a step. With --peer the two sides run in
processes of their own and take turns step by step, so that a noisy machine disturbs both alike. The last line is one JSON object.
Proven by tests/bench/test_measure.py.
"""
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from lesion.run import cli, cores, folders

PEER = folders.ROOT / "tests" / "peers" / "diffusers_peer.py"  # needs requirements-dev.txt
PEERS = {"train": ("diffusers", "diffusers-example"), "generate": ("diffusers", "diffusers-merged"), "encode": ("diffusers",)}
COMPARED = {"train": "total_ms", "generate": "unet_ms", "encode": "encode_ms"}  # what a ratio is of
RECIPE = {"steps": 1400, "batch": 8, "tiles": 314, "views": 8, "samples": 8 * 8 * 30, "drawn": 314, "draw_steps": 50}  # the study's


def parse(argv: list[str]):
    """The flags; see --help."""
    parser = cli.Parser(prog="lesion bench", description="Measure training, drawing, encoding or loading; `recipe`: all of a run.")
    parser.add_argument("what", choices=("train", "generate", "encode", "load", "recipe"), help="`bench classify` has flags of its own")
    parser.add_argument("--base", default="random", help="checkpoint, or `random`: SD 1.5's sizes with random weights, nothing to download")
    parser.add_argument("--tokenizer", type=Path, help="for a single-file base")
    parser.add_argument("--phase", type=int, choices=(1, 2), default=1, help="train: 1 caches the text, 2 trains the text encoder")
    parser.add_argument("--batch-size", type=cli.number(int, low=1), nargs="+", default=[4], help="tiles a step; several: a sweep")
    parser.add_argument("--resolution", type=cli.resolution, default=128, help="side of the tiles")
    parser.add_argument("--rank", type=cli.number(int, low=1), default=16, help="of the LoRA")
    parser.add_argument("--precision", choices=("auto", "fp16", "bf16", "fp32"), nargs="+", default=["auto"], help="several: a sweep")
    parser.add_argument("--steps", type=cli.number(int, low=1), default=8, help="measured steps (generate: sampling steps)")
    parser.add_argument("--warmup", type=cli.number(int, low=1), default=2, help="steps before the clock counts")
    parser.add_argument("--plain", action="store_true", help="on a CPU: the plain layers, not those of lesion/sd/fast.py")
    parser.add_argument("--memory-gib", type=cli.number(float, low=0.1), help="as train_lora.py's")
    parser.add_argument("--parts", action="store_true", help="train: also the update alone (one more fence a step)")
    parser.add_argument("--peer", help=f"also run a peer, taking turns: {PEERS}")
    parser.add_argument("--peer-precision", choices=("fp16", "bf16", "fp32"), help="the peer's, if it is not ours")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--beside", type=cli.number(int, low=1), help="train: also with that many other busy processes, taking turns")
    parser.add_argument("--serve", action="store_true", help="be one side of a comparison: a step for each line of standard input")
    args = parser.parse_args(argv)
    if args.peer and args.peer not in PEERS.get("train" if args.what == "recipe" else args.what, ()):
        parser.error(f"--peer {args.peer}: for {args.what} there are {', '.join(PEERS.get(args.what, ())) or 'none'}")
    if args.beside and (args.what != "train" or args.peer):
        parser.error("--beside: of `train` without --peer")
    if args.what == "load" and args.base == "random":
        parser.error("load needs --base (a folder, a .safetensors file or a hub id)")
    return args


def main(argv: list[str]) -> None:
    if argv[:1] == ["classify"]:
        from lesion.bench import classify
        classify.main(argv[1:])
        return
    args = parse(argv)
    from lesion.run import devices
    from lesion.sd import fast
    device = devices.device(args.device)
    if device.type == "cpu":
        devices.keep_freed_memory()
        cores.use_free()
    args.precision = [fast.default_precision(device) if name == "auto" else name for name in args.precision]
    if args.what == "recipe":
        print_recipe(args, device)
        return
    several = sweep(args)
    rows = [measure(one, device) if len(several) == 1 or args.peer else in_a_process(one) for one in several]
    if rows != [None]:
        print(json.dumps(rows[0] if len(rows) == 1 else {"bench": args.what, "rows": rows}))


def sweep(args) -> list:
    """One set of flags for each batch size and precision."""
    import argparse
    return [argparse.Namespace(**{**vars(args), "batch_size": batch, "precision": precision})
            for precision in args.precision for batch in args.batch_size]


def in_a_process(args) -> dict:
    """One row of a sweep from a fresh process, so that its peak memory is its own."""
    command = [sys.executable, "-m", "lesion", "bench", *side_flags(args, args.precision), "--warmup", str(args.warmup)]
    command += ["--parts"] if args.parts else []
    done = subprocess.run(command, cwd=folders.ROOT, stdout=subprocess.PIPE, text=True, encoding="utf-8")
    if done.returncode:
        raise ValueError(f"this row failed: {' '.join(command)}")
    *shown, last = done.stdout.splitlines()
    print(f"batch {args.batch_size}, {args.precision}", *shown, sep="\n")
    return json.loads(last)


def measure(args, device) -> dict | None:
    """One row: ours alone, or beside the peer; None for a side that serves a comparison."""
    from lesion.bench import sides
    from lesion.run import devices
    if args.what == "load":
        return first_step(args, device) if args.serve else load(args, device)
    make = {"train": sides.training_step, "generate": sides.generation, "encode": sides.encoding}[args.what]
    if args.serve:
        serve(make(args, device))
        return None
    if args.peer:
        return compare(args)
    if args.beside:
        return beside(args)
    step = make(args, device)
    rounds = args.steps if args.what != "generate" else 3
    laps = [step() for _ in cli.progress(range(args.warmup + rounds), desc=args.what, unit="step")][args.warmup:]
    return report(args, laps, device, devices.peak_mem_gib(device))


def report(args, laps: list[dict[str, float]], device, peak_gib: float) -> dict:
    """Print and return: milliseconds (10th, 50th and 90th percentile), images/s, TFLOP/s, share of the device's peak (MFU)."""
    import numpy as np

    from lesion.bench import machine
    row = {"bench": args.what, "base": args.base, "batch_size": args.batch_size, "precision": args.precision,
           "resolution": args.resolution, "phase": args.phase, "measured": len(laps), **machine.description(device)}
    for name in laps[0]:
        low, middle, high = np.percentile([lap[name] for lap in laps], (10, 50, 90))
        row |= {name: round(middle, 1), name.replace("_ms", "_p10_ms"): round(low, 1), name.replace("_ms", "_p90_ms"): round(high, 1)}
        print(f"{name:16}{middle:10.1f}   [{low:.1f}, {high:.1f}]")
    row["images_per_s"] = round(1000 * args.batch_size / row["total_ms"], 3)
    row["peak_mem_gib"] = round(peak_gib, 2)
    if args.what == "train":
        flops, peak = flops_of_training(args), machine.peak_tflops(device, args.precision)
        row["tflops"] = round(flops / row["total_ms"] / 1e9, 3)
        row |= {"peak_tflops": round(peak, 3), "mfu": round(row["tflops"] / peak, 3)} if peak else {}
    print("  ".join(f"{name} {row[name]}" for name in ("images_per_s", "tflops", "mfu", "peak_mem_gib") if name in row))
    return row


def flops_of_training(args) -> int:
    """FLOPs of one step, counted on shapes alone: forward, and backward through the frozen base to the LoRA factors."""
    import torch

    from lesion.bench import machine, sides
    from lesion.lora import layers
    if args.base == "random":
        from lesion.sd.clip import CLIPTextEncoder
        from lesion.sd.unet import UNet
        with torch.device("meta"):
            unet, text_encoder = UNet(), CLIPTextEncoder()
    else:
        sd = sides.networks(args.base, torch.device("cpu"), "fp32", args.tokenizer)
        unet, text_encoder = sd.unet.to("meta"), sd.text_encoder.to("meta")
    for network in (unet, text_encoder):
        network.requires_grad_(False)
        layers.inject(network, layers.target_paths(network, "attention"), args.rank, args.rank, None)
    side, count = args.resolution // 8, args.batch_size
    with torch.device("meta"):
        noisy, timesteps = torch.randn(count, 4, side, side), torch.zeros(count, dtype=torch.int64)
        context, token_ids = torch.randn(count, 77, unet.config.cross_attention_dim), torch.zeros(count, 77, dtype=torch.int64)
    return machine.counted_flops(
        lambda: unet(noisy, timesteps, text_encoder(token_ids) if args.phase == 2 else context).sum().backward())


def compare(args) -> dict:
    """Start both sides, let them take turns; print and return medians and their ratio (of COMPARED)."""
    if not PEER.is_file():
        raise ValueError(f"--peer needs the repository's {PEER.relative_to(folders.ROOT)} and requirements-dev.txt")
    theirs = args.peer_precision or args.precision
    ours = [sys.executable, "-m", "lesion", "bench", *side_flags(args, args.precision), "--serve"]
    commands = {"ours": ours, "peer": [sys.executable, str(PEER), *side_flags(args, theirs), "--peer", args.peer]}
    sides = {name: subprocess.Popen(command, cwd=folders.ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                    encoding="utf-8") for name, command in commands.items()}
    times: dict[str, list[float]] = {name: [] for name in sides}
    rounds = args.warmup + (args.steps if args.what != "generate" else 3)
    for _ in cli.progress(range(rounds), desc="rounds"):
        for name, side in sides.items():
            times[name].append(json.loads(_answer(side, name, commands[name]))[COMPARED[args.what]])
    peaks = {}
    for name, side in sides.items():
        side.stdin.close()
        peaks[name] = float(side.stdout.read() or "nan")
        side.wait()
    medians = {name: statistics.median(values[args.warmup:]) for name, values in times.items()}
    for name, value in medians.items():
        print(f"{name:8}{value:10.1f} ms   {1000 * args.batch_size / value:8.2f} images/s   {peaks[name]:6.2f} GiB")
    return {"bench": args.what, "base": args.base, "batch_size": args.batch_size, "precision": args.precision,
            "peer": args.peer, "peer_precision": theirs, "phase": args.phase, "measured": rounds - args.warmup,
            "ours_ms": round(medians["ours"], 1), "peer_ms": round(medians["peer"], 1),
            "peer_over_ours": round(medians["peer"] / medians["ours"], 3), "ours_gib": peaks["ours"], "peer_gib": peaks["peer"]}


def side_flags(args, precision: str) -> list[str]:
    """The flags of one side's process."""
    given = {"base": args.base, "tokenizer": args.tokenizer, "phase": args.phase, "batch-size": args.batch_size, "rank": args.rank,
             "resolution": args.resolution, "precision": precision, "steps": args.steps, "device": args.device,
             "memory-gib": args.memory_gib}
    flags = [str(part) for name, value in given.items() if value is not None for part in (f"--{name}", value)]
    return [args.what, *flags, *(["--plain"] if args.plain else [])]


def _answer(side: subprocess.Popen, name: str, command: list[str]) -> str:
    side.stdin.write("go\n")
    side.stdin.flush()
    line = side.stdout.readline()
    if not line:
        raise ValueError(f"the {name} side stopped: {' '.join(command)}")
    return line


def serve(step) -> None:
    """One step and one JSON line for each line of standard input; at its end the peak memory in GiB."""
    import torch

    from lesion.run import devices
    for _ in sys.stdin:
        print(json.dumps(step()), flush=True)
    print(round(devices.peak_mem_gib(torch.device("cuda" if torch.cuda.is_available() else "cpu")), 2), flush=True)


def beside(args) -> dict:
    """Steps on the machine as it is, and beside `--beside` processes that never rest: fresh processes, twice each in turns."""
    rows: dict[str, list[dict]] = {"quiet": [], "busy": []}
    for name in ["quiet", "busy"] * 2:
        others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(args.beside if name == "busy" else 0)]
        try:
            rows[name].append(in_a_process(args))
        finally:
            for other in others:
                other.kill()
                other.wait()
    medians = {name: round(statistics.median(row["total_ms"] for row in some), 1) for name, some in rows.items()}
    ratio = round(medians["busy"] / medians["quiet"], 2)
    print(f"quiet {medians['quiet']} ms, beside {args.beside} busy {medians['busy']} ms: {ratio} times")
    return {"bench": "beside", "base": args.base, "batch_size": args.batch_size, "precision": args.precision, "phase": args.phase,
            "processes": args.beside, "threads": {name: [row["threads"] for row in some] for name, some in rows.items()},
            "quiet_ms": medians["quiet"], "busy_ms": medians["busy"], "busy_over_quiet": ratio}


def load(args, device) -> dict:
    """From the start of a fresh process to its first denoising step, several times; the first warms the files and is not counted."""
    command = [sys.executable, "-m", "lesion", "bench", *side_flags(args, args.precision), "--serve"]
    laps = []
    for _ in cli.progress(range(args.warmup + args.steps), desc="load", unit="start"):
        begun = time.time()
        done = subprocess.run(command, cwd=folders.ROOT, stdout=subprocess.PIPE, text=True, encoding="utf-8")
        if done.returncode:
            raise ValueError(f"this start failed: {' '.join(command)}")
        lap = json.loads(done.stdout.splitlines()[-1])
        peak, entered = lap.pop("peak_mem_gib"), lap.pop("entered")
        laps.append({"import_ms": 1000 * (entered - begun), **lap, "total_ms": lap["total_ms"] + 1000 * (entered - begun)})
    return report(args, laps[args.warmup:], device, peak)


def first_step(args, device) -> None:
    """One start: a JSON line of when it was entered (seconds since 1970), loading, the faster layers and the first step (ms)."""
    entered = time.time()
    import torch

    from lesion.bench import sides
    from lesion.run import devices
    clock = sides.Clock(device)
    sd = sides.networks(args.base, device, args.precision, args.tokenizer)
    clock.lap("load_ms")
    sides.hasten(args, device, sd)
    clock.lap("fast_ms")
    side = args.resolution // 8
    with torch.no_grad():
        context = sd.text_encoder(torch.zeros(1, 77, dtype=torch.int64, device=device))
        latents = torch.randn(1, 4, side, side).to(device, context.dtype)
        sd.unet(latents, torch.tensor([999], device=device), context)
    clock.lap("first_step_ms")
    print(json.dumps({"entered": entered, **clock.total(), "peak_mem_gib": devices.peak_mem_gib(device)}))


def print_recipe(args, device) -> None:
    """The study's whole run predicted from measured parts, in minutes, for both sides where --peer is given: encoding every
    view of 314 tiles, 1,400 steps of batch 8, eight sheets of eight tiles at 30 steps, 314 tiles drawn at 50."""
    import argparse
    rows = {}
    for name, what, more in (("encode", "encode", {}), ("train", "train", {}), ("draw", "generate", {"steps": 3})):
        one = argparse.Namespace(**{**vars(args), "what": what, "batch_size": RECIPE["batch"], "precision": args.precision[0], **more})
        rows[name] = measure(one, device)
    sides = {"ours": "ours_ms", "peer": "peer_ms"} if args.peer else {"ours": None}
    result = {"bench": "recipe", "base": args.base, "precision": args.precision[0], "phase": args.phase, "recipe": RECIPE}
    for side, key in sides.items():
        ms = {name: rows[name][key or COMPARED[{"draw": "generate"}.get(name, name)]] for name in rows}
        image_step = ms["draw"] / 3 / RECIPE["batch"]
        minutes = {"latents": ms["encode"] / RECIPE["batch"] * RECIPE["tiles"] * RECIPE["views"], "training": ms["train"] * RECIPE["steps"],
                   "samples": image_step * RECIPE["samples"], "drawing": image_step * RECIPE["drawn"] * RECIPE["draw_steps"]}
        minutes = {name: round(value / 60000, 1) for name, value in minutes.items()}
        result[side] = {**minutes, "total": round(sum(minutes.values()), 1)}
        print(f"{side}: " + ", ".join(f"{name} {value} min" for name, value in result[side].items()))
    print(json.dumps(result))
