"""What torchrun, or another launcher of several processes, tells this one in its environment variables."""

import os
from typing import NamedTuple

from errors import UserError

# Set by torchrun, Slurm's srun, Open MPI, and MPICH or Intel MPI.
LOCAL_RANKS = ("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")


class Launch(NamedTuple):
    """This process among those of its run: its rank, the number of ranks, and its rank on its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0


def read_launch() -> Launch:
    """Return what the environment says; a single process without a WORLD_SIZE above 1, whatever else is set.

    Raises:
        UserError: a variable is missing, or is no number in its range.
    """
    size = _read("WORLD_SIZE", 1, 2**20) if "WORLD_SIZE" in os.environ else 1
    if size == 1:
        return Launch()
    local = next((name for name in LOCAL_RANKS if name in os.environ), "LOCAL_RANK")
    missing = [name for name in ("RANK", local, "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise UserError(
            f"the environment has WORLD_SIZE={size} and no {', '.join(missing)}: start the processes with torchrun, "
            "or unset WORLD_SIZE for a single one"
        )
    _read("MASTER_PORT", 1, 2**16 - 1)
    return Launch(_read("RANK", 0, size - 1), size, _read(local, 0, size - 1))


def _read(name: str, low: int, high: int) -> int:
    text = os.environ[name]
    if not (text.isdecimal() and low <= int(text) <= high):
        raise UserError(f"the environment variable {name} must be a number from {low} to {high}, not '{text}'")
    return int(text)
