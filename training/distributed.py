"""Data-parallel training: the ranks of a run, what they exchange, and how they are started.

    torchrun --nproc_per_node=2 main.py ...

Several ranks compute what a single process would: each takes its shard of the global batch, and gradients and BatchNorm
statistics are averaged over all. A single process is a `Ranks()`, for which nothing is exchanged.
"""

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from errors import PeerFailed, RankLost, UserError, stop_signals
from networks.sync_batchnorm import CpuSyncBatchNorm2d
from spectral import replace_layers

T = TypeVar("T")
STEP_TIMEOUT = timedelta(seconds=60)  # of the collectives of a step, which all ranks reach at about the same time
WAIT_TIMEOUT = timedelta(days=7)  # while rank 0 works alone: builds the cache, computes metrics, writes
BUCKET_MB = 4  # of gradients per all-reduce: torch's 25 hold most of a network's, so that nothing overlaps backward
# Set by torchrun, Slurm's srun, Open MPI, and MPICH or Intel MPI.
LOCAL_RANKS = ("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")


@dataclass(frozen=True)
class Ranks:
    """The ranks of a run, seen from one of them. All ranks must call each method but `shard`, in the same order.

    Attributes:
        rank: number of this process; rank 0 prints and writes.
        size: number of ranks (world size).
        local_rank: number of this process on its machine.
        wait_group: a gloo group with a long timeout, in which ranks wait for each other.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    wait_group: dist.ProcessGroup | None = None

    def shard(self, batch_size: int) -> slice:
        """Return the rows of a global batch that are this rank's.

        Raises:
            UserError: the batch size is not divisible by the world size.
        """
        rows, remainder = divmod(batch_size, self.size)
        if remainder:
            raise UserError(
                f"--batch_size {batch_size} (global) must be divisible by the world size {self.size}, "
                f"e.g. {(rows + 1) * self.size}"
            )
        return slice(self.rank * rows, (self.rank + 1) * rows)

    def convert_sync_batchnorm(self, network: nn.Module, device: torch.device) -> nn.Module:
        """Return the network with BatchNorm over the batches of all ranks. Must be called before it is used."""
        if self.size == 1:
            return network
        if device.type == "cuda":
            return nn.SyncBatchNorm.convert_sync_batchnorm(network)
        return replace_layers(network, nn.BatchNorm2d, CpuSyncBatchNorm2d.copy_of)

    def wrap_ddp(self, network: nn.Module) -> nn.Module:
        """Return a wrapper of the network whose backward averages the gradients over the ranks.

        Buffers are not synchronized: all ranks compute the same ones.
        """
        if self.size == 1:
            return network
        return DistributedDataParallel(network, broadcast_buffers=False, bucket_cap_mb=BUCKET_MB)

    def mean(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return each of these 0-d tensors averaged over the ranks."""
        if self.size == 1:
            return values
        sums = torch.stack(list(values.values()))
        dist.all_reduce(sums)
        return dict(zip(values, (sums / self.size).unbind(), strict=True))

    def max(self, number: int) -> int:
        """Return the largest of the ranks' numbers."""
        return -self._min(-number)

    @contextmanager
    def raise_together(self) -> Iterator[None]:
        """Raise on all ranks if one raises inside: its own error on the lowest that does, `PeerFailed` on the others.

        The ranks wait for each other at the end, and must not do so inside.
        """
        if self.size == 1:
            yield
            return
        error = None
        try:
            yield
        except Exception as caught:
            error = caught
        failed = self._min(self.size if error is None else self.rank)
        if failed == self.rank:
            raise error
        if failed < self.size:
            raise PeerFailed(f"rank {failed} failed")

    def check_equal(self, number: int, message: str) -> None:
        """Raise a `UserError` with this message if the ranks have different numbers."""
        is_same = self._min(number) == self.max(number)
        with self.raise_together():
            if not is_same:
                raise UserError(message)

    def on_rank_zero(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call a function on rank 0 while the others wait. Returns its result, or fails, on all ranks."""
        if self.size == 1:
            return function(*arguments)
        with self.raise_together():
            result = [function(*arguments) if self.rank == 0 else None]
        dist.broadcast_object_list(result, src=0, group=self.wait_group)
        return result[0]

    def rank_zero_first(self, function: Callable[[], T]) -> T:
        """Call a function on rank 0, then on one rank of each other machine, then on the rest. Returns its result.

        What the first one writes to disk is there for the others, whether or not machines share a file system.
        """
        my_turn = 0 if self.rank == 0 else 1 if self.local_rank == 0 else 2
        for turn in range(3):
            with self.raise_together():
                if turn == my_turn:
                    result = function()
        return result

    def _min(self, number: int) -> int:
        if self.size == 1:
            return number
        value = torch.tensor(number)
        dist.all_reduce(value, dist.ReduceOp.MIN, group=self.wait_group)
        return value.item()


def read_launch() -> Ranks:
    """Return this process as the environment says, not connected; a single one without a WORLD_SIZE above 1.

    Raises:
        UserError: a variable is missing or wrong.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return Ranks()
    local = next((name for name in LOCAL_RANKS if name in os.environ), "LOCAL_RANK")
    texts = {name: os.environ.get(name, "") for name in ("WORLD_SIZE", "RANK", local, "MASTER_PORT", "MASTER_ADDR")}
    *numbers, address = texts.values()
    if address and all(text.isdecimal() for text in numbers):
        size, rank, local_rank, port = map(int, numbers)
        if rank < size and local_rank < size and 0 < port < 2**16:
            return Ranks(rank, size, local_rank)
    found = ", ".join(f"{name}='{text}'" for name, text in texts.items())
    raise UserError(
        f"the environment does not describe the processes of a run ({found}): start them with torchrun, or unset "
        "WORLD_SIZE for a single one"
    )


@contextmanager
def silence_other_ranks() -> Iterator[None]:
    """Discard what is printed inside, unless this is rank 0. Raises `UserError` as `read_launch` does."""
    if read_launch().rank == 0:
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as null, redirect_stdout(null), redirect_stderr(null):
        yield


@contextmanager
def process_group(device: str) -> Iterator[Ranks]:
    """Connect the ranks that a launcher started, and yield the `Ranks` of this process.

    Args:
        device: `--device`. CUDA devices use NCCL where there is one (not on Windows), others gloo.

    Raises:
        RankLost: another rank died or does not answer. Each collective can notice it.
    """
    ranks = read_launch()
    if ranks.size == 1:
        yield ranks
        return
    on_cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=STEP_TIMEOUT))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # torchrun keeps its store over a restart, with the addresses of the ranks that died (pytorch issue 135712).
            store = dist.PrefixStore(f"restart_{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        backend = "nccl" if on_cuda and dist.is_nccl_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=STEP_TIMEOUT)
        wait_group = dist.new_group(backend="gloo", timeout=WAIT_TIMEOUT)
        with warnings.catch_warnings():
            # torch 2.14 deprecates this argument of DDP in favor of one that older versions do not have.
            warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)
            # Harmless: DDP copies the few gradients of 1x1 convolutions, whose strides are ambiguous.
            warnings.filterwarnings("ignore", "Grad strides do not match bucket view", UserWarning)
            yield replace(ranks, wait_group=wait_group)
    except RuntimeError as error:
        # gloo raises plain RuntimeErrors, which begin with the path of its source file.
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        reason = str(error).splitlines()[0]
        raise RankLost(f"rank {ranks.rank}: lost connection to another rank ({reason})") from error
    dist.destroy_process_group()


def processes_to_start(device: str, train: bool) -> int:
    """Return how many processes `--parallel true` starts, one per visible GPU; 1 if this process runs alone."""
    if "TORCHELASTIC_RUN_ID" in os.environ or read_launch().size > 1:  # this is one of them
        return 1
    gpus = torch.cuda.device_count() if train and device in ("auto", "cuda") else 0
    if gpus <= 1:
        print("--parallel true ignored: it needs --train true, --device auto or cuda, and more than one GPU")
    return max(gpus, 1)


def launch(processes: int) -> int:
    """Run the command line as `torchrun --standalone --nproc_per_node={processes}` would. Returns the exit code."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    arguments = run.parse_args(["--standalone", f"--nproc_per_node={processes}", *sys.argv])
    # By default torchrun ends at a SIGHUP that nohup lets it ignore, does not pass SIGUSR1 on as a request to stop, and
    # kills ranks 30 s after a signal, in which some cannot finish their steps and save.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    arguments.signals_to_handle = ",".join(number.name for number in stop_signals())
    try:
        run.run(arguments)
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code >= 0 else 128 - code  # killed by signal -code
    except SignalException as error:
        return 128 + error.sigval
    return 0
