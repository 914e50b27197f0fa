"""Measure how training scales with the number of processes: images/s with 1 ... N, and the efficiency.

    python benchmarks/scaling.py                            # up to the number of GPUs, else of CPU cores
    python benchmarks/scaling.py --processes 1,2,4,8 --batch_size 64 --per_process true

`--batch_size` is the global batch size (strong scaling), or with `--per_process true` that of each process (weak
scaling). Other options are passed to `main.py`, which torchrun starts for each number of processes. The rate is the
median of the logged ones without the first, so it includes data, logging and communication; the efficiency is the rate
per process divided by that of the first row. The last column is the sum over N independent runs of one process each,
which do not communicate: the difference to it is the communication overhead. On GPUs add `--cuda_graph false`, because
several processes run eagerly.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
LOG_STEP = 5


def images_per_s(processes: int, batch_size: int, together: bool, steps: int, others: list[str], cache: Path) -> float:
    """Return the rate of one run of that many processes, or the sum over that many independent runs.

    Args:
        batch_size: of all processes or runs together.
        together: one run of several processes; False starts independent runs, each on a GPU of its own.
        others: more options of `main.py`.

    Raises:
        SystemExit: a run failed; with its output.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if together else []
    runs = 1 if together else processes
    options = (
        f"--dataset toy --toy_num 2048 --batch_size {batch_size // runs} --total_step {steps} --log_step {LOG_STEP}"
    )
    command = [sys.executable, *launcher, str(ROOT / "main.py"), *options.split(), "--cache_path", str(cache), *others]
    with tempfile.TemporaryDirectory() as scratch:
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(processes)))).split(",")
        started = []
        for run in range(runs):
            folder = Path(scratch, str(run))
            folder.mkdir()
            environment = {"OMP_NUM_THREADS": "1", **os.environ}
            if not together:
                environment["CUDA_VISIBLE_DEVICES"] = gpus[run % len(gpus)]
            with open(folder / "output.txt", "w", encoding="utf-8") as out:
                started.append(subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=out))
        if any([process.wait() for process in started]):
            raise SystemExit("".join(path.read_text() for path in Path(scratch).glob("*/output.txt")))
        return sum([logged_rate(folder) for folder in Path(scratch).iterdir()])


def logged_rate(folder: Path) -> float:
    """Return the median rate in the log of a finished run, without the first entry."""
    entries = map(json.loads, next(folder.glob("logs/*/metrics.jsonl")).read_text().splitlines())
    rates = [entry["images_per_s"] for entry in entries if "images_per_s" in entry]
    return statistics.median(rates[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", help="such as 1,2,4; default: 1, 2, 4, ... up to the number of GPUs or cores")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--per_process", choices=("true", "false"), default="false")
    parser.add_argument("--steps", type=int, default=30)
    arguments, others = parser.parse_known_args()
    if arguments.steps < 2 * LOG_STEP:
        parser.error(f"--steps must be at least {2 * LOG_STEP}")
    most = torch.cuda.device_count() or os.cpu_count() or 1
    counts = [2**power for power in range(most.bit_length())]
    if arguments.processes:
        counts = [int(word) for word in arguments.processes.split(",")]
    print("| processes | global batch | images/s | efficiency | independent runs |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as cache:
        one = None
        for count in counts:
            batch = arguments.batch_size * (count if arguments.per_process == "true" else 1)
            rest = arguments.steps, others, Path(cache)
            rate = images_per_s(count, batch, True, *rest)
            one = one or rate / count
            independent = images_per_s(count, batch, False, *rest) if count > 1 else rate
            print(f"| {count} | {batch} | {rate:.1f} | {rate / (count * one):.0%} | {independent:.1f} |", flush=True)


if __name__ == "__main__":
    main()
