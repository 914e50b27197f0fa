"""Kills real runs with SIGKILL at random times, continues them, and compares the end with a run that was left alone.

    python benchmarks/kill.py --trials 100
    python benchmarks/kill.py --trials 20 --processes 2

Each trial begins in an empty folder (its cache build can be killed too), is killed once or twice, and is given the
same command, with `--pretrained_model auto`, until it ends. It survived if it ended; it is identical if the final
weights, average, optimizers, samples and lines of metrics.jsonl are, bit for bit. Needs fork: Linux or macOS.

With `--processes`, a run is that many under torchrun's launcher with `--max_restarts=1`; one of them is killed once,
and nothing is given again. It has fewer steps.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import shlex
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

OPTIONS = shlex.split(
    "--dataset toy --toy_num 300 --num_workers 0 --device cpu --imsize 32 --z_dim 16 --g_conv_dim 8 --d_conv_dim 8 "
    "--batch_size 4 --log_step 1 --sample_step 5 --model_save_step 0.04 --pretrained_model auto"
)
STEPS, PROCESSES_STEPS = 60, 24
# Not a function of the seed: the clock and the machine.
UNSTEADY = ("images_per_s", "memory_mib")


def train(folder: Path, steps: int = STEPS) -> None:
    """The body of a run's process."""
    os.chdir(folder)
    sys.argv = ["main.py", *OPTIONS, "--total_step", str(steps)]
    import torch

    from main import main

    torch.set_num_threads(1)
    with open("output.txt", "a", encoding="utf-8") as out, contextlib.redirect_stdout(out):
        sys.stderr = out
        sys.exit(main())


def start(context: Any, folder: Path) -> Any:
    process = context.Process(target=train, args=(folder,))
    process.start()
    return process


def result(folder: Path, steps: int = STEPS) -> dict[str, Any]:
    """What a finished run left, without what is not a function of the seed."""
    import torch

    from divergence import tensors_in

    path = next(path for path in folder.glob("models/*/*_state.pth") if path.name.startswith(f"{steps}_"))
    state = torch.load(path, weights_only=True)
    lines = next(folder.glob("logs/*/metrics.jsonl")).read_text().splitlines()
    metrics = [{key: value for key, value in json.loads(line).items() if key not in UNSTEADY} for line in lines]
    pictures = {path.name: path.read_bytes() for path in sorted(folder.glob("samples/*/*.png"))}
    # The checksums of G and D are in the state; its own tensors are compared by their bytes.
    parts = [state[name] for name in ("ema", "fixed_z", "g_optimizer", "d_optimizer")]
    tensors = [tensor.numpy().tobytes() for tensor in tensors_in(parts)]
    return {"weights": state["sha256"], "tensors": tensors, "metrics": metrics, "pictures": pictures}


def trial(context: Any, folder: Path, seconds: float) -> bool:
    """Kills and continues a run; whether it ended. `seconds` is how long a run takes."""
    for _ in range(random.randint(1, 2)):
        process = start(context, folder)
        time.sleep(random.uniform(0, seconds))
        process.kill()
        process.join()
    process = start(context, folder)
    process.join()
    return process.exitcode == 0


def run_trials(trials: int, seed: int = 0) -> tuple[int, int]:
    """Returns how many trials survived, and how many were identical."""
    random.seed(seed)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["trainer", "tester", "data_loader"])  # so that a kill does not hit imports only
    survived = identical = 0
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch) / "whole"
        for _ in range(2):  # the first one also starts the server
            whole = Path(tempfile.mkdtemp(dir=scratch))
            began = time.perf_counter()
            start(context, whole).join()
            seconds = time.perf_counter() - began
        expected = result(whole)
        for _ in range(trials):
            folder = Path(tempfile.mkdtemp(dir=scratch))
            if trial(context, folder, seconds):
                survived += 1
                identical += result(folder) == expected
            else:
                print((folder / "output.txt").read_text()[-2000:])
    return survived, identical


def train_as_one_of_several(folder: Path) -> None:
    """The body of a process that the launcher started."""
    (folder / f"{os.environ['RANK']}.pid").write_text(str(os.getpid()))
    train(folder, PROCESSES_STEPS)


def run_processes(folder: Path, processes: int) -> bool:
    """A run of several processes, which torch's launcher starts anew once; whether it ended as it should."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=folder.name,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=1,
        start_method="forkserver",
    )
    try:
        elastic_launch(launch, train_as_one_of_several)(folder)
    except ChildFailedError:
        return False
    return True


def kill_one(folder: Path, processes: int, step: int, over: threading.Event) -> None:
    """Kills a process once `step` steps are logged, 0 as soon as it is there, and notes it in a file."""
    rank = random.randrange(processes)
    path, done = folder / f"{rank}.pid", 0
    while not over.is_set() and (done < step or not (path.exists() and path.read_text())):
        time.sleep(0.01)
        done = sum(len(log.read_text().splitlines()) for log in folder.glob("logs/*/metrics.jsonl"))
    time.sleep(random.uniform(0, 0.3))
    with contextlib.suppress(ProcessLookupError):  # it has ended
        os.kill(int(path.read_text()), signal.SIGKILL)
        (folder / "killed").write_text(f"rank {rank} after {done} steps")


def run_process_trials(trials: int, processes: int, seed: int = 0) -> tuple[int, int]:
    """The same for runs of several processes."""
    random.seed(seed)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["trainer", "tester", "data_loader", "distributed"])
    survived = identical = 0
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(tempfile.mkdtemp(dir=scratch))
        run_processes(whole, processes)
        expected = result(whole, PROCESSES_STEPS)
        for number in range(trials):
            folder = Path(tempfile.mkdtemp(dir=scratch))
            began = time.perf_counter()
            over = threading.Event()
            killer = threading.Thread(
                target=kill_one, args=(folder, processes, random.randrange(PROCESSES_STEPS), over)
            )
            killer.start()
            ended = run_processes(folder, processes)
            over.set()
            killer.join()
            same = ended and result(folder, PROCESSES_STEPS) == expected
            survived, identical = survived + ended, identical + same
            killed = (folder / "killed").read_text() if (folder / "killed").exists() else "too late"
            print(f"{number}: {killed}, {'ended' if ended else 'failed'}, {'identical' if same else 'different'}, "
                  f"{time.perf_counter() - began:.0f} s", flush=True)  # fmt: skip
            if not ended:
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
