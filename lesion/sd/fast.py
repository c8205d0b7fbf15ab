"""The same networks, faster on a CPU: `use(unet, vae, text_encoder)` swaps how layers compute, never what they hold.

The plain network beside this file stays the definition. Here each frozen layer keeps its weight in the form that the kernel wants:

    linear               y = x W^T + b       W packed once (oneDNN's blocked layout)      dx = dy W, W^T packed too
    convolution          y = W * x + b       W packed once for its map's size             dx = W' * dy, W' flipped and transposed
    the same, map <= 4   y = cols(x) W^T     one matrix product over unfolded pixels      dx = cols(dy) W'^T
    LoRA                 y = x W^T + b + s (x A^T) B^T, s = alpha / rank: one node of the graph instead of eight
    attention            softmax(Q K^T / sqrt d) V, see `attention`

Frozen weights never get a gradient, so below the first trainable layer there is no graph at all. Parameters keep their names, values and
identity: state_dict, injection, merging and hashes see no difference (convolution kernels only change their order in memory).
Every packed form goes through an operator that `packs` has tried on this machine and found right; where it is missing, wrong, or memory is
short, the plain operator stands in. What is chosen depends on shapes, dtype and memory, never on a clock: a resumed run repeats its bits.
Proven by tests/sd/test_fast.py.
"""
import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

UNFOLD_SIDE = 4  # maps up to 4x4 are unfolded: there a convolution is bound by reading its weight, which a matrix product does best
TURNED_ROWS = 64  # unpacked float32 products of up to so many rows are computed as (W x^T)^T: up to twice as fast
SMALL = 10**5  # in * out of a network's largest layer: below (the built-in base), packing gains less than it costs to call
OWN_ATTENTION = 2**20  # largest N * M of the own attention: beyond, its [heads, N, M] probabilities cost more than they save
WEIGHTS_GIB = 6.8  # weights and packed copies together: SD 1.5 in bf16 in both directions, in fp32 in one
SHARE_OF_FREE = 0.5  # and packed copies take no more than this share of the memory that is free


# --------------------------------------------------------------------------------------------------- what this machine has

