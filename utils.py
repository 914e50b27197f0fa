"""Devices, seeds, the averaged generator, and stopping on a signal."""

import copy
import ctypes
import os
import re
import signal
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from errors import UserError, warn

# Streams of random numbers from one seed: those of each step, the z that samples show, what --metrics are of, and what
# --train false shows.
SEED_STEP, SEED_FIXED_Z, SEED_METRICS, SEED_SAMPLES, SEED_INTERPOLATION = range(5)

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # glibc's malloc.h

Item = TypeVar("Item")


def resolve_device(name: str, local_rank: int | None = None) -> torch.device:
    """The device of that name; "auto" takes CUDA, else Apple's MPS, else the CPU.

    Args:
        name: auto, cpu, cuda, cuda:N or mps.
        local_rank: the number of this process on its machine if it is one of several, which take a GPU each.

    Raises:
        UserError: this machine, or this build of torch, has no such device, or it is not for several processes.
    """
    alone = local_rank is None
    if name == "auto":
        mps = alone and torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    device = torch.device(name)
    if not alone and (device.type == "mps" or device.index is not None):
        raise UserError(f"--device {name} is one device, and there are several processes: choose cpu or cuda")
    if not alone and device.type == "cuda":
        device = torch.device("cuda", local_rank)
    available = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}[
        device.type
    ]
    if (device.index or 0) >= available:
        raise UserError(
            f"--device {name}: torch sees {available} {device.type.upper()} device{'s' * (available != 1)} here; "
            + ("--device auto takes what there is" if alone else f"process {local_rank} of this machine has none")
        )
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)  # streams and graphs are made on the current one
    return device


def check_writable(folder: Path) -> None:
    """Looks whether a folder can be written or made, without making it.

    Raises:
        UserError: it cannot.
    """
    try:
        existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from error
    if not existing.is_dir():
        raise UserError(f"cannot write to {folder}: {existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to {folder}: {existing} is read-only for this user")


def tune_malloc() -> None:
    """Makes glibc keep freed memory for the next step instead of returning it to the system page by page.

    The big maps of a step are otherwise mapped and zeroed anew each time. Does nothing where there is no glibc. To be
    called before the first large tensor.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    for parameter, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**28)):
        mallopt(parameter, value)


def memory_mib(device: torch.device) -> float:
    """Peak memory so far in MiB: tensors on a GPU; of the whole process elsewhere, 0 where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count the process that started this one too
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text()).group(1)) / 1024
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def resolve_precision(name: str, device: torch.device) -> str:
    """Resolves --precision to fp32, tf32 or bf16, and sets torch's switches for it.

    auto is bf16 on a GPU with bf16 matrix units (compute capability 8.0 and up), fp32 elsewhere.

    Raises:
        UserError: tf32 on a device without it.
    """
    has_tensor_cores = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if name == "auto":
        name = "bf16" if has_tensor_cores else "fp32"
    if name == "tf32" and not has_tensor_cores:
        raise UserError(f"--precision tf32 needs an NVIDIA GPU of the Ampere generation or later, not {device}")
    if name == "bf16" and device.type == "cpu" and not _cpu_has_bf16():
        warn("this processor has no bf16 arithmetic: --precision fp32 is faster here")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = name == "tf32"
    return name


def _cpu_has_bf16() -> bool:
    """Whether the processor multiplies bf16 matrices itself; True where the system does not tell."""
    cpuinfo = Path("/proc/cpuinfo")
    return not cpuinfo.exists() or "bf16" in cpuinfo.read_text()  # avx512_bf16, amx_bf16, or ARM's bf16


