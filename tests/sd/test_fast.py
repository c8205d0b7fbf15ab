"""lesion.sd.fast: the same numbers as the plain networks, whatever the shapes, the order of calls, and what the machine lacks."""
import contextlib
import copy
import types

import pytest
import torch
from torch import nn

from lesion.lora import layers
from lesion.sd import blocks, checkpoint, fast, pipeline

TOLERANCE = 1e-5  # relative, float32


@pytest.fixture(autouse=True)
def small_networks_too(monkeypatch):
    """The tiny networks of these tests are below the size from which packing pays."""
    monkeypatch.setattr(fast, "SMALL", 0)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def distance(one, other):
    return ((one.double() - other.double()).norm() / other.double().norm()).item()


def networks(tiny, dtype=torch.float32, targets="attention"):
    """The tiny networks with LoRA on both, every factor random."""
    sd = checkpoint.load(tiny / "folder", dtype=dtype)
    for network in (sd.unet, sd.text_encoder) if targets else ():
        layers.inject(network, layers.target_paths(network, targets), 4, 6.0, generator(5))
        for layer in layers.lora_layers(network).values():
            nn.init.normal_(layer.lora_up.weight, std=0.1, generator=generator(6))
    return sd


def inputs(batch=3, side=16, seed=3):
    g = generator(seed)
    return torch.randn(batch, 4, side, side, generator=g), torch.arange(batch) * 300 + 17, torch.randint(49408, (batch, 77), generator=g)


def step(sd, batch=3, side=16, seed=3):
    """{"noise_pred": output, "<path>.down": gradient, ...} of one training step over both networks."""
    x, timesteps, token_ids = inputs(batch, side, seed)
    dtype = sd.unet.conv_in.weight.dtype
    half, x = dtype == torch.bfloat16, x.to(torch.promote_types(dtype, torch.float32))
    with torch.autocast("cpu", torch.bfloat16) if half else contextlib.nullcontext():
        noise_pred = sd.unet(x, timesteps, sd.text_encoder(token_ids))
    noise_pred.float().square().mean().backward()
    found = {"noise_pred": noise_pred.detach()}
    for name, network in (("unet", sd.unet), ("text_encoder", sd.text_encoder)):
        for path, layer in layers.lora_layers(network).items():
            for factor in ("lora_down", "lora_up"):
                parameter = getattr(layer, factor).weight
                found[f"{name}.{path}.{factor}"], parameter.grad = parameter.grad, None
    return found


def apart(one, other):
    """The larger of two relative distances: of the noise predictions, and of all LoRA gradients as one vector."""
    assert one.keys() == other.keys()
    whole = [torch.cat([step[key].flatten() for key in other if key != "noise_pred"]) for step in (one, other)]
    return max(distance(one["noise_pred"], other["noise_pred"]), distance(*whole))


def in_float64(tiny, targets="attention", **shape):
    """The plain step in double precision: the yardstick for every single gradient, small ones included."""
    sd = networks(tiny, targets=targets)
    for network in (sd.unet, sd.text_encoder):
        network.double()
    return step(sd, **shape)


def within_rounding(found, plain, exact):
    """No tensor is further from double precision's than float32 rounding takes the plain step's (5x; its largest counts)."""
    rounding = max(distance(plain[key], exact[key]) for key in exact)
    assert rounding < 1e-4
    for key in exact:
        assert distance(found[key], exact[key]) < 5 * rounding, key


@pytest.fixture(scope="module", params=["attention", "all"])
def reference(request, tiny):
    return request.param, step(networks(tiny, targets=request.param))


@pytest.mark.parametrize("spare_gib", [None, 0.0], ids=["packed", "no memory to pack"])
def test_training_step_equals_plain(tiny, reference, spare_gib):
    """Noise prediction and LoRA gradient of both networks, linear and 1x1 convolution, packed or not, within 1e-5; and every single
    gradient, however small, is within rounding of double precision's."""
    targets, expected = reference
    sd = networks(tiny, targets=targets)
    fast.use(sd.unet, sd.text_encoder, spare_gib=spare_gib)
    found = step(sd)
    assert apart(found, expected) < TOLERANCE
    within_rounding(found, expected, in_float64(tiny, targets))


