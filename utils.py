"""Devices, precision, memory, seeds, pixels, modes of networks, atomic writes, files named by step, progress bars."""

import ctypes
import errno
import io
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from errors import UserError, warn, warn_once

# What `derive_seed` is given beside the run's seed, so that each use has random numbers of its own: training steps,
# the fixed z of sample grids, --metrics, the samples and interpolations of --train false, the classes of --metrics, and
# augmented.png.
SEED_STEP, SEED_FIXED_Z, SEED_METRICS, SEED_SAMPLES, SEED_INTERPOLATION, SEED_METRICS_LABELS, SEED_AUGMENTED = range(7)

STEP = "(0|[1-9][0-9]*)"  # the pattern of a step in a file's name
LINE_SECONDS = 10  # between two lines of progress where stderr is no terminal
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # glibc's malloc.h

Item = TypeVar("Item")


def setup_device(name: str, local_rank: int | None = None) -> torch.device:
    """Return the device of that name, and make a CUDA device the current one.

    Args:
        name: auto (CUDA if available, else the CPU), cpu, cuda, cuda:N or mps.
        local_rank: rank of this process on its machine, which is the index of its GPU; None for a single process.

    Raises:
        UserError: the device is not available, or cannot be shared by several processes.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if local_rank is not None and (device.type == "mps" or device.index is not None):
        raise UserError(f"--device {name} is a single device and there are several processes: use --device cuda or cpu")
    if device.type == "cuda":
        index = local_rank if local_rank is not None else device.index or 0
        if index >= torch.cuda.device_count():
            raise UserError(
                f"--device {name} needs CUDA device {index}, and torch finds {torch.cuda.device_count()}: use "
                + ("--device auto" if local_rank is None else "one process per GPU, or --device cpu")
            )
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)  # streams and graphs are created on the current device
    elif device.type == "mps":
        if not torch.backends.mps.is_available():
            raise UserError("--device mps: torch finds no MPS device; use --device auto")
        warn_once("--device mps is untested: losses and attention maps may be wrong")
    return device


def conv_memory_format(device: torch.device, precision: str) -> torch.memory_format:
    """Return the memory format of networks and images in which convolutions are fast.

    On CUDA, tensor cores want channels last, and the kernels without them, those of fp32, contiguous tensors. On MPS,
    channels last is slow, and BatchNorm's gradients were wrong in it.
    """
    channels_last = device.type == "cpu" or (device.type == "cuda" and precision != "fp32")
    return torch.channels_last if channels_last else torch.contiguous_format


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return a context in which forwards are computed in bf16 if that is the precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def _cpu_has_bf16() -> bool:
    """Return whether the CPU has bf16 matrix instructions; True on systems without /proc/cpuinfo."""
    cpuinfo = Path("/proc/cpuinfo")
    return not cpuinfo.exists() or "bf16" in cpuinfo.read_text()  # avx512_bf16, amx_bf16, or ARM's bf16


def set_backends(device: torch.device, precision: str, deterministic: bool) -> str:
    """Apply `--precision` and `--deterministic` to torch, before the device is used.

    Returns:
        fp32, tf32 or bf16; auto is bf16 on a GPU with bf16 tensor cores (compute capability 8.0 or higher), else fp32.

    Raises:
        UserError: tf32, or bf16 on CUDA, without such a GPU. Torch would run bf16 there, in slow kernels.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is not deterministic otherwise
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid, and slow
    # Shapes never change, so cuDNN may search for its fastest algorithms, unless runs must be repeatable.
    torch.backends.cudnn.benchmark = device.type == "cuda" and not deterministic
    has_tensor_cores = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if precision == "auto":
        precision = "bf16" if has_tensor_cores else "fp32"
    if not has_tensor_cores and (precision == "tf32" or (precision == "bf16" and device.type == "cuda")):
        raise UserError(f"--precision {precision} needs an NVIDIA GPU of compute capability 8.0 (Ampere) or higher")
    if precision == "bf16" and device.type == "cpu" and not _cpu_has_bf16():
        warn("this CPU has no bf16 instructions: --precision fp32 is faster")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    return precision


def tune_malloc() -> None:
    """Make glibc keep freed memory for the next step. Must be called before the first large tensor.

    By default every large tensor is mapped anew and zeroed page by page in each step. Does nothing without glibc.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    for parameter, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**28)):
        mallopt(parameter, value)


def memory_mib(device: torch.device) -> float:
    """Return the peak memory so far in MiB: of tensors on a GPU, else of the process; 0 on Windows.

    On Linux the process's peak is never below that of the process that started it.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if sys.platform == "win32":
        return 0.0
    import resource  # not on Windows

    bytes_per_unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * bytes_per_unit / 2**20


