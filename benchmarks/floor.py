"""Estimate the floor of a machine: a lower bound on the time of a training step.

It is the larger of two times: the step's matrix FLOP at the machine's matrix rate, and its memory traffic at the
machine's copy rate. Both rates are measured, the matrix rate in each precision.

Traffic counts what no order of operations avoids: what the forward saves for the backward, written once and read once
(half of it in bf16), and seven passes of Adam over the parameters.
"""

import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import FlopCounterMode

REPEATS = 10


class Rates(NamedTuple):
    """Peak rates of a machine: matrix FLOP/s by precision, and bytes/s of a copy, reads and writes both counted."""

    matrix: dict[str, float]
    copy: float


class Work(NamedTuple):
    """Work of a step: matrix FLOP, bytes saved for the backward in fp32, and number of parameters."""

    flop: float
    saved_bytes: int
    parameters: int


def machine_rates(device: str, precisions: Iterable[str]) -> Rates:
    """Measure a device in some of the precisions fp32, tf32 and bf16; bf16 takes minutes on a CPU that has none.

    The matrix rate is that of a product or a convolution: libraries differ in which is faster.
    """
    on_cuda = device == "cuda"
    side, batch = (8192, 1024) if on_cuda else (2048, 64)
    matrix = {}
    for precision in precisions:
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
    """Count the work of one fp32 step."""
    # Bytes of each storage. Not by its address, which a later one may have.
    saved: dict[StorageWeakRef, int] = {}
    parameters: dict[StorageWeakRef, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        (parameters if isinstance(tensor, torch.nn.Parameter) else saved)[StorageWeakRef(storage)] = storage.nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with FlopCounterMode(display=False) as counter, hooks:
        step()
    return Work(counter.get_total_flops(), sum(saved.values()), sum(parameters.values()) // 4)


def floors_ms(work: Work, rates: Rates) -> dict[str, float]:
    """Return the floor in ms by precision."""
    floors = {}
    for precision, matrix in rates.matrix.items():
        saved = work.saved_bytes * (0.5 if precision == "bf16" else 1)
        traffic = 2 * saved + 7 * 4 * work.parameters
        floors[precision] = max(work.flop / matrix, traffic / rates.copy) * 1e3
    return floors


def _seconds(function: Callable[..., Any], *inputs: torch.Tensor, device: str) -> float:
    """Return the shortest time of `REPEATS` calls."""
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
