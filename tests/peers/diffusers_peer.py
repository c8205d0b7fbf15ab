"""The other side of `python -m lesion bench ... --peer diffusers`: diffusers' U-Net with peft's LoRA, latents and text cached.

Needs requirements-dev.txt. Takes the bench's flags; runs a step for each line of standard input (lesion.bench.measure.serve).
bf16 and fp16 are autocast over fp32 weights, as in diffusers' own example. Not a test: nothing here is collected.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402

from lesion.bench import measure
from lesion.run import devices  # noqa: E402

SIZES = dict(block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8, layers_per_block=2,
             down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3)
SCHEDULE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def network(args, device):
    if args.base != "random":
        return UNet2DConditionModel.from_pretrained(Path(args.base) / "unet").to(device)
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SIZES)
    unet.to_empty(device=device)
    for key, parameter in unet.named_parameters():
        parameter.data.normal_(std=0.02) if parameter.ndim > 1 else parameter.data.fill_(float(key.endswith("weight")))
    return unet


def training(args, device):
    unet = network(args, device).requires_grad_(False)
    unet = get_peft_model(unet, LoraConfig(r=measure.RANK, lora_alpha=measure.RANK, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    parameters = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=3e-5)
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    scheduler = DDPMScheduler(**SCHEDULE)
    side, count = args.resolution // 8, args.batch_size
    latents = torch.randn(count, 4, side, side, device=device) * 0.18215
    context = torch.randn(count, 77, unet.config.cross_attention_dim, device=device)

    def step():
        clock = measure.Clock(device)
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, 1000, (count,), device=device)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        with devices.autocast(device, args.precision):
            loss = torch.nn.functional.mse_loss(unet(noisy, timesteps, context).sample.float(), noise)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        clock.lap("step_ms")
        return clock.total()
    return step


def generation(args, device):
    """The U-Net steps of a batch with guidance (decoding is left out: it is the same convolutions on both sides)."""
    unet = network(args, device).to(devices.DTYPES[args.precision]).requires_grad_(False)
    scheduler = DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    side, count = args.resolution // 8, args.batch_size
    context = torch.randn(2 * count, 77, unet.config.cross_attention_dim, device=device).to(unet.dtype)

    @torch.no_grad()
    def step():
        clock = measure.Clock(device)
        x = torch.randn(count, 4, side, side, device=device, dtype=unet.dtype)
        scheduler.set_timesteps(args.steps)
        for t in scheduler.timesteps:
            uncond, cond = unet(torch.cat([x, x]), t, context).sample.chunk(2)
            x = scheduler.step(uncond + 7.5 * (cond - uncond), t, x).prev_sample
        clock.lap("unet_ms")
        return clock.total()
    return step


if __name__ == "__main__":
    arguments = measure.parse(sys.argv[1:])
    where = devices.device(arguments.device)
    measure.serve({"train": training, "generate": generation}[arguments.what](arguments, where))
