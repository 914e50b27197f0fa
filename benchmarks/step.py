"""Measure the time per training step: this repository in each precision and mode, a baseline, and the machine's floor.

    python benchmarks/step.py                                           # batch 64 at 64x64
    python benchmarks/step.py --batch_size 16,256 --imsize 64,128 --json results.json
    python benchmarks/step.py --model sagan,paper --batch_size 16

Each contender runs in a process of its own, because allocator and thread settings are per process, and takes blocks of
steps in turn, A B C A B C ..., so that drift of the machine affects all of them; those that do not fit into a GPU's
memory beside the others come after them. The first step of a block is not counted. A step right after waiting for the
other contenders is slower than those that follow it, and the baseline's is slowed most (4.4 s in place of 3.1 to 3.6 s
on two CPU cores), so that counting it would overstate the speedup.

Reported are the median and the interquartile range (IQR) of all counted steps. See benchmarks/floor.py for the floor.
"""

import argparse
import contextlib
import gc
import itertools
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from baseline import Baseline
from floor import Work, floors_ms, machine_rates, step_work

from errors import UserError
from main import make_loader
from parameter import Config
from trainer import Trainer
from utils import memory_mib, set_backends, setup_device, tune_malloc


class Setting(NamedTuple):
    """What the rows of one table have in common."""

    device: str
    model: str
    imsize: int
    batch_size: int


class Contender(NamedTuple):
    """One way to run the step: `name` is "baseline" or "ours", `mode` is "eager" or "graph"."""

    name: str
    precision: str
    mode: str


def contenders(setting: Setting, only: str) -> list[Contender]:
    """Return the contenders in this setting whose fields, joined as in "ours bf16 graph", contain `only`.

    The baseline has the networks of sagan at 64x64 only.
    """
    on_cuda = setting.device == "cuda"
    has_baseline = setting.model == "sagan" and setting.imsize == 64
    found = [Contender("baseline", "fp32", "eager")] if has_baseline else []
    for precision in ("fp32", "tf32", "bf16") if on_cuda else ("fp32", "bf16"):
        found += [Contender("ours", precision, mode) for mode in (("eager", "graph") if on_cuda else ("eager",))]
    return [contender for contender in found if only in " ".join(contender)]


def build_step(contender: Contender, setting: Setting) -> Callable[[], Any]:
    """Return a function that takes one step on fixed inputs, which are the same for all contenders."""
    torch.manual_seed(0)
    device, size = setup_device(setting.device), setting.batch_size
    real = torch.rand(size, 3, setting.imsize, setting.imsize).mul(2).sub(1).to(device)
    z, z2 = torch.randn(2, size, 128).to(device)
    if contender.name == "baseline":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        baseline = Baseline(setting.device)
        return lambda: baseline.d_step(real, z) | baseline.g_step(z2)
    graph = "true" if contender.mode == "graph" else "false"
    precision = set_backends(device, contender.precision, deterministic=False)
    config = Config(**setting._asdict(), dataset="toy", cuda_graph=graph)
    loader = make_loader(config, device, precision)  # not opened: no batch is drawn
    trainer = Trainer(config, loader, device, precision)
    real = real.contiguous(memory_format=loader.memory_format)

    def step() -> dict[str, torch.Tensor]:
        stats = trainer.updates([{"real": real, "z": z}, {"z": z2}])
        trainer.ema.update(trainer.step)
        return stats

    return step


def time_block(step: Callable[[], Any], block: int, device: str) -> list[float]:
    """Take `block` steps and return the ms of each but the first.

    On a GPU, events mark the end of each step: waiting for the device after every step would add the launch latency.
    """
    if device == "cuda":
        events = [torch.cuda.Event(enable_timing=True) for _ in range(block)]
        for event in events:
            step()
            event.record()
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) for begin, end in itertools.pairwise(events)]
    ends = []
    for _ in range(block):
        step()
        ends.append(time.perf_counter())
    return [(end - begin) * 1e3 for begin, end in itertools.pairwise(ends)]


def serve(pipe: Connection, contender: Contender, setting: Setting, warm_up: int, block: int) -> None:
    """Run a contender's process: answer True with the times of a block, and False with the peak memory, then end."""
    if contender.name == "ours":
        tune_malloc()
    step = build_step(contender, setting)
    time_block(step, warm_up, setting.device)  # waits for the GPU, whose errors appear late
    pipe.send("ready")
    while pipe.recv():
        pipe.send(time_block(step, block, setting.device))
    pipe.send(memory_mib(torch.device(setting.device)))


