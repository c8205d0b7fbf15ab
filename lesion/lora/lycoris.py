"""LoHa, LoKr, CP-decomposed LoCon and DoRA, each turned into the plain factors that it equals.

Sources: LoHa arXiv:2108.06098 (FedPara), LoKr and LyCORIS arXiv:2309.14859, DoRA arXiv:2402.09353 eq. 5; axes and scales
are those of LyCORIS' modules and of peft's, and where these two differ it is said. Proven by tests/parity/test_lora_kinds.py.
"""
import torch
from torch import Tensor, nn

from lesion.lora.layers import Factors

MOST_TAPS = 49  # of a kernel: 7x7
LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


def dense(delta: Tensor) -> Factors:
    """A full update, shaped like the weight, as factors of which one is the identity: exact; rank min(out, in) at most."""
    out, inside = delta.shape[0], delta[0].numel()
    if delta.ndim == 2 and inside < out:
        return Factors(torch.eye(inside), delta, float(inside))
    up = torch.eye(out)
    return Factors(delta, up if delta.ndim == 2 else up[:, :, None, None], float(out))


def full(factors: Factors) -> Tensor:
    """(alpha / r) up down, shaped like the weight, float32."""
    up, down = factors.up.flatten(1), factors.down
    return factors.alpha / len(down) * (up @ down.flatten(1)).unflatten(1, down.shape[1:])


def need(fits: bool) -> None:
    """RuntimeError, as torch's own of shapes, before a product that would fill the memory."""
    if not fits:
        raise RuntimeError("shapes that do not make the weight")


def cp(down: Tensor, mid: Tensor) -> Tensor:
    """LoCon's CP-decomposed convolution as one `down` [p,in,kh,kw]: sum_j mid[p,j,kh,kw] down[j,in]."""
    return torch.einsum("pjkl,ji->pikl", mid, down.flatten(1))


def loha(parts: dict[str, Tensor], shape: torch.Size, alpha: float | None) -> Factors:
    """(alpha / r) (w1_a w1_b) * (w2_a w2_b), the product element by element; `shape` is the weight's. alpha None means
    r.

    w_a [out,r], w_b [r,in kh kw]. With hada_t1 and hada_t2 [r,r,kh,kw] (CP) w_a is [r,out], w_b [r,in].
    """
    w1_a, w1_b, w2_a, w2_b = (parts[name] for name in LOHA)
    rank = len(w1_b)
    scale = 1.0 if alpha is None else alpha / rank
    axis = 1 if "hada_t1" in parts else 0
    need(all(parts[name].ndim == 2 for name in LOHA) and {w1_a.shape[axis], w2_a.shape[axis]} == {shape[0]})
    need(w1_b.shape[1] == w2_b.shape[1] and w1_b.shape[1] in (shape[1], shape[1:].numel()))
    if "hada_t1" in parts:
        return dense(
            scale * (tucker(parts["hada_t1"], w1_a, w1_b) * tucker(parts["hada_t2"], w2_a, w2_b)).reshape(shape)
        )
    if (
        len(w1_b) * len(w2_b) < min(shape[0], w1_b.shape[1]) // 2
    ):  # row by row and column by column Kronecker products: rank r r
        up = (w1_a[:, :, None] * w2_a[:, None]).flatten(1)
        down = (w1_b[:, None] * w2_b[None]).flatten(0, 1)
        more = (1, 1) if len(shape) == 4 else ()
        return Factors(down.reshape(-1, *shape[1:]), up.reshape(*up.shape, *more), scale * len(down))
    return dense(scale * ((w1_a @ w1_b) * (w2_a @ w2_b)).reshape(shape))


def lokr(parts: dict[str, Tensor], shape: torch.Size, alpha: float | None, rank: int | None = None) -> Factors:
    """(alpha / r) kron(w1, w2); `shape` is the weight's. Each of w1 and w2 is whole or w_a w_b (w2 also CP, with
    lokr_t2).

    rank: peft's r, which divides alpha always; LyCORIS divides by the rank of what is decomposed, and has scale 1 where
    nothing is.
    """
    whole = {}
    for name in ("lokr_w1", "lokr_w2"):
        if name in parts:
            whole[name] = parts[name]
            continue
        a, b = parts[f"{name}_a"], parts[f"{name}_b"]
        rows = 1 if name == "lokr_w2" and "lokr_t2" in parts else 0
        need(a.ndim == b.ndim == 2 and a.shape[rows] * b.shape[1] <= shape.numel())
        rank = rank or len(b)
        whole[name] = tucker(parts["lokr_t2"], a, b) if name == "lokr_w2" and "lokr_t2" in parts else a @ b
    scale = 1.0 if alpha is None or rank is None else alpha / rank
    w1, w2 = whole["lokr_w1"], whole["lokr_w2"]
    need(w1.numel() * w2.numel() == shape.numel())
    if w2.ndim == 4:
        w1 = w1[:, :, None, None]
    return dense(scale * torch.kron(w1, w2.contiguous()).reshape(shape))


def tucker(core: Tensor, w_a: Tensor, w_b: Tensor) -> Tensor:
    """[out,in,kh,kw]: sum_ij core[i,j,kh,kw] w_a[i,out] w_b[j,in]."""
    need(core.ndim == 4 and core.shape[:2] == (len(w_a), len(w_b)) and core.shape[2:].numel() <= MOST_TAPS)
    return torch.einsum("ijkl,ip,jr->prkl", core, w_a, w_b)


def dora(factors: Factors, magnitude: Tensor, module: nn.Module, over_inputs: bool = False) -> Factors:
    """DoRA, arXiv:2402.09353 eq. 5: W' = m (W + dW) / |W + dW|, as the update W' - W; W is the module's weight as it
    was loaded.

    magnitude: a number an output, the norm being over each output's weights (peft; LyCORIS' `wd_on_out`); with
    `over_inputs` a number an input, over each input's weights (LyCORIS' default before 2024). ValueError for another
    number of numbers.
    """
    weight = module.weight.detach().float().cpu()
    changed = weight + full(factors).reshape(weight.shape)
    axis = 1 if over_inputs else 0
    shape = [1] * weight.ndim
    shape[axis] = weight.shape[axis]
    if magnitude.numel() != weight.shape[axis]:
        raise ValueError(
            f"a DoRA magnitude of shape {list(magnitude.shape)} for a weight of shape {list(weight.shape)}"
        )
    norm = changed.transpose(0, axis).flatten(1).norm(dim=1).reshape(shape)
    return dense(magnitude.reshape(shape) * changed / norm - weight)