@pytest.mark.parametrize(("batch", "side"), [(1, 16), (5, 24), (2, 32)])
def test_other_shapes(tiny, batch, side):
    """Odd batches, maps that are not powers of two, and one network used at several sizes in turn."""
    plain, sd = networks(tiny), networks(tiny)
    fast.use(sd.unet, sd.text_encoder)
    step(sd, 2, 16)
    within_rounding(step(sd, batch, side), step(plain, batch, side), in_float64(tiny, batch=batch, side=side))


@torch.no_grad()
def test_encoder_and_decoder_equal_plain(tiny):
    """The VAE both ways and the text encoder without LoRA; the VAE's right-and-bottom padding survives."""
    sd, g = networks(tiny, targets=None), generator(1)
    pixels, latents, token_ids = torch.randn(3, 3, 32, 32, generator=g), torch.randn(3, 4, 4, 4, generator=g), inputs()[2]
    expected = *sd.vae.encode(pixels), sd.vae.decode(latents), sd.text_encoder(token_ids)
    fast.use(sd.vae, sd.text_encoder)
    found = *sd.vae.encode(pixels), sd.vae.decode(latents), sd.text_encoder(token_ids)
    for one, other in zip(found, expected):
        assert distance(one, other) < TOLERANCE


@pytest.mark.parametrize("targets", ["attention", "all"])
def test_bf16_is_no_further_from_fp32_than_stock(tiny, targets):
    """In bf16 output and gradients differ from double precision's by no more than the plain network's under autocast do.

    Over four draws: which single gradient is worst is luck (either path's worst is up to twice the other's), their distribution is not.
    """
    stock, sd = networks(tiny, torch.bfloat16, targets), networks(tiny, torch.bfloat16, targets)
    fast.use(sd.unet, sd.text_encoder)
    errors: tuple[list, list] = ([], [])
    for seed in range(4):
        exact, found = in_float64(tiny, targets, seed=seed), step(sd, seed=seed)
        for one, kept in ((found, errors[0]), (step(stock, seed=seed), errors[1])):
            kept.append([distance(one["noise_pred"], exact["noise_pred"]), apart(one, exact),
                         *(distance(one[key], exact[key]) for key in exact)])
    ours, theirs = (torch.tensor(kept) for kept in errors)
    assert ours[:, 0].mean() < 1.1 * theirs[:, 0].mean()
    assert ours[:, 1].mean() < 1.1 * theirs[:, 1].mean()
    for share in (0.5, 0.9, 0.98):
        assert ours[:, 2:].quantile(share) < 1.15 * theirs[:, 2:].quantile(share), share
    assert {value.dtype for key, value in found.items() if key != "noise_pred"} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_repeats_are_byte_identical(tiny, dtype):
    """Two networks, one used at other sizes and for drawing before: the same bytes, so a resumed run repeats an uninterrupted one."""
    one, other = networks(tiny, dtype), networks(tiny, dtype)
    for sd in (one, other):
        fast.use(sd.unet, sd.text_encoder)
    step(other, 1, 32)
    with torch.no_grad():
        other.unet(inputs(6)[0], inputs(6)[1], other.text_encoder(inputs(6)[2]))
    first, second = step(one), step(other)
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("missing", ["removed", "raises", "wrong answer"])
@pytest.mark.parametrize("operator", ["_reorder_linear_weight", "_linear_pointwise", "_reorder_convolution_weight",
                                      "_convolution_pointwise"])
