"""Several processes that train one model: which one this is, its part of a batch, and what they tell each other.

    torchrun --nproc_per_node=2 main.py ...

They mean the same as one: each sees its part of the batch that one process would, and their gradients are averaged.
A process alone is a `Ranks()`, in which everything here is the identity and costs nothing.
"""

import os
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from errors import PeerFailed, UserError
from networks.sync_batchnorm import SyncBatchNorm2d
from training.lifeline import lifeline

T = TypeVar("T")
STEP_TIMEOUT = timedelta(minutes=5)  # for what all do at the same time; a death is noticed sooner
WAIT_TIMEOUT = timedelta(days=7)  # for what rank 0 may do alone: build the cache, evaluate
BUCKET_MB = 4  # of gradients to send at once: torch's 25 hold most of a network's, and leave when backward is over
SYNC_SECONDS = 1  # between two meetings; a signal to stop waits for the next one
LOST = ("closed by peer", "reset by peer", "broken pipe", "timed out waiting", "gloo/transport")


class RankLost(Exception):
    """Another process of the run is gone, or does not answer; says so with the words of the error that told."""

    def __init__(self, error: Exception | str):
        reason = " ".join(str(error).split())[:200]
        rank = os.environ["RANK"]
        super().__init__(f"process {rank}: another process of the run is gone or does not answer; {reason}")


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, seen from one of them.

    Every method but `part` has to be called by all of them, in the same order.

    Attributes:
        rank: number of this process; 0 speaks and writes for all.
        size: how many there are.
        local_rank: number of this process on its machine.
        waiting: the group in which they wait for each other without a time limit, through main memory.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    waiting: Any = None

    @property
    def is_rank_zero(self) -> bool:
        return self.rank == 0

    def shard(self, batch_size: int) -> slice:
        """Which images of a batch are this process's.

        Raises:
            UserError: they cannot be shared out evenly.
        """
        share, left_over = divmod(batch_size, self.size)
        if left_over:
            raise UserError(
                f"--batch_size {batch_size} is that of all {self.size} processes together, and must be a multiple of "
                f"{self.size}, such as {(share + 1) * self.size}"
            )
        return slice(self.rank * share, (self.rank + 1) * share)

    def convert_sync_batchnorm(self, network: nn.Module, device: torch.device) -> nn.Module:
        """The network with BatchNorm over the batches of all processes; to be called before it is used."""
        if self.size == 1:
            return network
        if device.type == "cuda":
            return nn.SyncBatchNorm.convert_sync_batchnorm(network)
        for parent in [module for module in network.modules() if not isinstance(module, nn.BatchNorm2d)]:
            for name, layer in parent.named_children():
                if isinstance(layer, nn.BatchNorm2d):
                    shared = SyncBatchNorm2d(layer.num_features, layer.eps, layer.momentum)
                    shared.load_state_dict(layer.state_dict())
                    setattr(parent, name, shared)
        return network

    def wrap_ddp(self, network: nn.Module) -> nn.Module:
        """What to call in a network's place, so that backward averages its gradients over the processes.

        Buffers are not sent around: all processes compute the same ones.
        """
        if self.size == 1:
            return network
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)  # its successor is too new
            return DistributedDataParallel(network, broadcast_buffers=False, bucket_cap_mb=BUCKET_MB)

    def mean(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Each of these 0-d tensors, averaged over the processes."""
        if self.size == 1:
            return values
        sums = torch.stack(list(values.values()))
        dist.all_reduce(sums)
        return dict(zip(values, (sums / self.size).unbind(), strict=True))

    def max(self, number: int) -> int:
        """The largest of the processes' numbers."""
        return number if self.size == 1 else -self._smallest(-number)

    def all_equal(self, number: int) -> bool:
        """Whether all ranks have the same number."""
        if self.size == 1:
            return True
        return self._smallest(number) == self.max(number)

    @contextmanager
    def raise_together(self) -> Iterator[None]:
        """Where one process raises inside, all do after it: the first of those its own error, the others `PeerFailed`.

        Inside, nothing may wait for the other processes.
        """
        if self.size == 1:
            yield
            return
        error = None
        try:
            yield
        except Exception as caught:
            error = caught
        failed = self._smallest(self.size if error is None else self.rank)
        if failed == self.rank:
            raise error
        if failed < self.size:
            raise PeerFailed(f"process {failed} failed")

    def on_rank_zero(self, work: Callable[..., T], *arguments: Any) -> T:
        """Lets rank 0 alone work while the others wait; all get its result, or fail if it does."""
        if self.size == 1:
            return work(*arguments)
        with self.raise_together():
            results = [work(*arguments) if self.is_rank_zero else None]
        dist.broadcast_object_list(results, src=0, group=self.waiting)
        return results[0]

    def rank_zero_first(self, work: Callable[[], T]) -> T:
        """Lets all work, but rank 0 first, then one process of each other machine, then the rest.

        What one of them builds on the disk the next ones find built, whether machines share that disk or not.
        """
        if self.size == 1:
            return work()
        turn = 0 if self.is_rank_zero else 1 if self.local_rank == 0 else 2
        for now in range(3):
            with self.raise_together():
                if now == turn:
                    result = work()
        return result

    def _smallest(self, number: int) -> int:
        value = torch.tensor(number)
        dist.all_reduce(value, dist.ReduceOp.MIN, group=self.waiting)
        return value.item()


class SyncSchedule:
    """After which steps the processes of a run turn from their steps to each other: about once a second.

    Between many machines that takes about as long as a step on a GPU. A process alone may look up after every step.
    """

    def __init__(self, ranks: Ranks, step: int):
        self._ranks = ranks
        self._last, self._next = (step, time.perf_counter()), step + 1

    def is_due(self, step: int) -> bool:
        return self._ranks.size == 1 or step >= self._next

    def done(self, step: int) -> None:
        """To be called by all after each meeting, also one that was held before it was due."""
        now, (step_then, then) = time.perf_counter(), self._last
        pace = (step - step_then) / (now - then)  # steps a second; too low if the meeting took long, but not for long
        self._last, self._next = (step, now), step + self._ranks.max(max(1, round(SYNC_SECONDS * pace)))


@contextmanager
def process_group(device: str) -> Iterator[Ranks]:
    """The ranks of this process: the processes that torchrun started together, or itself alone.

    Args:
        device: `--device`; CUDA devices talk through NCCL, others through gloo.

    Raises:
        RankLost: another process is gone, which shows in whatever waits for it.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield Ranks()
        return
    on_cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=STEP_TIMEOUT))
        store = dist.PrefixStore(_meet(store, rank, size), store)
        dist.init_process_group(
            "nccl" if on_cuda else "gloo", store=store, rank=rank, world_size=size, timeout=STEP_TIMEOUT
        )
        waiting = dist.new_group(backend="gloo", timeout=WAIT_TIMEOUT)
        with lifeline(store, rank, size, STEP_TIMEOUT.total_seconds(), _no_goodbye):
            yield Ranks(rank, size, int(os.environ["LOCAL_RANK"]), waiting)
    except RuntimeError as error:
        if not _is_lost_peer(error):
            raise
        raise RankLost(error) from error
    dist.destroy_process_group()


def _no_goodbye() -> None:
    give_up(RankLost("it ended without a goodbye"))


def give_up(error: RankLost) -> NoReturn:
    """Says so and ends this process at once: an orderly end would wait for the others."""
    print(f"error: {error}", file=sys.__stderr__, flush=True)
    sys.stdout.flush()
    os._exit(1)


def _meet(store: dist.Store, rank: int, size: int) -> str:
    """A name for this attempt of the run, the same in all its processes and never given before.

    torchrun keeps its store when it starts processes anew, so that they would find the addresses of those that died
    (pytorch issue 135712). Rank 0 therefore answers every call that it finds there, the old ones too, until all who
    got an answer are together; nobody reads the answers to the old ones.
    """
    mine = uuid.uuid4().hex
    if rank:
        store.set(f"call/{rank}", mine)
        name = store.get(f"answer/{mine}").decode()  # waits for it
        store.add(f"here/{name}", 1)
        return name
    deadline = time.monotonic() + STEP_TIMEOUT.total_seconds()
    while store.add(f"here/{mine}", 0) < size - 1:
        for other in range(1, size):
            if store.check([f"call/{other}"]):
                store.set(f"answer/{store.get(f'call/{other}').decode()}", mine)
        if time.monotonic() > deadline:
            raise dist.DistNetworkError("not all processes of the run came")
        time.sleep(0.02)
    return mine


def _is_lost_peer(error: Exception) -> bool:
    """Whether an error comes from the talk between processes, which says so in words only."""
    return isinstance(error, dist.DistError) or any(words in str(error).lower() for words in LOST)


def processes_to_start(device: str) -> int:
    """How many processes `--parallel true` means here: one for each visible GPU; says so. 1 is this one alone."""
    if "WORLD_SIZE" in os.environ:  # this is one of them
        return 1
    gpus = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    if gpus > 1:
        print(f"--parallel true starts {gpus} processes, one for each visible GPU")
        return gpus
    reason = "there is one GPU" if gpus else "there is no GPU" if device in ("auto", "cuda") else f"it is on {device}"
    print(f"--parallel true changes nothing here: {reason}")
    return 1


def launch(processes: int) -> int:
    """Runs the command line of this process in several ones on this machine; returns the exit code.

    It is what `torchrun --standalone --nproc_per_node=processes` does.
    """
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    arguments = run.parse_args(["--standalone", f"--nproc_per_node={processes}", *sys.argv])
    try:
        run.run(arguments)
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code >= 0 else 128 - code  # it was killed by a signal
    except SignalException as error:
        return 128 + error.sigval
    return 0
