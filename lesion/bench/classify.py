"""`python -m lesion bench classify`: one training epoch of the classifier beside the plain torchvision recipe.

The peer is what a tutorial does: ImageFolder on the JPEG files, a DataLoader with workers, per-image transforms
(RandomAffine, flips, quarter turns, ColorJitter, Resize, Normalize), the same network in the default memory layout,
the same loss, optimiser, batch size and number of tiles. Both run in one process, by turns, on the same tiles; each
turn is an epoch; medians are printed, then our own epoch by part. Proven by tests/bench/test_bench_classify.py.
"""
import json
import statistics
import tempfile
import time
from pathlib import Path

from lesion.run import cli


def parse(argv: list[str]):
    """The flags; see --help."""
    parser = cli.Parser(prog="lesion bench classify", description="Measure a training epoch of the classifier.")
    parser.add_argument("--data", type=Path, default=Path("data/isic2024"), help="prepared data set, part train")
    parser.add_argument("--tiles", type=cli.number(int, low=8), default=1024, help="tiles an epoch")
    parser.add_argument("--arch", choices=("resnet18", "resnet34", "resnet50"), default="resnet50", help="network")
    parser.add_argument("--image-size", type=cli.number(int, low=32, high=1024), default=128, help="side in pixels")
    parser.add_argument("--batch-size", type=cli.number(int, low=2), default=64, help="tiles a step")
    parser.add_argument("--workers", type=cli.number(int, low=0), default=2, help="processes of the peer's DataLoader")
    parser.add_argument("--repeats", type=cli.number(int, low=1), default=3, help="epochs of each, by turns")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    args = parse(argv)
    from lesion.classify import arms
    from lesion.run import devices, files
    where = devices.device(args.device)
    if where.type == "cpu":
        devices.keep_freed_memory()
    rows = [row for row in files.read_manifest(args.data) if row["split"] == "train"]
    if len(rows) < args.tiles:
        raise ValueError(f"--tiles {args.tiles}: {args.data} has {len(rows)} training tiles")
    rows = arms.first_by_hash(rows, args.tiles, 0)
    ours, load_s = our_epoch(args, rows, where)
    peer = peer_epoch(args, rows, where)
    times, parts = {"ours": [], "peer": []}, []
    for turn in range(args.repeats + 1):  # the first turn warms up caches, kernels and workers
        parts_s, peer_s = ours(), peer()
        if turn:
            times["ours"].append(sum(parts_s.values()))
            times["peer"].append(peer_s)
            parts.append(parts_s)
    count = args.tiles // args.batch_size * args.batch_size
    speed = {name: count / statistics.median(values) for name, values in times.items()}
    for name in speed:
        spread = " ".join(f"{count / value:.0f}" for value in times[name])
        print(f"{name:6}{speed[name]:9.1f} images/s   (epochs: {spread})")
    print(f"ratio {speed['ours'] / speed['peer']:9.2f}   reading all tiles into memory once: {load_s:.1f} s")
    medians = {name: statistics.median(part[name] for part in parts) for name in parts[0]}
    for name, value in medians.items():
        print(f"  {name:16}{1000 * value / (count / args.batch_size):9.1f} ms a step"
              f"{100 * value / sum(medians.values()):6.1f} %")
    print(json.dumps({"bench": "classify", "arch": args.arch, "image_size": args.image_size, "tiles": count,
                      "batch_size": args.batch_size, "workers": args.workers, "device": str(where),
                      "ours_images_per_s": round(speed["ours"], 1), "peer_images_per_s": round(speed["peer"], 1),
                      "ratio": round(speed["ours"] / speed["peer"], 2), "load_s": round(load_s, 1),
                      "parts_s": {name: round(value, 3) for name, value in medians.items()}}))


def our_epoch(args, rows, where):
    """(a function that trains an epoch and returns the seconds of each part, seconds to read the tiles)."""
    import numpy as np
    import torch
    import torch.nn.functional as F

    from lesion.classify import network
    from lesion.classify.augment import augment
    from lesion.run import devices
    from lesion.tiles import decode
    started = time.perf_counter()
    norm = decode.recorded_norm(args.data)
    read = (decode.tile((args.data / row["file_name"]).read_bytes(), args.image_size, *norm) for row in rows)
    images = torch.from_numpy(np.stack(list(read))).to(where)  # not load_tiles: its cache would flatter
    load_s = time.perf_counter() - started
    labels = torch.tensor([float(row["label"] == "malignant") for row in rows], device=where)
    model = network.build(args.arch, "none", 0).to(where).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    order = torch.arange(len(rows))

    def epoch():
        spent = dict.fromkeys(("tiles, augment", "forward", "backward", "optimiser"), 0.0)

        def lap(name, since):
            devices.synchronize(where)
            now = time.perf_counter()
            spent[name] += now - since
            return now
        for step in range(args.tiles // args.batch_size):
            clock = time.perf_counter()
            index = network.batch_of(order, step, args.batch_size, 0)
            pixels = augment(images[index.to(where)], "traditional", devices.generator(0, step))
            clock = lap("tiles, augment", clock)
            loss = F.binary_cross_entropy_with_logits(model(pixels)[:, 0], labels[index.to(where)])
            clock = lap("forward", clock)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            clock = lap("backward", clock)
            optimizer.step()
            lap("optimiser", clock)
        return spent
    return epoch, load_s


def peer_epoch(args, rows, where):
    """A function that trains an epoch by the plain recipe and returns its seconds."""
    import torch
    import torch.nn.functional as F
    import torchvision
    from torchvision.transforms import v2

    from lesion.classify import augment
    from lesion.run import devices
    folder = tempfile.TemporaryDirectory()  # removed when the function that holds it is
    for row in rows:
        place = Path(folder.name) / row["label"] / Path(row["file_name"]).name
        place.parent.mkdir(exist_ok=True)
        place.symlink_to((args.data / row["file_name"]).resolve())
    change = v2.Compose([
        v2.Resize((args.image_size, args.image_size), antialias=True), v2.RandomHorizontalFlip(),
        v2.RandomChoice([v2.RandomRotation((90 * k, 90 * k)) for k in range(4)]),
        v2.RandomAffine(augment.ANGLE, (augment.SHIFT,) * 2, (1 - augment.SCALE, 1 + augment.SCALE), augment.SHEAR,
                        v2.InterpolationMode.BILINEAR),
        v2.ColorJitter(augment.BRIGHTNESS, augment.CONTRAST, augment.SATURATION, augment.HUE),
        v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(augment.MEAN, augment.STD)])
    loader = torch.utils.data.DataLoader(
        torchvision.datasets.ImageFolder(folder.name, change), args.batch_size, shuffle=True, drop_last=True,
        num_workers=args.workers, persistent_workers=args.workers > 0, pin_memory=where.type == "cuda")
    model = getattr(torchvision.models, args.arch)(num_classes=1).to(where).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def epoch():
        assert folder
        started = time.perf_counter()
        for pixels, labels in loader:
            loss = F.binary_cross_entropy_with_logits(model(pixels.to(where, non_blocking=True))[:, 0],
                                                      labels.to(where).float())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        devices.synchronize(where)
        return time.perf_counter() - started
    return epoch