def test_a_torch_without_the_operators(tiny, reference, monkeypatch, operator, missing):
    """Where an operator is gone, raises or computes something else, the plain one stands in and the numbers stay."""
    targets, expected = reference
    real = torch.ops.mkldnn
    names = ("_reorder_linear_weight", "_linear_pointwise", "_reorder_convolution_weight", "_convolution_pointwise")
    fakes = {name: getattr(real, name) for name in names if hasattr(real, name)}

    def broken(*args):
        if missing == "raises":
            raise RuntimeError("not in this build")
        return args[0] * 0 + 1 if "reorder" in operator else fakes[operator].default(*args) * 1.5
    broken.default = broken
    del fakes[operator]
    if missing != "removed":
        fakes[operator] = broken
    monkeypatch.setattr(torch.ops, "mkldnn", types.SimpleNamespace(**fakes))
    fast.packs.cache_clear()
    try:
        sd = networks(tiny, targets=targets)
        fast.use(sd.unet, sd.text_encoder)
        assert not fast.packs("linear" if "linear" in operator else "convolution", torch.float32)
        assert apart(step(sd), expected) < TOLERANCE
    finally:
        fast.packs.cache_clear()


def test_bf16_is_fast_without_torch_s_questions(monkeypatch):
    """Without torch's own answer the processor's flags decide; a bool either way."""
    assert fast.bf16_is_fast() in (True, False)
    for flags, expected in (("flags : avx512f avx512_bf16", True), ("flags : amx_bf16", True), ("flags : avx2", False)):
        monkeypatch.setattr(torch.ops, "mkldnn", types.SimpleNamespace())
        monkeypatch.setattr(fast.Path, "read_text", lambda self, text=flags, **_: text)
        monkeypatch.setattr(fast.Path, "is_file", lambda self: True)
        assert fast.bf16_is_fast() is expected


def test_names_values_and_identity_stay(tiny):
    """state_dict: names, order, shapes, bytes; the parameters are the same objects; nothing of the base got a gradient."""
    sd = networks(tiny)
    before = {key: value.clone() for key, value in sd.unet.state_dict().items()}
    objects = dict(sd.unet.named_parameters())
    fast.use(sd.unet, sd.text_encoder)
    step(sd)
    after = sd.unet.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert all(parameter is objects[key] for key, parameter in sd.unet.named_parameters())
    assert {key.rsplit(".", 2)[1] for key, p in sd.unet.named_parameters() if p.requires_grad} == {"lora_down", "lora_up"}
    assert all(p.grad is None for p in sd.unet.parameters() if not p.requires_grad)


@torch.no_grad()
def test_merging_is_noticed(tiny):
    """Packed forms follow the weight: merged, unmerged, and written to in place, before or after they were packed."""
    plain, sd = networks(tiny, targets="all"), networks(tiny, targets="all")
    fast.use(sd.unet)
    x, timesteps, _ = inputs()
    context = torch.randn(3, 77, sd.unet.config.cross_attention_dim, generator=generator(4))

    def same():
        return distance(sd.unet(x, timesteps, context), plain.unet(x, timesteps, context)) < TOLERANCE
    assert same()
    for change in (layers.merge, layers.unmerge, layers.merge):
        for one in (plain, sd):
            change(one.unet)
        assert same(), change
    for one in (plain, sd):
        one.unet.conv_in.weight.mul_(0.5)
        one.unet.down_blocks[0].downsamplers[0].conv.weight.add_(0.1)
    assert same()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("when", ["before", "after", "twice"])
def test_injection_before_or_after(tiny, when, dtype):
    """LoRA may be injected before `use`, or after it with or without a second call: the numbers are the plain ones."""
    expected = step(networks(tiny, dtype))
    sd = networks(tiny, dtype, targets=None)
    if when != "before":
        fast.use(sd.unet, sd.text_encoder)
    for network in (sd.unet, sd.text_encoder):
        layers.inject(network, layers.target_paths(network, "attention"), 4, 6.0, generator(5))
        for layer in layers.lora_layers(network).values():
            nn.init.normal_(layer.lora_up.weight, std=0.1, generator=generator(6))
    if when != "after":
        fast.use(sd.unet, sd.text_encoder)
    assert apart(step(sd), expected) < (TOLERANCE if dtype == torch.float32 else 0.1)


