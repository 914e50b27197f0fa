"""Kills real runs with SIGKILL at random times, continues them, and compares the end with a run that was left alone.

    python benchmarks/kill.py --trials 100

Each trial begins in an empty folder (its cache build can be killed too), is killed once or twice, and is given the
same command, with `--pretrained_model auto`, until it ends. It survived if it ended; it is identical if the final
weights, average, optimizers, samples and lines of metrics.jsonl are, bit for bit. Needs fork: Linux or macOS.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

OPTIONS = shlex.split(
    "--dataset toy --toy_num 300 --num_workers 0 --device cpu --imsize 32 --z_dim 16 --g_conv_dim 8 --d_conv_dim 8 "
    "--batch_size 4 --total_step 60 --log_step 1 --sample_step 5 --model_save_step 0.04 --pretrained_model auto"
)
# Not a function of the seed: the clock and the machine.
UNSTEADY = ("images_per_s", "memory_mib")


def train(folder: Path) -> None:
    """The body of a run's process."""
    os.chdir(folder)
    sys.argv = ["main.py", *OPTIONS]
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


def result(folder: Path) -> dict[str, Any]:
    """What a finished run left, without what is not a function of the seed."""
    import torch

    from divergence import tensors_in

    state = torch.load(next(folder.glob("models/*/60_state.pth")), weights_only=True)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100)
    arguments = parser.parse_args()
    began = time.perf_counter()
    survived, identical = run_trials(arguments.trials)
    print(f"survived {survived}/{arguments.trials}, identical {identical}/{arguments.trials}, "
          f"{time.perf_counter() - began:.0f} s")  # fmt: skip


if __name__ == "__main__":
    main()