def measure(setting: Setting, found: list[Contender], rounds: int, warm_up: int, block: int) -> list[dict[str, Any]]:
    """Return a record per contender, of `rounds` blocks of `block` steps each after `warm_up` steps.

    A contender whose process dies while it warms up is measured after the others, when their memory is free. If it dies
    again, a printed line says so.
    """
    context = multiprocessing.get_context("spawn")
    running, dead = [], []
    for contender in found:
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, contender, setting, warm_up, block), daemon=True)
        process.start()
        theirs.close()  # so that `recv` raises if the process dies
        try:
            ours.recv()
        except EOFError:
            dead.append(contender)
        else:
            running.append((contender, process, ours, []))
    if not running:
        for contender in dead:
            print(f"{' '.join(contender)}: not measured, its process died: see above")
        return []
    for _ in range(rounds):
        for _, _, pipe, times in running:
            pipe.send(True)
            times += pipe.recv()
    records = []
    for contender, process, pipe, times in running:
        pipe.send(False)
        low, median, high = statistics.quantiles(times, n=4)
        records.append(
            setting._asdict()
            | contender._asdict()
            | {"ms_per_step": median, "iqr_ms": high - low, "images_per_s": setting.batch_size / median * 1e3}
            | {"peak_mib": pipe.recv()}
        )
        process.join()  # it holds memory until then
    return records + measure(setting, dead, rounds, warm_up, block)


def count_work(setting: Setting) -> Work:
    """Count the work of a step, in fp32; where that does not fit into memory, twice that of half the batch."""
    with contextlib.suppress(torch.OutOfMemoryError):
        return step_work(build_step(Contender("ours", "fp32", "eager"), setting))
    half = count_work(setting._replace(batch_size=setting.batch_size // 2))
    return half._replace(flop=2 * half.flop, saved_bytes=2 * half.saved_bytes)


def add_ratios(records: list[dict[str, Any]], floors: dict[str, float]) -> None:
    """Add to each record of a setting the speedup over the baseline, and the floor as a fraction of the time."""
    baseline = next((record["ms_per_step"] for record in records if record["name"] == "baseline"), None)
    for record in records:
        record["speedup"] = baseline / record["ms_per_step"] if baseline else None
        record["floor_fraction"] = floors[record["precision"]] / record["ms_per_step"]


def table(records: list[dict[str, Any]]) -> str:
    """Format the records of a setting as a Markdown table."""
    lines = ["| step | ms per step (IQR) | images/s | speedup | floor / time | peak MiB |", "|---|---|---|---|---|---|"]
    for r in records:
        name = "baseline" if r["name"] == "baseline" else f"this repository, {r['precision']}, {r['mode']}"
        speedup = f"{r['speedup']:.2f}" if r["speedup"] else "-"
        lines.append(
            f"| {name} | {r['ms_per_step']:.2f} ({r['iqr_ms']:.2f}) | {r['images_per_s']:.0f} | {speedup} "
            f"| {r['floor_fraction']:.0%} | {r['peak_mib']:.0f} |"
        )
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    def integers(text: str) -> list[int]:
        return [int(word) for word in text.split(",")]

    has_cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if has_cuda else "cpu")
    parser.add_argument(
        "--model", type=lambda text: text.split(","), default=["sagan"], help="one or more, separated by commas"
    )
    parser.add_argument("--imsize", type=integers, default=[64], help="one or more, separated by commas")
    parser.add_argument("--batch_size", type=integers, default=[64], help="one or more, separated by commas")
    parser.add_argument("--only", default="", help='contenders whose fields contain this, such as "ours bf16"')
    parser.add_argument("--rounds", type=int, default=20 if has_cuda else 7, help="blocks per contender")
    parser.add_argument("--json", type=Path, help="write one record per row to this file")
    arguments = parser.parse_args()
    settings = itertools.product([arguments.device], arguments.model, arguments.imsize, arguments.batch_size)
    arguments.settings = [Setting(*setting) for setting in settings]
    try:
        for setting in arguments.settings:
            Config(**setting._asdict())
    except UserError as error:
        parser.error(str(error))
    return arguments


def main() -> None:
    arguments = parse_arguments()
    warm_up, block = (10, 20) if arguments.device == "cuda" else (2, 4)

    found = [contender for setting in arguments.settings for contender in contenders(setting, arguments.only)]
    if not found:
        sys.exit(f"error: no contender contains {arguments.only!r}")
    rates = machine_rates(arguments.device, dict.fromkeys(contender.precision for contender in found))
    for precision, matrix in rates.matrix.items():
        print(f"{precision}: {matrix / 1e12:.3g} TFLOP/s", end="   ")
    print(f"copy: {rates.copy / 1e9:.3g} GB/s   torch {torch.__version__}")
    records = []
    for setting in arguments.settings:
        work = count_work(setting)
        if setting.device == "cuda":  # the contenders are other processes and need the memory
            gc.collect()
            torch.cuda.empty_cache()
        device, model, imsize, batch_size = setting
        print(f"\n{device}, {model}, {imsize}x{imsize}, batch {batch_size}: {work.flop / 1e9:.0f} GFLOP per step\n")
        rows = measure(setting, contenders(setting, arguments.only), arguments.rounds, warm_up, block)
        add_ratios(rows, floors_ms(work, rates))
        print(table(rows), flush=True)
        records += rows
    if arguments.json:
        arguments.json.write_text(json.dumps(records, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
