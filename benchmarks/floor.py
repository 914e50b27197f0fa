"""The least time that a step can take on a machine: its matrix work at the machine's matrix rate, or its memory traffic
at the machine's copy rate, whichever is longer. Both rates are measured, in each precision.

Traffic counts what no order of operations avoids: what the forward keeps for the backward, written once and read once
(half of it in bf16), and Adam's seven passes over the parameters.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

REPEATS = 10


class Rates(NamedTuple):
    """What a machine can do: matrix FLOP/s by precision, copied bytes/s (read and written)."""

    matrix: dict[str, float]
    copy: float


class Work(NamedTuple):
    """What a step asks for: matrix FLOP, bytes kept for the backward in fp32, parameters."""

    flop: float
    kept_bytes: int
    parameters: int


def machine_rates(device: str) -> Rates:
    """Measures a device: the faster of a matrix product and a convolution, because libraries differ in the two."""
    on_cuda = device == "cuda"
    side, batch = (8192, 1024) if on_cuda else (2048, 64)
    matrix = {}
    for precision in ("fp32", "tf32", "bf16") if on_cuda else ("fp32", "bf16"):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
        options = dict(device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
        left, right = torch.randn(side, side, **options), torch.randn(side, side, **options)
        images = torch.randn(batch, 256, 16, 16, **options).contiguous(memory_format=torch.channels_last)
        kernel = torch.randn(256, 256, 3, 3, **options).contiguous(memory_format=torch.channels_last)
        product = 2 * side**3 / _seconds(torch.matmul, left, right, device=device)
        convolution = 2 * batch * 14 * 14 * 256 * 256 * 9 / _seconds(F.conv2d, images, kernel, device=device)
        matrix[precision] = max(product, convolution)
    source = torch.empty(2**28 if on_cuda else 2**26, device=device)
    target = torch.empty_like(source)
    return Rates(matrix, 2 * source.nbytes / _seconds(target.copy_, source, device=device))


def step_work(step: Callable[[], Any]) -> Work:
    """Counts what one fp32 step asks for."""
    kept: dict[int, int] = {}
    parameters: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        (parameters if isinstance(tensor, torch.nn.Parameter) else kept)[pointer] = tensor.untyped_storage().nbytes()
        return tensor

    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept):
        step()
    return Work(counter.get_total_flops(), sum(kept.values()), sum(parameters.values()) // 4)


def floors_ms(work: Work, rates: Rates) -> dict[str, float]:
    """The floor in ms by precision."""
    floors = {}
    for precision, matrix in rates.matrix.items():
        kept = work.kept_bytes * (0.5 if precision == "bf16" else 1)
        traffic = 2 * kept + 7 * 4 * work.parameters
        floors[precision] = max(work.flop / matrix, traffic / rates.copy) * 1e3
    return floors


def _seconds(function: Callable[..., Any], *inputs: torch.Tensor, device: str) -> float:
    """The shortest of some runs."""
    times = []
    for _ in range(REPEATS):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        function(*inputs)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)