def bf16_is_fast() -> bool:
    """Whether this processor multiplies bfloat16 matrices in hardware (avx512_bf16 or amx); without, bf16 is slower than float32."""
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and bool(
            torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    except (AttributeError, RuntimeError):
        file = Path("/proc/cpuinfo")
        flags = file.read_text(encoding="utf-8") if file.is_file() else ""
        return "avx512_bf16" in flags or "amx_bf16" in flags


def default_precision(device: torch.device) -> str:
    """What `auto` means: "fp16" on CUDA (the study's setting), "bf16" on a CPU that is quick with it, else "fp32"."""
    return "fp16" if device.type == "cuda" else "bf16" if bf16_is_fast() else "fp32"


def free_bytes() -> int:
    """Memory that a process could still take, within its control group's limit; 2^62 where the system does not say."""
    free = 2**62
    with contextlib.suppress(OSError, ValueError, IndexError):
        free = 1024 * int(Path("/proc/meminfo").read_text(encoding="utf-8").split("MemAvailable:")[1].split()[0])
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit, taken = (int((group / name).read_text(encoding="utf-8")) for name in ("memory.max", "memory.current"))
        free = min(free, limit - taken)
    return free


@functools.cache
def packs(kind: str, dtype: torch.dtype) -> bool:
    """Whether packing a "linear" or "convolution" works here in `dtype`: the operators exist and give the plain answer."""
    x, weight, bias = torch.randn(2, 32, 8, 8), torch.randn(32, 32, 3, 3) / 17, torch.randn(32)
    x, weight, bias = (tensor.to(dtype) for tensor in (x.contiguous(memory_format=torch.channels_last), weight, bias))
    with torch.no_grad():
        try:
            if kind == "linear":
                x, weight = x.permute(0, 2, 3, 1), weight[:, :, 0, 0].contiguous()
                plain, packed = F.linear(x, weight, bias), _packed_linear(weight, bias)(x)
            else:
                plain, packed = F.conv2d(x, weight, bias, padding=1), _packed_convolution(weight, bias, (1, 1), (1, 1), (8, 8))(x)
        except (AttributeError, RuntimeError, TypeError, ValueError):
            return False
    close = 1e-4 if dtype == torch.float32 else 3e-2
    return packed.dtype == dtype and packed.shape == plain.shape and torch.allclose(packed.float(), plain.float(), rtol=close, atol=close)


# ------------------------------------------------------------------------------------------------------------------ forms
# A form is a function x -> y over one weight that is not going to change.

def _packed_linear(weight: Tensor, bias: Tensor | None) -> Callable:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
    run = torch.ops.mkldnn._linear_pointwise.default
    return lambda x: run(x, packed, bias, "none", [], "")


def _packed_convolution(weight: Tensor, bias: Tensor | None, stride, padding, side: tuple[int, int]) -> Callable:
    shape = (4, weight.shape[1], *side)  # the layout does not depend on the batch in any way that matters; a fixed one keeps bits
    packed = torch.ops.mkldnn._reorder_convolution_weight(weight.contiguous(), padding, stride, (1, 1), 1, shape)
    run = torch.ops.mkldnn._convolution_pointwise.default
    return lambda x: run(x, packed, bias, padding, stride, (1, 1), 1, "none", [], "")


def linear_form(weight: Tensor, bias: Tensor | None, pack: bool) -> Callable:
    """x [..., in] -> x W^T + b [..., out]; weight [out,in]."""
    if pack and packs("linear", weight.dtype):
        return _packed_linear(weight, bias)

    def unpacked(x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        if x.dtype != torch.float32 or len(rows) > TURNED_ROWS:
            return F.linear(x, weight, bias)
        more = max(16 - len(rows), 0)  # a product with 4 columns takes three times as long as one with 16
        out = (weight @ F.pad(rows, (0, 0, 0, more)).t()).t()[:len(rows)].contiguous()
        return (out if bias is None else out.add_(bias)).view(*x.shape[:-1], -1)
    return unpacked


def convolution_form(weight: Tensor, bias: Tensor | None, stride, padding, side: tuple[int, int], pack: bool) -> Callable:
    """x [B,C,H,W], channels last -> W * x + b; weight [O,C,k,k]; `side` is (H, W)."""
    kernel = weight.shape[2]
    if kernel == 1 and stride == (1, 1) and padding == (0, 0):
        linear = linear_form(weight[:, :, 0, 0], bias, pack)
        return lambda x: linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    if max(side) <= UNFOLD_SIDE:
        linear = linear_form(as_matrix(weight), bias, pack)
        return lambda x: linear(cols(x, kernel, stride[0], padding[0])).permute(0, 3, 1, 2)
    if pack and packs("convolution", weight.dtype):
        return _packed_convolution(weight, bias, stride, padding, side)
    return lambda x: F.conv2d(x, weight, bias, stride, padding)


def as_matrix(weight: Tensor) -> Tensor:
    """[O,C,k,k] -> [O,k*k*C], the order of `cols`; a view where the kernel lies channels last."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def transposed(weight: Tensor) -> Tensor:
    """[O,C,k,k] -> [C,O,k,k], both flipped: the kernel of a convolution's gradient. By way of one plain transpose, 4x faster."""
    taps = as_matrix(weight).t().contiguous().unflatten(0, (weight[0, 0].numel(), -1)).flip(0)  # [k*k,C,O]
    return taps.permute(1, 2, 0).unflatten(2, weight.shape[2:])


def cols(x: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    """Unfold (im2col): [B,C,H,W], channels last -> [B,h,w,k*k*C], the window under each output pixel."""
    x = F.pad(x.permute(0, 2, 3, 1), (0, 0, padding, padding, padding, padding))
    batch, height, width, channels = x.shape
    b, h, w, c = x.stride()
    rows, columns = (height - kernel) // stride + 1, (width - kernel) // stride + 1
    windows = x.as_strided((batch, rows, columns, kernel, kernel, channels), (b, h * stride, w * stride, h, w, c))
    return windows.reshape(batch, rows, columns, kernel * kernel * channels)


def uncols(grad: Tensor, kernel: int, stride: int, padding: int, side: tuple[int, int]) -> Tensor:
    """The transpose of `cols` (col2im): [B,h,w,k*k*C] -> [B,C,H,W], channels last, each pixel the sum over the windows it is in."""
    batch, rows, columns, _ = grad.shape
    grad = grad.unflatten(3, (kernel, kernel, -1))
    out = grad.new_zeros(batch, side[0] + 2 * padding, side[1] + 2 * padding, grad.shape[-1])
    for i in range(kernel):
        for j in range(kernel):
            out[:, i:i + stride * (rows - 1) + 1:stride, j:j + stride * (columns - 1) + 1:stride] += grad[:, :, :, i, j]
    return out[:, padding:padding + side[0], padding:padding + side[1]].permute(0, 3, 1, 2)


# ----------------------------------------------------------------------------------------------------------------- layers

def _plainly(weight: Tensor) -> bool:
    """Whether a layer's own class has to compute: the weight is trained, is not on the CPU, or autocast wants another dtype than its."""
    return weight.requires_grad or weight.device.type != "cpu" or (
        torch.is_autocast_enabled("cpu") and weight.dtype != torch.get_autocast_dtype("cpu"))


class Frozen:
    """A linear or convolution with a weight that is not trained: y = layer(x), and x's gradient, never the weight's.

    Forms are made at first use, and anew when the weight has become another tensor or has been written to (merging a LoRA).
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d):
        self.layer = layer
        self.packed = {"forward": True, "backward": True}
        self.forms: dict[str, Callable] = {}
        self.made_of: Tensor | None = None  # keeps that memory taken, so that its address means this tensor and no other

    def __getstate__(self) -> dict:
        return {**self.__dict__, "forms": {}, "made_of": None}  # packed tensors cannot be copied or pickled; they come again

    def __call__(self, x: Tensor) -> Tensor:
        layer, weight = self.layer, self.layer.weight
        if _plainly(weight):
            return F.linear(x, weight, layer.bias) if isinstance(layer, nn.Linear) else nn.Conv2d.forward(layer, x)
        x = x.to(weight.dtype)
        return _Frozen.apply(x, self) if torch.is_grad_enabled() and x.requires_grad else self.output(x)

    def pack(self, direction: str, wanted: bool) -> None:
        """Whether the form of one direction may take memory of its own."""
        if self.packed[direction] != wanted:
            self.packed[direction] = wanted
            self.forms.pop(direction, None)

    def form(self, direction: str, side: tuple[int, ...]) -> Callable:
        """The form for maps of `side`, () for a linear; directions: "forward", "backward"."""
        weight, bias = self.layer.weight, self.layer.bias
        if self.made_of is None or self.made_of.data_ptr() != weight.data_ptr() or self.written_at != (weight._version, side):
            self.forms, self.made_of, self.written_at = {}, weight.detach(), (weight._version, side)
        if direction not in self.forms:
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                self.forms[direction] = getattr(self, f"_{direction}")(weight.detach(), None if bias is None else bias.detach(), side)
        return self.forms[direction]

    def output(self, x: Tensor) -> Tensor:
        if isinstance(self.layer, nn.Linear):
            return self.form("forward", ())(x)
        return self.form("forward", tuple(x.shape[2:]))(x.contiguous(memory_format=torch.channels_last))

    def input_grad(self, grad: Tensor, side: tuple[int, ...]) -> Tensor:
        if side:
            grad = grad.contiguous(memory_format=torch.channels_last)
        return self.form("backward", side)(grad)

    def _forward(self, weight: Tensor, bias: Tensor | None, side: tuple[int, ...]) -> Callable:
        if not side:
            return linear_form(weight, bias, self.packed["forward"])
        return convolution_form(weight, bias, self.layer.stride, self.layer.padding, side, self.packed["forward"])

    def _backward(self, weight: Tensor, bias: Tensor | None, side: tuple[int, ...]) -> Callable:
        if not side:
            return linear_form(weight.t(), None, self.packed["backward"])
        kernel, stride, padding = weight.shape[2], self.layer.stride, self.layer.padding
        if stride == (1, 1) and (self.packed["backward"] or kernel == 1):  # the transpose of a convolution is one with the flipped kernel
            return convolution_form(transposed(weight), None, stride, (kernel - 1 - padding[0],) * 2, side, self.packed["backward"])
        if max(side) <= 2 * UNFOLD_SIDE:
            matrix = as_matrix(weight)
            product = linear_form(matrix.t(), None, self.packed["backward"])
            return lambda grad: uncols(product(grad.permute(0, 2, 3, 1)), kernel, stride[0], padding[0], side)

        def plain(grad: Tensor) -> Tensor:
            x = grad.new_empty(1).expand(len(grad), weight.shape[1], *side)  # its values are not needed, only its shape
            return torch.ops.aten.convolution_backward(grad, x, weight, None, stride, padding, (1, 1), False, (0, 0), 1,
                                                       (True, False, False))[0]
        return plain


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, frozen: Frozen) -> Tensor:
        ctx.frozen, ctx.side = frozen, tuple(x.shape[2:]) if isinstance(frozen.layer, nn.Conv2d) else ()
        return frozen.output(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return ctx.frozen.input_grad(grad, ctx.side), None


class LoRA:
    """A LoRA layer, known by its `lora_down`, `lora_up`, `scale` and `merged_from`: linear or 1x1 convolution.

    y = f(x) + s (x A^T) B^T with f the frozen layer; A, B float32, cast to the activations' dtype as autocast would; their gradients,
    dB = s dy^T (x A^T) and dA = s (dy B)^T x, are float32 again. One node of the graph, and dx is summed in place.
    """

    def __init__(self, layer: nn.Module, frozen: Frozen):
        self.layer, self.frozen = layer, frozen

    def __call__(self, x: Tensor) -> Tensor:
        layer, weight = self.layer, self.layer.weight
        if _plainly(weight):
            return type(layer).forward(layer, x)
        if layer.merged_from is not None:
            return self.frozen(x)
        down, up = layer.lora_down.weight, layer.lora_up.weight
        x = x.to(weight.dtype)
        if x.ndim == 3:
            return _LoRA.apply(x, down, up, layer.scale, self.frozen)
        x = x.permute(0, 2, 3, 1)
        return _LoRA.apply(x, down[:, :, 0, 0], up[:, :, 0, 0], layer.scale, self.frozen).permute(0, 3, 1, 2)


class _LoRA(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, down: Tensor, up: Tensor, scale: float, frozen: Frozen) -> Tensor:
        ctx.frozen, ctx.scale = frozen, scale
        linear = frozen.layer.weight.ndim == 2
        out = frozen.output(x) if linear else frozen.output(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        down, up = down.to(x.dtype), up.to(x.dtype)
        low = x.flatten(0, -2) @ down.t()
        out.view(-1, out.shape[-1]).addmm_(low, up.t(), alpha=scale)
        ctx.save_for_backward(x, low, down, up)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, low, down, up = ctx.saved_tensors
        grad = grad.contiguous()
        rows = grad.flatten(0, -2)
        through = (rows @ up).mul_(ctx.scale)
        grad_down = (through.t() @ x.flatten(0, -2)).float()
        grad_up = (rows.t() @ low).float().mul_(ctx.scale)
        grad_x = None
        if ctx.needs_input_grad[0]:
            if ctx.frozen.layer.weight.ndim == 2:
                grad_x = ctx.frozen.input_grad(grad, ())
            else:
                grad_x = ctx.frozen.input_grad(grad.permute(0, 3, 1, 2), tuple(grad.shape[1:3])).permute(0, 2, 3, 1)
            grad_x.view(-1, grad_x.shape[-1]).addmm_(through, down)
        return grad_x, grad_down, grad_up, None, None


# -------------------------------------------------------------------------------------------------------------- attention

def attention(query: Tensor, key: Tensor, value: Tensor, heads: int, causal: bool = False) -> Tensor:
    """`blocks.attention` by the faster way. [B,N,heads*d], [B,M,heads*d] twice -> [B,N,heads*d].

    Measured, forward and backward together, time of scaled_dot_product_attention over the own one (two threads, 8 heads, N = M):
                 N = 16    64   256  1024  4096        (M = 77 instead: 16    64   256  1024  4096)
        float32    0.6   0.7   0.8   0.8   0.4                         0.6   0.8   0.8   1.0   1.1
        bfloat16    12    12     6   1.3   1.4                         6.3   9.4   9.9   3.8   4.1
    Forward alone SDPA is ahead everywhere. So: own where a bfloat16 gradient is wanted and its N * M probabilities are few, else SDPA.
    """
    wanted = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    if wanted and query.dtype == torch.bfloat16 and query.shape[1] * key.shape[1] <= OWN_ATTENTION:
        return _Attention.apply(query, key, value, heads, causal)
    query, key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))  # [B,heads,N,d]
    return F.scaled_dot_product_attention(query, key, value, is_causal=causal).transpose(1, 2).flatten(2)


class _Attention(torch.autograd.Function):
    """P = softmax(Q K^T / sqrt d), O = P V; dV = P^T dO, dS = P * (dP - sum(dP * P)) with dP = dO V^T, dQ = dS K / sqrt d, dK likewise."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, heads: int, causal: bool) -> Tensor:
        query, key, value = (_split(x, heads) for x in (query, key, value))  # [B*heads,N,d]
        ctx.heads, ctx.scale = heads, query.shape[-1] ** -0.5
        scores = (query * ctx.scale).bmm(key.transpose(1, 2))
        if causal:
            scores.masked_fill_(torch.ones(scores.shape[1:], dtype=torch.bool).triu_(1), float("-inf"))
        weights = torch.softmax(scores, -1)
        ctx.save_for_backward(query, key, value, weights)
        return _join(weights.bmm(value), heads)

    @staticmethod
    def backward(ctx, grad: Tensor):
        query, key, value, weights = ctx.saved_tensors
        grad = _split(grad, ctx.heads)
        grad_value = weights.transpose(1, 2).bmm(grad) if ctx.needs_input_grad[2] else None
        grad_scores = torch.ops.aten._softmax_backward_data(grad.bmm(value.transpose(1, 2)), weights, -1, weights.dtype).mul_(ctx.scale)
        grad_query = grad_scores.bmm(key) if ctx.needs_input_grad[0] else None
        grad_key = grad_scores.transpose(1, 2).bmm(query) if ctx.needs_input_grad[1] else None
        return *(None if x is None else _join(x, ctx.heads) for x in (grad_query, grad_key, grad_value)), None, None


def _split(x: Tensor, heads: int) -> Tensor:
    """[B,N,heads*d] -> [B*heads,N,d]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2).flatten(0, 1)


def _join(x: Tensor, heads: int) -> Tensor:
    """[B*heads,N,d] -> [B,N,heads*d]."""
    return x.unflatten(0, (-1, heads)).transpose(1, 2).flatten(2)


class Attention:
    """An attention layer of the U-Net, by `attention`; inside `same_text` keys and values of a context are computed once."""

    def __init__(self, layer: nn.Module):
        self.layer = layer
        self.kept: list | None = None  # inside `same_text`: [] or [context, its version, key, value]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "kept": None}

    def __call__(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        key, value = self.keys_and_values(x if context is None else context, keep=context is not None)
        return self.layer.to_out[0](attention(self.layer.to_q(x), key, value, self.layer.heads))

    def keys_and_values(self, context: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
        if self.kept is None or not keep or torch.is_grad_enabled():
            return self.layer.to_k(context), self.layer.to_v(context)
        if not self.kept or self.kept[0] is not context or self.kept[1] != context._version:
            self.kept = [context, context._version, self.layer.to_k(context), self.layer.to_v(context)]
        return self.kept[2], self.kept[3]


@contextlib.contextmanager
def same_text(network: nn.Module) -> Iterator[None]:
    """Inside, the text's keys and values are kept from one denoising step to the next: for drawing, while no weight changes.

    They belong to one context tensor (that object, not written to since); another gets its own. Nothing for a plain network.
    """
    fast = [module.__dict__["forward"] for module in network.modules() if isinstance(module.__dict__.get("forward"), Attention)]
    for layer in fast:
        layer.kept = []
    try:
        yield
    finally:
        for layer in fast:
            layer.kept = None


# ------------------------------------------------------------------------------------------------------------ in one call

def use(*networks: nn.Module, memory_gib: float | None = None, spare_gib: float | None = None) -> str:
    """Make loaded, frozen networks on the CPU fast, in place; returns in a few words what was chosen. Call it again after injecting LoRA.

    memory_gib: for weights and packed copies together (default WEIGHTS_GIB); packed copies take no more than SHARE_OF_FREE of what is free
    either. spare_gib: for packed copies alone, instead of both.
    Gradients' forms are for a network with something to train. Small layers come first: they see the largest maps and gain most a byte.
    Forgetting the second call costs speed only: an injected layer computes plainly until then. `plain` undoes it.
    """
    layers = [(layer, any(p.requires_grad for p in network.parameters())) for network in networks for layer in _layers(network)]
    frozen, sizes = [_freeze(layer) for layer, _ in layers], [layer.weight.numel() * layer.weight.element_size() for layer, _ in layers]
    spare = spare_gib * 2**30 if spare_gib is not None else \
        min((memory_gib or WEIGHTS_GIB) * 2**30 - sum(sizes), SHARE_OF_FREE * free_bytes())
    packed, wanted = {"forward": 0, "backward": 0}, {"forward": 0, "backward": 0}
    for size, one, trained in sorted(zip(sizes, frozen, (trained for _, trained in layers)), key=lambda each: each[0]):
        for direction in packed:
            needed = trained or direction == "forward"
            fits = needed and sum(packed.values()) + size <= spare
            one.pack(direction, fits)
            packed[direction], wanted[direction] = packed[direction] + size * fits, wanted[direction] + size * needed
    shares = [f"{packed[direction] / wanted[direction]:.0%} {direction}" for direction in packed if wanted[direction]]
    for network in networks:
        for module in network.modules():
            if all(hasattr(module, name) for name in ("to_q", "to_k", "to_v", "to_out", "heads")):
                module.forward = Attention(module)
    kinds = sorted({str(layer.weight.dtype).removeprefix("torch.") for layer, _ in layers})
    return f"fast CPU layers: {len(layers)} in {', '.join(kinds)}, packed {', '.join(shares)}" if layers else "fast CPU attention only"


def plain(*networks: nn.Module) -> None:
    """Undo `use`: every layer computes by its own class again."""
    for network in networks:
        for module in network.modules():
            if isinstance(module.__dict__.get("forward"), Frozen | LoRA | Attention):
                del module.forward


def _layers(network: nn.Module) -> list[nn.Linear | nn.Conv2d]:
    """The network's frozen linears and convolutions on the CPU; none of a small network, where PyTorch's own are as fast."""
    layers = [module for module in network.modules() if isinstance(module, nn.Linear | nn.Conv2d)
              and module.weight.device.type == "cpu" and not module.weight.requires_grad]
    return layers if max((layer.weight.shape[0] * layer.weight.shape[1] for layer in layers), default=0) >= SMALL else []


def _freeze(layer: nn.Linear | nn.Conv2d) -> Frozen:
    """Give `layer` its fast way to compute, kept if it has one; returns the Frozen in it."""
    known = layer.__dict__.get("forward")
    frozen = known.frozen if isinstance(known, LoRA) else known if isinstance(known, Frozen) else Frozen(layer)
    if isinstance(layer, nn.Conv2d) and max(layer.kernel_size) > 1:
        layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)  # the order in which pixels are unfolded
    lora = hasattr(layer, "lora_down")
    if not lora or max(getattr(layer, "kernel_size", (1,))) == 1:
        layer.forward = LoRA(layer, frozen) if lora else frozen
    return frozen