def check_writable(folder: Path) -> None:
    """Check that a folder can be created or written to, without creating it.

    Raises:
        UserError: it cannot.
    """
    try:
        existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    except (OSError, StopIteration) as error:  # StopIteration: a drive of Windows that is not there
        raise UserError(f"cannot write to {folder}: {getattr(error, 'strerror', 'no such drive')}") from error
    if not existing.is_dir():
        raise UserError(f"cannot write to {folder}: {existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to {folder}: no permission to write to {existing}")


def flush_to_disk(descriptor: int) -> None:
    """Flush an open file or folder to the disk; a warning where the file system refuses, as some network mounts do.

    Raises:
        OSError: the disk is full or broken.
    """
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        warn_once("this file system cannot flush to the disk: a power failure may lose the newest results")


def write_atomically(contents: Mapping[Path, bytes | memoryview]) -> None:
    """Write files of one folder under temporary names and flush them to the disk, then rename them in their order.

    Whatever interrupts it, each file is as it was before or complete, and none is there before those in front of it.

    Raises:
        OSError: a file cannot be written; none is changed then.
    """
    temporary = {path: path.with_name(f"{path.name}.tmp") for path in contents}
    try:
        for path, content in contents.items():
            with open(temporary[path], "wb") as file:
                file.write(content)
                file.flush()
                flush_to_disk(file.fileno())
        for path in contents:
            os.replace(temporary[path], path)
        if os.name == "posix":  # Windows cannot open folders; a power failure could undo a rename otherwise
            descriptor = os.open(next(iter(contents)).parent, os.O_RDONLY)
            try:
                flush_to_disk(descriptor)
            finally:
                os.close(descriptor)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


def derive_seed(*numbers: int) -> int:
    """Return one well-mixed seed in [0, 2^63) from several numbers, such as a run's seed and a step."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


def to_uint8(images: Tensor) -> Tensor:
    """Round images (B, 3, S, S) in [-1, 1] to the pixels of a saved image, uint8."""
    return images.float().add(1).mul(127.5).round().clamp(0, 255).byte()


@contextmanager
def eval_mode(*networks: nn.Module) -> Iterator[None]:
    """Put networks in evaluation mode without gradients; those that were in training mode are again at the end."""
    training = [network for network in networks if network.training]
    for network in training:
        network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for network in training:
            network.train()


@contextmanager
def no_param_grads(network: nn.Module) -> Iterator[None]:
    """Switch off the gradients of a network's parameters; on again at the end."""
    network.requires_grad_(False)
    try:
        yield
    finally:
        network.requires_grad_(True)


def files_by_step(folder: Path, ending: str) -> dict[int, Path]:
    """Return the files `{step}_{ending}` of a folder by step, in ascending order; {} if there is no such folder."""
    pattern = re.compile(rf"{STEP}_{re.escape(ending)}")
    matches = (pattern.fullmatch(path.name) for path in folder.glob("*"))
    return {step: folder / name for step, name in sorted((int(match[1]), match[0]) for match in matches if match)}


def evenly_spaced(items: Sequence[Item], count: int) -> list[Item]:
    """Return `count` items with even distances, first and last included; all items if there are fewer."""
    if len(items) <= count:
        return list(items)
    return [items[round(index * (len(items) - 1) / (count - 1))] for index in range(count)]


def progress(items: Iterable[Any] | None, title: str, unit: str, total: int | None = None) -> tqdm:
    """Return a progress bar around `items`: shown after a second, removed at the end. See `bar_options`."""
    return tqdm(items, title, total, unit=unit, leave=False, delay=1, miniters=1, **bar_options())


def bar_options() -> dict[str, Any]:
    """Return tqdm's options for stderr: a bar on a terminal; whole lines in a file or a pipe, one every 10 s."""
    if sys.stderr.isatty():
        return {"dynamic_ncols": True, "mininterval": 0.1}
    return {"file": _LineStream(), "mininterval": LINE_SECONDS}


class _LineStream(io.TextIOBase):
    """Prints what tqdm writes, a bar after each carriage return, as lines on stderr."""

    def write(self, text: str) -> int:
        if bar := text.replace("\x1b[A", "").strip():  # with a second bar tqdm moves the cursor up
            print(bar, file=sys.stderr, flush=True)
        return len(text)
