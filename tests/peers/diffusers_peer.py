"""The other side of `python -m lesion bench ... --peer`: diffusers' networks with peft's LoRA.

    train     diffusers            latents and text cached; in phase 2 the text encoder is trained too
              diffusers-example    text and VAE in every step, as diffusers' own example script does
    generate  diffusers            LoRA layers unmerged;  diffusers-merged: folded into the weights
    encode    diffusers            the autoencoder's encoder

Needs requirements-dev.txt. Takes the bench's flags; runs a step for each line of standard input (lesion.bench.measure.serve).
bf16 and fp16 are autocast over fp32 weights, as in diffusers' own example. Not a test: nothing here is collected.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import CLIPTextConfig, CLIPTextModel  # noqa: E402

from lesion.bench import measure  # noqa: E402
from lesion.bench.sides import Clock  # noqa: E402
from lesion.run import devices  # noqa: E402

CROSS = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
UNET = dict(block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8, layers_per_block=2,
            down_block_types=CROSS, up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3)
VAE = dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2, down_block_types=("DownEncoderBlock2D",) * 4,
           up_block_types=("UpDecoderBlock2D",) * 4)
TEXT = dict(vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
            max_position_embeddings=77, hidden_act="quick_gelu")
SCHEDULE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def network(kind, name, make, args, device):
    """A frozen network of the checkpoint, or with SD 1.5's sizes and random weights."""
    if args.base != "random":
        return kind.from_pretrained(Path(args.base) / name).to(device).requires_grad_(False)
    with torch.device("meta"):
        model = make()
    model.to_empty(device=device)
    for key, parameter in [*model.named_parameters(), *model.named_buffers()]:
        if not parameter.is_floating_point():
            parameter.data.copy_(torch.arange(parameter.numel()).view(parameter.shape))
        elif parameter.ndim > 1:
            parameter.data.normal_(std=0.02)
        else:
            parameter.data.fill_(float(key.endswith("weight")))
    return model.requires_grad_(False)


def unet_of(args, device):
    return network(UNet2DConditionModel, "unet", lambda: UNet2DConditionModel(**UNET), args, device)


def vae_of(args, device):
    return network(AutoencoderKL, "vae", lambda: AutoencoderKL(**VAE), args, device)


def text_of(args, device):
    return network(CLIPTextModel, "text_encoder", lambda: CLIPTextModel(CLIPTextConfig(**TEXT)), args, device)


def with_lora(model, args, targets):
    return get_peft_model(model, LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=targets))


def training(args, device):
    """A step on cached latents and, in phase 1, cached text; the example's with both computed anew."""
    example = args.peer == "diffusers-example"
    unet = with_lora(unet_of(args, device), args, ["to_q", "to_k", "to_v", "to_out.0"])
    text = text_of(args, device) if example or args.phase == 2 else None
    vae = vae_of(args, device) if example else None
    if args.phase == 2:
        text = with_lora(text, args, ["q_proj", "k_proj", "v_proj", "out_proj"])
    parameters = [p for model in (unet, text) if model is not None for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=3e-5)
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    scheduler = DDPMScheduler(**SCHEDULE)
    side, count = args.resolution // 8, args.batch_size
    cached = torch.randn(count, 4, side, side, device=device) * 0.18215
    pixels = torch.rand(count, 3, args.resolution, args.resolution, device=device) * 2 - 1
    context = torch.randn(count, 77, unet.config.cross_attention_dim, device=device)
    vocabulary = text.config.vocab_size if text is not None else 2
    token_ids = torch.randint(vocabulary, (count, 77), device=device)

    def step():
        clock = Clock(device)
        with devices.autocast(device, args.precision):
            latents, states = cached, context
            if vae is not None:
                with torch.no_grad():
                    latents = vae.encode(pixels).latent_dist.sample() * 0.18215
            if text is not None:
                with torch.set_grad_enabled(args.phase == 2):
                    states = text(token_ids).last_hidden_state
            noise = torch.randn_like(latents)
            timesteps = torch.randint(0, 1000, (count,), device=device)
            noisy = scheduler.add_noise(latents, noise, timesteps)
            loss = torch.nn.functional.mse_loss(unet(noisy, timesteps, states).sample.float(), noise.float())
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
    unet = with_lora(unet_of(args, device), args, ["to_q", "to_k", "to_v", "to_out.0"])
    if args.peer == "diffusers-merged":
        unet = unet.merge_and_unload()
    unet = unet.to(devices.DTYPES[args.precision]).requires_grad_(False)
    scheduler = DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    side, count = args.resolution // 8, args.batch_size
    context = torch.randn(2 * count, 77, unet.config.cross_attention_dim, device=device).to(unet.dtype)

    @torch.no_grad()
    def step():
        clock = Clock(device)
        x = torch.randn(count, 4, side, side, device=device, dtype=unet.dtype)
        scheduler.set_timesteps(args.steps)
        for t in scheduler.timesteps:
            uncond, cond = unet(torch.cat([x, x]), t, context).sample.chunk(2)
            x = scheduler.step(uncond + 7.5 * (cond - uncond), t, x).prev_sample
        clock.lap("unet_ms")
        return clock.total()
    return step


def encoding(args, device):
    """The autoencoder's encoder on a batch."""
    vae = vae_of(args, device)
    pixels = torch.rand(args.batch_size, 3, args.resolution, args.resolution, device=device) * 2 - 1

    @torch.no_grad()
    def step():
        clock = Clock(device)
        vae.encode(pixels)
        clock.lap("encode_ms")
        return clock.total()
    return step


if __name__ == "__main__":
    (arguments,) = measure.sweep(measure.parse(sys.argv[1:]))
    where = devices.device(arguments.device)
    measure.serve({"train": training, "generate": generation, "encode": encoding}[arguments.what](arguments, where))
