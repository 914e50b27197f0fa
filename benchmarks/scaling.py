"""How training grows with the number of processes: images a second at 1 ... N, and the share of N times one's.

    python benchmarks/scaling.py                            # as many as there are GPUs, else CPU cores
    python benchmarks/scaling.py --processes 1,2,4,8 --batch_size 64 --per_process true

`--batch_size` is that of all together ("the same work, sooner"), or with `--per_process true` of each ("more work in
the same time"). Each count is a torchrun of the whole program, `main.py`; the rate is the median of the log's, without
the first line, so that data, logging and the talk between processes are in it.
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


def images_per_s(processes: int, batch_size: int, steps: int, others: list[str], cache: Path) -> float:
    """The rate of a run of that many processes; raises `CalledProcessError` where it fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    options = f"--dataset toy --toy_num 2048 --batch_size {batch_size} --total_step {steps} --log_step {LINE}"
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [*command, str(ROOT / "main.py"), *options.split(), "--cache_path", str(cache), *others],
            cwd=folder,
            env={"OMP_NUM_THREADS": "1"} | os.environ,
            capture_output=True,
            check=True,
        )
        lines = next(Path(folder).glob("logs/*/metrics.jsonl")).read_text().splitlines()
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
    print("| processes | batch of all | images/s | efficiency |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as cache:
        first = None
        for count in counts:
            batch = arguments.batch_size * (count if arguments.per_process == "true" else 1)
            rate = images_per_s(count, batch, arguments.steps, others, Path(cache))
            first = first or rate / count
            print(f"| {count} | {batch} | {rate:.1f} | {rate / (count * first):.0%} |", flush=True)


if __name__ == "__main__":
    main()
