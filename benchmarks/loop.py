"""Measure what training costs beyond its steps: data, then logging, sampling and saving at their defaults.

    python benchmarks/loop.py

Three kinds of work run in turn in one process: steps on fixed inputs, steps on data, and whole training runs, each of
which resumes from the previous one. Percentages are relative to the speed of the first kind. Every run writes a sample
grid per 100 steps, ten log entries per 100 steps, and one checkpoint; it has 100 steps on a CPU, 2,000 on a GPU.
"""

import argparse
import contextlib
import dataclasses
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from main import make_trainer
from parameter import Config
from training.distributed import Ranks
from utils import set_backends, setup_device, tune_malloc


def measure(config: Config, steps: int, run_steps: int, rounds: int) -> dict[str, float]:
    """Return the ms per step of each kind of work, the median over `rounds`.

    Args:
        config: all but its dataset is used, which is toy faces here.
        steps: steps per round of the first two kinds.
        run_steps: steps per training run.
    """
    # One epoch per run: one checkpoint.
    config = dataclasses.replace(config, dataset="toy", toy_num=run_steps * config.batch_size)
    device = setup_device(config.device)
    precision = set_backends(device, config.precision, config.deterministic)
    fixed, fed, whole = (make_trainer(config, device, precision, Ranks()) for _ in range(3))
    real, _ = fixed.loader.batch(0)
    z, z2 = torch.randn(2, config.batch_size, config.z_dim, device=device)

    def fixed_step() -> None:
        fixed.updates([{"real": real, "z": z}, {"z": z2}])
        fixed.ema.update(fixed.step)

    def run() -> None:
        whole.config = dataclasses.replace(config, total_step=whole.step + run_steps, pretrained_model="latest")
        with contextlib.redirect_stdout(io.StringIO()):
            whole.train()

    kinds: dict[str, tuple[Callable[[], object], int, int]] = {  # function, calls per round, steps per call
        "steps only": (fixed_step, steps, 1),
        "with data": (fed.train_step, steps, 1),
        "whole run": (run, 1, run_steps),
    }
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for function, _, _ in kinds.values():
        function()  # warm up
    for _ in range(rounds):
        for name, (function, calls, steps_per_call) in kinds.items():
            times[name].append(seconds(function, calls, device) / (calls * steps_per_call) * 1e3)
    return {name: statistics.median(found) for name, found in times.items()}


def seconds(function: Callable[[], object], calls: int, device: torch.device) -> float:
    """Return the time of `calls` calls, until the device is idle."""
    start = time.perf_counter()
    for _ in range(calls):
        function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--model", default="sagan")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    tune_malloc()
    device = setup_device(arguments.device)
    steps, run_steps = (2000, 2000) if device.type == "cuda" else (20, 100)
    with tempfile.TemporaryDirectory() as scratch:
        folders = ("cache_path", "sample_path", "attn_path", "model_save_path", "log_path")
        config = Config(
            device=str(device),
            model=arguments.model,
            batch_size=arguments.batch_size,
            precision=arguments.precision,
            **{name: str(Path(scratch, name)) for name in folders},
        )
        times = measure(config, steps, run_steps, arguments.rounds)
    for name, ms in times.items():
        print(f"{name:<11} {ms:9.2f} ms per step   {times['steps only'] / ms:.1%}")


if __name__ == "__main__":
    main()
