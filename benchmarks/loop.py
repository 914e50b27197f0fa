"""What training costs beyond its steps: data, then logging, sampling and saving at their defaults.

    python benchmarks/loop.py

In one process, in turn: steps on fixed inputs, steps on data, and whole training runs that go on from each other. The
shares are of the first one's speed. Every run has a sample grid for each 100 steps, ten lines of the log for each, and
one checkpoint; it is 100 steps long on a CPU, 2,000 on a GPU.
"""

import argparse
import contextlib
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main() -> None:
    import torch

    from data_loader import get_loader
    from datasets.sources import find_source
    from parameter import Config
    from trainer import Trainer
    from utils import resolve_device, tune_malloc

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    tune_malloc()
    device = resolve_device(arguments.device)
    steps, run_steps = (2000, 2000) if device.type == "cuda" else (20, 100)

    with tempfile.TemporaryDirectory() as scratch:
        paths = {name: f"{scratch}/{name}" for name in ("sample_path", "attn_path", "model_save_path", "log_path")}
        options = dict(device=str(device), batch_size=arguments.batch_size, precision=arguments.precision) | paths
        source = find_source("toy", toy_num=run_steps * arguments.batch_size)  # an epoch is a run: one checkpoint

        def build() -> Trainer:
            loader = get_loader(source, 64, arguments.batch_size, cache_path=f"{scratch}/cache", device=str(device))
            return Trainer(loader, Config(**options))

        alone, fed, whole = build(), build(), build()
        reals, noises = [alone.loader.batch(0)], [alone._noise() for _ in range(2)]

        def take_step_alone() -> None:
            alone.run_updates(reals, noises)
            alone.ema.update(alone.step)

        def run() -> None:
            whole.config = Config(**options, total_step=whole.step + run_steps)
            with contextlib.redirect_stdout(io.StringIO()):
                whole.train()

        def milliseconds(work: Callable[[], object], calls: int, steps_a_call: int) -> float:
            start = time.perf_counter()
            for _ in range(calls):
                work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            return (time.perf_counter() - start) / (calls * steps_a_call) * 1e3

        kinds = {
            "steps alone": (take_step_alone, steps, 1),
            "with data": (fed._take_step, steps, 1),
            "a whole run": (run, 1, run_steps),
        }
        times: dict[str, list[float]] = {name: [] for name in kinds}
        for work, _, _ in kinds.values():
            work()  # warm up
        for _ in range(arguments.rounds):
            for name, what in kinds.items():
                times[name].append(milliseconds(*what))
        base = statistics.median(times["steps alone"])
        for name, found in times.items():
            print(f"{name:<12} {statistics.median(found):9.2f} ms a step   {base / statistics.median(found):.1%}")


if __name__ == "__main__":
    main()