def test_no_graph_below_the_first_lora_layer(tiny):
    """Where nothing is trained yet no graph is kept: conv_in, the first residual block and the time embedding have no grad_fn."""
    sd = networks(tiny)
    fast.use(sd.unet)
    seen = {}
    for path in ("conv_in", "time_embedding.linear_2", "down_blocks.0.resnets.0.conv2", "down_blocks.0.attentions.0.proj_in",
                 "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"):
        sd.unet.get_submodule(path).register_forward_hook(lambda module, args, out, path=path: seen.update({path: out.requires_grad}))
    x, timesteps, _ = inputs()
    sd.unet(x, timesteps, torch.randn(3, 77, sd.unet.config.cross_attention_dim, generator=generator(4)))
    assert list(seen.values()) == [False, False, False, False, True]


def test_trained_weights_are_left_to_plain_layers(tiny):
    """A weight that wants a gradient gets it: `use` never silently freezes a layer."""
    sd, plain = networks(tiny, targets=None), networks(tiny, targets=None)
    fast.use(sd.unet)
    x, timesteps, _ = inputs()
    context = torch.randn(3, 77, sd.unet.config.cross_attention_dim, generator=generator(4))
    for one in (sd, plain):
        one.unet.requires_grad_(True)
        one.unet(x, timesteps, context).square().mean().backward()
    for (key, parameter), other in zip(sd.unet.named_parameters(), plain.unet.parameters()):
        assert parameter.grad is not None, key
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-3, atol=1e-6, msg=key)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("n", "m"), [(4, 4), (64, 77), (50, 50)])
def test_own_attention(n, m, causal):
    """The hand-written backward is the derivative: float64 gradcheck, and equal to `blocks.attention`, causal mask included."""
    if causal and n != m:
        pytest.skip("a causal mask is square")
    g = generator(2)
    shapes = [(2, n, 6), (2, m, 6), (2, m, 6)]
    query, key, value = (torch.randn(shape, generator=g, dtype=torch.float64, requires_grad=True) for shape in shapes)
    own = fast._Attention.apply(query, key, value, 2, causal)
    torch.testing.assert_close(own, blocks.attention(query, key, value, 2, causal))
    if n <= 50:
        assert torch.autograd.gradcheck(lambda *x: fast._Attention.apply(*x, 2, causal), (query, key, value))


def test_unfolding_and_folding():
    """`cols` against a matrix is the convolution; `uncols` is its transpose: <cols(x), y> = <x, uncols(y)>, strided and padded or not."""
    for kernel, stride, padding, side in ((3, 1, 1, 4), (3, 2, 1, 4), (3, 2, 0, 5), (1, 1, 0, 2)):
        x = torch.randn(2, 5, side, side, generator=generator(1)).contiguous(memory_format=torch.channels_last)
        weight = torch.randn(7, 5, kernel, kernel, generator=generator(2))
        unfolded = fast.cols(x, kernel, stride, padding)
        out = (unfolded @ fast.as_matrix(weight).t()).permute(0, 3, 1, 2)
        torch.testing.assert_close(out, nn.functional.conv2d(x, weight, stride=stride, padding=padding))
        y = torch.randn(unfolded.shape, generator=generator(3))
        torch.testing.assert_close((unfolded * y).sum(), (x * fast.uncols(y, kernel, stride, padding, (side, side))).sum())


@torch.no_grad()
def test_text_is_computed_once_and_follows_the_context(tiny):
    """Inside `same_text` keys and values are computed once a context; another, or one written to, gets its own; outside nothing is kept."""
    sd, plain = networks(tiny), networks(tiny)
    fast.use(sd.unet)
    x, timesteps, _ = inputs()
    width = sd.unet.config.cross_attention_dim
    contexts = [torch.randn(3, 77, width, generator=generator(seed)) for seed in (4, 5)]
    calls = []
    attn = sd.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2
    attn.to_k.register_forward_hook(lambda *_: calls.append(1))

    def same(context):
        return distance(sd.unet(x, timesteps, context), plain.unet(x, timesteps, context)) < TOLERANCE
    with fast.same_text(sd.unet):
        assert same(contexts[0])
        assert same(contexts[0])
        assert len(calls) == 1
        assert same(contexts[1])
        assert same(contexts[0])
        assert len(calls) == 3
        contexts[0].mul_(2)
        assert same(contexts[0])
        assert len(calls) == 4
    assert same(contexts[0])
    assert same(contexts[0])
    assert len(calls) == 6


