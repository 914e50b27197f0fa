"""Kill training runs with SIGKILL at random times, resume them, and compare the results with an uninterrupted run.

    python benchmarks/kill.py --trials 100
    python benchmarks/kill.py --trials 20 --processes 2

Each trial starts in an empty folder, so that the kill can hit the cache build too. It is killed once or twice and then
resumed with the same command (`--pretrained_model auto`). It survived if it exits with 0. It is identical if the final
checkpoint (weights, EMA, optimizers, fixed z), the sample images and the log entries are, bit for bit.
Needs fork: Linux or macOS.

With `--processes N`, a run has N ranks under `torchrun --max_restarts=1`. One rank is killed once per trial, and
torchrun restarts all of them. These runs have fewer steps, because starting takes seconds. Needs Linux.
"""

import argparse
import json
import multiprocessing
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import redirect_stderr, redirect_stdout, suppress
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

OPTIONS = shlex.split(
    "--dataset toy --toy_num 300 --num_workers 0 --device cpu --imsize 32 --z_dim 16 --g_conv_dim 8 --d_conv_dim 8 "
    "--batch_size 4 --log_step 1 --sample_step 5 --model_save_step 0.04 --min_save_step 1 --pretrained_model auto"
)
STEPS, PROCESSES_STEPS = 60, 24
# Imported once, by the fork server, so that few kills hit imports; the last two are what a run imports late.
PRELOADED = ["trainer", "tester", "data_loader", "torch._dynamo", "matplotlib.backends.backend_svg"]
NONDETERMINISTIC = ("images_per_s", "memory_mib")  # keys of a log entry that depend on the machine


def train(folder: Path) -> None:
    """Train in `folder`; the target of a run's process."""
    os.chdir(folder)
    sys.argv = ["main.py", *OPTIONS, "--total_step", str(STEPS)]
    from main import main

    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own has a semaphore, which Python warns of when its process was killed
    with open("output.txt", "a", encoding="utf-8") as out, redirect_stdout(out), redirect_stderr(out):
        sys.exit(main())


def start(context: BaseContext, folder: Path) -> BaseProcess:
    process = context.Process(target=train, args=(folder,))
    process.start()
    return process


def result(folder: Path, steps: int) -> dict[str, Any]:
    """Return everything in the results of a finished run that must be a function of its options and the seed."""
    state = torch.load(next(folder.glob(f"models/*/{steps}_state.pth")), weights_only=True)
    tensors = [leaf.numpy().tobytes() for leaf in tree_leaves(state) if isinstance(leaf, torch.Tensor)]
    lines = next(folder.glob("logs/*/metrics.jsonl")).read_text().splitlines()
    entries = [{key: value for key, value in json.loads(line).items() if key not in NONDETERMINISTIC} for line in lines]
    images = {path.name: path.read_bytes() for path in sorted(folder.glob("samples/*/*.png"))}
    return {"tensors": tensors, "entries": entries, "images": images}


def trial(context: BaseContext, folder: Path, seconds: float) -> bool:
    """Kill a run at random within `seconds`, the duration of a whole run, and resume it. Return whether it survived."""
    for _ in range(random.randint(1, 2)):
        process = start(context, folder)
        time.sleep(random.uniform(0, seconds))
        process.kill()
        process.join()
    process = start(context, folder)
    process.join()
    return process.exitcode == 0


def run_trials(trials: int) -> tuple[int, int]:
    """Return how many trials survived, and how many were identical."""
    random.seed(0)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    survived = identical = 0
    nothing = context.Process(target=int)  # starts the fork server, which the run that is timed should not do
    nothing.start()
    nothing.join()
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(tempfile.mkdtemp(dir=scratch))
        began = time.perf_counter()
        start(context, whole).join()
        seconds = time.perf_counter() - began
        expected = result(whole, STEPS)
        for _ in range(trials):
            folder = Path(tempfile.mkdtemp(dir=scratch))
            if trial(context, folder, seconds):
                survived += 1
                identical += result(folder, STEPS) == expected
            else:
                print((folder / "output.txt").read_text()[-2000:])
    return survived, identical


def start_processes(folder: Path, processes: int) -> subprocess.Popen:
    """Start a run of several ranks, which torchrun restarts once."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--max_restarts=1"]
    with open(folder / "output.txt", "w", encoding="utf-8") as out:
        return subprocess.Popen(
            [*command, str(ROOT / "main.py"), *OPTIONS, "--total_step", str(PROCESSES_STEPS)],
            cwd=folder,
            stdout=out,
            stderr=out,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )


def kill_one(launcher: subprocess.Popen, folder: Path, step: int) -> str:
    """Kill a random rank soon after `step` steps are logged, for 0 soon after it starts. Return a description."""
    children: list[str] = []
    done = 0
    while done < step or not children:
        if launcher.poll() is not None:
            return "none killed"
        time.sleep(0.01)
        done = sum(log.read_text().count('"d_loss":') for log in folder.glob("logs/*/metrics.jsonl"))
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    time.sleep(random.uniform(0, 0.3 if done else 3))
    number = random.randrange(len(children))
    with suppress(ProcessLookupError):  # it has already ended
        os.kill(int(children[number]), signal.SIGKILL)
    return f"process {number} killed after {done} steps"


def run_process_trials(trials: int, processes: int) -> tuple[int, int]:
    """Do the same with runs of several ranks."""
    random.seed(0)
    survived = identical = 0
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(tempfile.mkdtemp(dir=scratch))
        start_processes(whole, processes).wait()
        expected = result(whole, PROCESSES_STEPS)
        for number in range(trials):
            folder, began = Path(tempfile.mkdtemp(dir=scratch)), time.perf_counter()
            launcher = start_processes(folder, processes)
            killed = kill_one(launcher, folder, random.randrange(PROCESSES_STEPS))
            finished = launcher.wait() == 0
            same = finished and result(folder, PROCESSES_STEPS) == expected
            survived, identical = survived + finished, identical + same
            outcome = f"{'finished' if finished else 'failed'}, {'identical' if same else 'different'}"
            print(f"{number}: {killed}, {outcome}, {time.perf_counter() - began:.0f} s", flush=True)
            if not finished:
                print((folder / "output.txt").read_text()[-3000:])
    return survived, identical


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--processes", type=int, default=1)
    arguments = parser.parse_args()
    began = time.perf_counter()
    if arguments.processes > 1:
        survived, identical = run_process_trials(arguments.trials, arguments.processes)
    else:
        survived, identical = run_trials(arguments.trials)
    print(f"survived {survived}/{arguments.trials}, identical {identical}/{arguments.trials}, "
          f"{time.perf_counter() - began:.0f} s")  # fmt: skip


if __name__ == "__main__":
    main()
