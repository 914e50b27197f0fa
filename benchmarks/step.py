"""How fast a training step is: ours in each precision and mode, against a textbook step and the machine's floor.

    python benchmarks/step.py                                           # batch 64 at 64x64
    python benchmarks/step.py --batch_size 16,256 --imsize 64,128 --json results.json

Every contender lives in a process of its own (allocator and thread settings belong to a process), started once and
asked for some steps in turn, A B C A B C ..., so that the machine's drift hits all alike. Times are medians over all
rounds, the spread is the distance between the quartiles. See benchmarks/floor.py for the floor.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]


class Setting(NamedTuple):
    """What a table is about."""

    device: str
    imsize: int
    batch_size: int


class Contender(NamedTuple):
    """One way to run the step."""

    name: str
    precision: str
    mode: str


def contenders(setting: Setting, only: str = "") -> list[Contender]:
    """What there is to compare, or those whose words, as in "ours bf16 graph", contain `only`.

    The textbook step exists at 64x64 only.
    """
    on_cuda = setting.device == "cuda"
    found = [Contender("baseline", "fp32", "eager")] if setting.imsize == 64 else []
    for precision in ("fp32", "tf32", "bf16") if on_cuda else ("fp32", "bf16"):
        found += [Contender("ours", precision, mode) for mode in (("eager", "graph") if on_cuda else ("eager",))]
    return [contender for contender in found if only in " ".join(contender)]


def build_step(contender: Contender, setting: Setting) -> Callable[[], Any]:
    """A function that takes one step on fixed inputs, the same for all contenders."""
    import torch
    from baseline import Baseline

    from parameter import Config
    from trainer import Trainer

    torch.manual_seed(0)
    device, size = torch.device(setting.device), setting.batch_size
    real = torch.rand(size, 3, setting.imsize, setting.imsize).mul(2).sub(1).to(device)
    z, z2 = torch.randn(2, size, 128).to(device)
    if contender.name == "baseline":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        baseline = Baseline(setting.device)
        return lambda: baseline.d_step(real, z) | baseline.g_step(z2)
    graph = "true" if contender.mode == "graph" else "false"
    config = Config(**setting._asdict(), precision=contender.precision, cuda_graph=graph)
    trainer = Trainer(None, config)
    real = real.contiguous(memory_format=torch.channels_last)  # as the loader gives it

    def step() -> dict[str, torch.Tensor]:
        stats = trainer.run_updates([real], [z, z2])
        trainer.ema.update(trainer.step)
        return stats

    return step


def synchronize(device: str) -> None:
    """Waits until the device is idle; a CPU always is."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def serve(pipe: Connection, contender: Contender, setting: Setting, warm_up: int, block: int) -> None:
    """A contender's process: answers each request with the ms per step of a block of steps, and 0 with its memory."""
    import torch

    from utils import memory_mib, tune_malloc

    if contender.name == "ours":
        tune_malloc()
    step = build_step(contender, setting)
    for _ in range(warm_up):
        step()
    pipe.send("ready")
    while pipe.recv():
        synchronize(setting.device)
        start = time.perf_counter()
        for _ in range(block):
            step()
        synchronize(setting.device)
        pipe.send((time.perf_counter() - start) / block * 1e3)
    pipe.send(memory_mib(torch.device(setting.device)))


def measure(setting: Setting, found: list[Contender], rounds: int, warm_up: int, block: int) -> list[dict[str, Any]]:
    """Contenders in one setting: a record for each."""
    context = multiprocessing.get_context("spawn")
    running = []
    for contender in found:
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, contender, setting, warm_up, block), daemon=True)
        process.start()
        theirs.close()  # so that a contender that dies is noticed
        running.append((contender, ours, []))
        ours.recv()
    for _ in range(rounds):
        for _, pipe, times in running:
            pipe.send(True)
            times.append(pipe.recv())
    records = []
    for contender, pipe, times in running:
        pipe.send(False)
        low, middle, high = statistics.quantiles(times, n=4)
        records.append(setting._asdict() | contender._asdict() | {
            "ms_per_step": middle, "spread_ms": high - low, "images_per_s": setting.batch_size / middle * 1e3,
            "peak_mib": pipe.recv()})  # fmt: skip
    return records


def add_ratios(records: list[dict[str, Any]], floors: dict[str, float]) -> None:
    """To each record of a setting: how many times faster than the baseline, and the floor's share of its time."""
    baseline = next((record["ms_per_step"] for record in records if record["name"] == "baseline"), None)
    for record in records:
        record["ratio"] = baseline / record["ms_per_step"] if baseline else None
        record["floor_share"] = floors[record["precision"]] / record["ms_per_step"]


def table(records: list[dict[str, Any]]) -> str:
    """The records of a setting as a Markdown table."""
    lines = ["| step | ms/step (spread) | images/s | ratio | of the floor | peak MiB |", "|---|---|---|---|---|---|"]
    for r in records:
        name = r["name"] if r["name"] == "baseline" else f"ours, {r['precision']}, {r['mode']}"
        ratio = f"{r['ratio']:.2f}x" if r["ratio"] else "-"
        lines.append(f"| {name} | {r['ms_per_step']:.2f} ({r['spread_ms']:.2f}) | {r['images_per_s']:.0f} | {ratio} "
                     f"| {r['floor_share']:.0%} | {r['peak_mib']:.0f} |")  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    import torch
    from floor import floors_ms, machine_rates, step_work

    has_cuda = torch.cuda.is_available()
    numbers = lambda text: [int(word) for word in text.split(",")]  # noqa: E731
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if has_cuda else "cpu")
    parser.add_argument("--imsize", type=numbers, default=[64], help="one or more, with commas")
    parser.add_argument("--batch_size", type=numbers, default=[64], help="one or more, with commas")
    parser.add_argument("--only", default="", help='contenders whose words contain this, such as "ours bf16"')
    parser.add_argument("--rounds", type=int, default=20 if has_cuda else 7, help="times each contender is asked")
    parser.add_argument("--json", type=Path, help="write one record a row to this file")
    arguments = parser.parse_args()
    warm_up, block = (10, 20) if arguments.device == "cuda" else (2, 1)

    rates = machine_rates(arguments.device)
    for precision, matrix in rates.matrix.items():
        print(f"{precision}: {matrix / 1e12:.3g} TFLOP/s", end="   ")
    print(f"copy: {rates.copy / 1e9:.3g} GB/s   torch {torch.__version__}")
    records = []
    for imsize in arguments.imsize:
        for batch_size in arguments.batch_size:
            setting = Setting(arguments.device, imsize, batch_size)
            work = step_work(build_step(Contender("ours", "fp32", "eager"), setting))
            if setting.device == "cuda":
                torch.cuda.empty_cache()  # the contenders are other processes, and need the memory
            print(f"\n{arguments.device}, {imsize}x{imsize}, batch {batch_size}: {work.flop / 1e9:.0f} GFLOP a step\n")
            found = measure(setting, contenders(setting, arguments.only), arguments.rounds, warm_up, block)
            add_ratios(found, floors_ms(work, rates))
            print(table(found), flush=True)
            records += found
    if arguments.json:
        arguments.json.write_text(json.dumps(records, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
