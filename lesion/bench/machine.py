"""What a device could do at best, and what a step asks of it: peak TFLOP/s, and FLOPs counted, not estimated.

Proven by tests/bench/test_measure.py.
"""
import time

import torch

from lesion.run import devices
from lesion.sd import fast

# Dense tensor-core TFLOP/s at boost clock by the makers' data sheets: {part of the device's name: (fp16 = bf16, fp32 as TF32)}
# NVIDIA A100 (2020), H100/H200 SXM and PCIe (2023), RTX 30 (GA102 white paper 2.0), 40 (Ada white paper 2.02), 50 (Blackwell
# RTX white paper 1.1): fp16 with fp32 accumulation, without sparsity. The longest matching name counts.
PEAK_TFLOPS = {"A100": (312.0, 156.0), "H100 PCIe": (756.0, 378.0), "H100": (989.5, 494.7), "H200": (989.5, 494.7),
               "RTX 3080": (59.5, 29.8), "RTX 3090": (71.0, 35.6), "RTX 4080": (97.5, 48.7), "RTX 4090": (165.2, 82.6),
               "RTX 5080": (112.6, 56.3), "RTX 5090": (209.5, 104.8)}


def peak_tflops(where: torch.device, precision: str, side: int = 2048, repeats: int = 8) -> float | None:
    """Dense peak of the device in TFLOP/s for `precision`: of a GPU from PEAK_TFLOPS (None for one that is not there: no MFU
    then), of a CPU the best of `repeats` products of two square matrices, plain or packed (MKL and oneDNN differ by half on some)."""
    if where.type == "cuda":
        name = torch.cuda.get_device_name(where)
        known = max((key for key in PEAK_TFLOPS if key in name), key=len, default=None)
        return PEAK_TFLOPS[known][precision == "fp32"] if known else None
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    one, two = (torch.randn(side, side).to(dtype) for _ in range(2))
    best = float("inf")
    for form in (fast.linear_form(two, None, True), fast.linear_form(two, None, False)):
        for _ in range(repeats):
            began = time.perf_counter()
            form(one)
            best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best / 1e12


def counted_flops(call) -> int:
    """Floating-point operations (2 a multiply-add) of the matrix products and convolutions that `call()` runs, backward too."""
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def description(where: torch.device) -> dict:
    """What a figure was measured on: device, threads, whether the processor has bf16 instructions."""
    if where.type == "cuda":
        return {"device": torch.cuda.get_device_name(where)}
    return {"device": devices.cpu_name(), "threads": torch.get_num_threads(), "bf16_instructions": fast.bf16_is_fast()}