def make_deterministic() -> None:
    """Restricts torch to operations whose results can be repeated bit for bit. To be called before CUDA is used."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS may otherwise share its sums out anew
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # only for finding bugs, and slow


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch could not get memory: on a GPU it says so by the error's type, on a CPU in words."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def clone_tensors(tree: Any) -> Any:
    """A copy of nested dicts and lists in which every tensor is a copy too: what a background job may keep."""
    if isinstance(tree, Tensor):
        return tree.detach().clone()
    if isinstance(tree, Mapping):
        return {key: clone_tensors(value) for key, value in tree.items()}
    return [clone_tensors(value) for value in tree] if isinstance(tree, list) else tree


def derive_seed(*numbers: int) -> int:
    """One well-mixed seed from several numbers, such as a run's seed and a step."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the rate of all groups; where it is a tensor, in place, because a recorded step reads that tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


@contextmanager
def eval_mode(*networks: nn.Module) -> Iterator[None]:
    """Networks in evaluation mode and without gradients inside, in training mode again after."""
    for network in networks:
        network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for network in networks:
            network.train()


@contextmanager
def no_param_grads(network: nn.Module) -> Iterator[None]:
    """A network whose parameters need no gradients inside, and need them again after."""
    network.requires_grad_(False)
    try:
        yield
    finally:
        network.requires_grad_(True)


class EMA:
    """An exponential moving average of a generator, `network`, which makes better images than the newest weights.

    Weights and BatchNorm statistics are averaged; counters and the singular vectors of spectral norm are copied,
    because an average of unit vectors is none. The decay grows with the steps, `(1 + step) / (10 + step)` up to
    `decay`, so that early averages are not stale.
    """

    def __init__(self, source: nn.Module, decay: float):
        self.decay = decay
        self.network = copy.deepcopy(source).requires_grad_(False)
        mine, theirs = self.network.state_dict(), source.state_dict()  # they share memory with the networks
        vectors = [key for key in mine if key.endswith(("_u", "_v"))]
        counters = [key for key in mine if key.endswith("num_batches_tracked")]
        averaged = [key for key in mine if key not in (*vectors, *counters)]
        self._averaged, self._vectors, self._counters = (
            ([mine[key] for key in keys], [theirs[key] for key in keys]) for keys in (averaged, vectors, counters)
        )

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the source's weights after update number `step`."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(*self._averaged, 1 - decay)
        torch._foreach_copy_(*self._vectors)
        torch._foreach_copy_(*self._counters)  # alone: CUDA copies lists of one type at once, mixed ones one by one


class StopSignals:
    """Turns the first SIGINT (Ctrl-C) or SIGTERM into a request to stop; a second one stops at once.

        with StopSignals() as stop:
            while not stop.received: ...

    Attributes:
        received: the signal's number, 0 so far.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self):
        self.received = 0

    def __enter__(self) -> "StopSignals":
        self._previous = {number: signal.signal(number, self._receive) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            sys.exit(128 + number)
        self.received = number


def files_by_step(folder: Path, ending: str) -> dict[int, Path]:
    """The files `{step}_{ending}` in a folder by step, in ascending order; none where there is no such folder."""
    pattern = re.compile(rf"([0-9]+)_{re.escape(ending)}")
    matches = (pattern.fullmatch(path.name) for path in folder.glob("*"))
    return {step: folder / name for step, name in sorted((int(match[1]), match[0]) for match in matches if match)}


def evenly_spaced(items: Sequence[Item], count: int) -> list[Item]:
    """`count` of the items, or all if there are fewer: the first, the last, and others evenly between them."""
    if len(items) <= count:
        return list(items)
    return [items[round(index * (len(items) - 1) / (count - 1))] for index in range(count)]


def progress(items: Iterable[Any] | None, title: str, unit: str, total: int | None = None) -> tqdm:
    """A bar around `items` that shows after a second, and is gone at the end; a log file gets few lines of it."""
    seconds = refresh_seconds()
    return tqdm(
        items, title, total, unit=unit, leave=False, delay=1, dynamic_ncols=True, mininterval=seconds, miniters=1
    )


def refresh_seconds() -> float:
    """How long a bar stays as it is: a log file is not a terminal."""
    return 0.1 if sys.stderr.isatty() else 10