def test_drawing_equals_plain(tiny):
    """`pipeline.draw` on fast networks with a merged LoRA gives the plain networks' latents."""
    latents = []
    for is_fast in (False, True):
        sd = networks(tiny)
        layers.merge(sd.unet)
        if is_fast:
            fast.use(sd.unet, sd.text_encoder, sd.vae)
        context = torch.randn(2, 77, sd.unet.config.cross_attention_dim, generator=generator(4))
        latents.append(pipeline.draw(sd, context, torch.zeros_like(context), [1, 2], 64, steps=2, guidance_scale=2.0))
    assert distance(latents[1], latents[0]) < 10 * TOLERANCE


def test_copies_and_undoing(tiny):
    """A deep copy of a fast network computes for itself; `plain` gives every layer its own class's forward back."""
    sd = networks(tiny)
    expected = step(sd)
    fast.use(sd.unet, sd.text_encoder)
    step(sd)
    twin = copy.deepcopy(sd.unet)
    with torch.no_grad():
        twin.conv_out.bias.add_(1.0)
    assert twin.conv_out.forward.layer is twin.conv_out
    assert apart(step(sd), expected) < TOLERANCE
    fast.plain(sd.unet, sd.text_encoder)
    assert not [path for path, module in sd.unet.named_modules() if "forward" in module.__dict__]
    assert apart(step(sd), expected) < TOLERANCE


def test_small_networks_keep_their_layers(tiny, monkeypatch):
    """Below SMALL only attention is swapped: there packing gains less than its calls cost."""
    sd = networks(tiny)
    monkeypatch.setattr(fast, "SMALL", 10**5)
    assert "attention only" in fast.use(sd.unet)
    assert {type(module.forward) for module in sd.unet.modules() if "forward" in module.__dict__} == {fast.Attention}


def test_autocast_over_float32_weights(tiny):
    """Where autocast asks for another dtype than the weights', the plain layers obey it."""
    sd, plain = networks(tiny), networks(tiny)
    fast.use(sd.unet)
    x, timesteps, _ = inputs()
    context = torch.randn(3, 77, sd.unet.config.cross_attention_dim, generator=generator(4))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, expected = sd.unet(x, timesteps, context), plain.unet(x, timesteps, context)
    assert found.dtype == expected.dtype == torch.bfloat16
    assert distance(found, expected) < 0.02


def test_memory_is_shared_out_in_order(tiny):
    """Small layers come first, in both directions; with nothing to spare nothing is packed; one that learns nothing packs no gradient."""
    sd = networks(tiny)
    assert "100% forward, 100% backward" in fast.use(sd.unet, spare_gib=1.0)
    assert "0% forward, 0% backward" in fast.use(sd.unet, spare_gib=0.0)
    frozen = [m for m in sd.unet.modules() if isinstance(m, nn.Linear | nn.Conv2d) and not m.weight.requires_grad]
    size = sum(m.weight.numel() * 4 for m in frozen)
    fast.use(sd.unet, spare_gib=size / 2**30)  # as much as one of the two directions takes
    smallest, largest = (f(frozen, key=lambda m: m.weight.numel()).forward for f in (min, max))
    smallest, largest = (one.frozen if isinstance(one, fast.LoRA) else one for one in (smallest, largest))
    assert smallest.packed == {"forward": True, "backward": True}
    assert largest.packed == {"forward": False, "backward": False}
    assert "backward" not in fast.use(networks(tiny, targets=None).unet)
    assert fast.free_bytes() > 0
