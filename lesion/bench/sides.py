"""Our side of the bench: the product's own step functions on made-up latents and texts, one call a step.

Proven by tests/bench/test_measure.py.
"""
import time
from collections.abc import Callable

import torch

from lesion.lora import layers
from lesion.run import devices
from lesion.sd import checkpoint, fast, pipeline
from lesion.sd.checkpoint import StableDiffusion
from lesion.sd.clip import CLIPTextEncoder
from lesion.sd.unet import UNet
from lesion.sd.vae import VAE
from lesion.train.step import Batch, Denoiser, adamw, backward, draw_step, update

RANK = 16


class Clock:
    """Laps in milliseconds; the device is synchronised at each, so ask for as few as are needed."""

    def __init__(self, device: torch.device):
        self.device = device
        devices.synchronize(device)
        self.start = self.last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """Add the time since the last lap to `name`."""
        devices.synchronize(self.device)
        now = time.perf_counter()
        self.laps[name] = self.laps.get(name, 0.0) + 1000 * (now - self.last)
        self.last = now

    def total(self) -> dict[str, float]:
        """{name: ms, "total_ms": ms from the start to the last lap}."""
        return {**self.laps, "total_ms": 1000 * (self.last - self.start)}


def networks(base: str, device: torch.device, precision: str, tokenizer=None) -> StableDiffusion:
    """The networks of a checkpoint; for "random" SD 1.5's with small random weights and no tokenizer."""
    dtype = devices.DTYPES[precision]
    if base != "random":
        return checkpoint.load(base, device, dtype, tokenizer)
    with torch.device("meta"):
        all_three = UNet(), VAE(), CLIPTextEncoder()
    for network, kind in zip(all_three, (dtype, torch.float32, dtype)):
        network.to(kind).to_empty(device=device).eval().requires_grad_(False)
        for key, parameter in network.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.02)
            else:
                parameter.fill_(float(key.endswith("weight")))
    return StableDiffusion(*all_three, None, base)


def hasten(args, device: torch.device, sd: StableDiffusion) -> None:
    """The faster layers, as the scripts use them on a CPU unless told --plain."""
    if device.type == "cpu" and not args.plain:
        fast.use(sd.unet, sd.text_encoder, sd.vae, memory_gib=args.memory_gib)


def training_step(args, device: torch.device) -> Callable[[], dict[str, float]]:
    """A function that runs one step of train_lora.py's loop: draws, latents, noise, U-Net, backward, clip and AdamW.

    One fence a step; with `args.parts` one after the gradient too.
    """
    sd = networks(args.base, device, args.precision, args.tokenizer)
    g = torch.Generator().manual_seed(0)
    trained = [sd.unet] + ([sd.text_encoder] if args.phase == 2 else [])
    for network in trained:
        layers.inject(network, layers.target_paths(network, "attention"), args.rank, args.rank, g)
    hasten(args, device, sd)
    parameters = [p for network in trained for p in layers.lora_parameters(network)]
    optimizer = adamw([{"params": parameters}], 3e-5, 0.01)
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    model = Denoiser(sd.unet, sd.text_encoder)
    side, count = args.resolution // 8, args.batch_size
    shape = (count, 4, side, side)
    mean, logvar = torch.randn(shape, generator=g).to(device), torch.full(shape, -6.0, device=device)
    text = {"context": None, "token_ids": None}
    if args.phase == 2:
        text["token_ids"] = torch.randint(sd.text_encoder.config.vocab_size, (count, 77), generator=g).to(device)
    else:
        text["context"] = torch.randn(count, 77, sd.unet.config.cross_attention_dim, generator=g).to(device, sd.unet.conv_in.weight.dtype)
    steps = 0

    def step() -> dict[str, float]:
        nonlocal steps
        clock = Clock(device)
        draws = draw_step(0, steps, shape, caption_dropout=0.1)
        backward(model, Batch(mean, logvar, draws.to(device), **text), sd.latent_scale, scaler, precision=args.precision)
        if args.parts:
            clock.lap("gradient_ms")
        update(optimizer, scaler, parameters, 1.0)
        clock.lap("update_ms" if args.parts else "step_ms")
        steps += 1
        return clock.total()
    return step


def generation(args, device: torch.device) -> Callable[[], dict[str, float]]:
    """A function that draws one batch as generate.py does: text, `--steps` DDIM steps with guidance, decoding."""
    sd = networks(args.base, device, args.precision, args.tokenizer)
    hasten(args, device, sd)
    token_ids = torch.randint(sd.text_encoder.config.vocab_size, (args.batch_size, 77)).to(device)

    @torch.no_grad()
    def step() -> dict[str, float]:
        clock = Clock(device)
        context = sd.text_encoder(torch.cat([token_ids, token_ids]))
        clock.lap("text_ms")
        latents = pipeline.draw(sd, *context.chunk(2), list(range(args.batch_size)), args.resolution, steps=args.steps)
        clock.lap("unet_ms")
        pipeline.decode(sd, latents)
        clock.lap("decode_ms")
        return clock.total()
    return step


def encoding(args, device: torch.device) -> Callable[[], dict[str, float]]:
    """A function that encodes one batch of tiles as the latent cache does."""
    sd = networks(args.base, device, args.precision, args.tokenizer)
    hasten(args, device, sd)
    pixels = torch.rand(args.batch_size, 3, args.resolution, args.resolution, device=device) * 2 - 1

    @torch.no_grad()
    def step() -> dict[str, float]:
        clock = Clock(device)
        sd.vae.encode(pixels)
        clock.lap("encode_ms")
        return clock.total()
    return step
