"""How training grows with the number of processes: images a second at 1 ... N, and the share of N times one's.

    python benchmarks/scaling.py                            # as many as there are GPUs, else CPU cores
    python benchmarks/scaling.py --processes 1,2,4,8 --batch_size 64 --per_process true

`--batch_size` is that of all together ("the same work, sooner"), or with `--per_process true` of each ("more work in
the same time"). Each count is a torchrun of the whole program, `main.py`; the rate is the median of the log's, without
the first line, so that data, logging and the talk between processes are in it. "Side by side" is the sum of as many
runs with a process each: what the machine gives to processes that do not wait for each other. On GPUs add
`--cuda_graph false`, or single processes replay a recorded step, which several together cannot.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINE = 5  # steps between two lines of the log


def images_per_s(processes: int, batch_size: int, together: bool, steps: int, others: list[str], cache: Path) -> float:
    """The rate of one run of that many processes, or of that many runs side by side.

    Raises:
        SystemExit: a run failed; with what it said.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if together else []
    runs = 1 if together else processes
    options = f"--dataset toy --toy_num 2048 --batch_size {batch_size // runs} --total_step {steps} --log_step {LINE}"
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
    """The median of the rates in the log of the run in a folder."""
    lines = next(folder.glob("logs/*/metrics.jsonl")).read_text().splitlines()
    return statistics.median(json.loads(line)["images_per_s"] for line in lines[1:])


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", help="such as 1,2,4; default 1, 2, 4 ... up to all GPUs or cores")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--per_process", choices=("true", "false"), default="false")
    parser.add_argument("--steps", type=int, default=30)
    arguments, others = parser.parse_known_args()
    most = torch.cuda.device_count() or os.cpu_count() or 1
    counts = [int(word) for word in arguments.processes.split(",")] if arguments.processes else \
        [2**power for power in range(most.bit_length())]  # fmt: skip
    print("| processes | batch of all | images/s | efficiency | side by side |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as cache:
        one = None
        for count in counts:
            batch = arguments.batch_size * (count if arguments.per_process == "true" else 1)
            rest = arguments.steps, others, Path(cache)
            rate = images_per_s(count, batch, True, *rest)
            one = one or rate / count
            apart = images_per_s(count, batch, False, *rest) if count > 1 else rate
            print(f"| {count} | {batch} | {rate:.1f} | {rate / (count * one):.0%} | {apart:.1f} |", flush=True)


if __name__ == "__main__":
    main()
