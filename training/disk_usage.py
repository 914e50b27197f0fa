"""What a run will leave on the disk, told at its start: a default run on CelebA leaves some 20 GB."""

import math
import os
import shutil
from collections.abc import Iterable

from torch import nn
from tqdm import tqdm

from errors import warn
from parameter import Config

# Bytes, measured on faces: PNGs of photographs hardly depend on what is in them.
FIGURE_ROW = 100_000  # of an attention figure, per image
LOG_ENTRY = 600  # of metrics.jsonl
EVENTS_ENTRY = 3000  # of TensorBoard's files, without images
PAGES = 14_000_000  # the explorer and the report, at most
LAYERS = {"sagan": 4, "paper": 2}  # attention layers of both networks


def report_disk_usage(config: Config, step: int, save_step: int, networks: Iterable[nn.Module]) -> None:
    """Print what a run will write in all, and what is free; warn of a disk that is too small.

    Args:
        step: finished steps at the start.
        save_step: steps between checkpoints.
        networks: G and D.
    """
    sizes = [sum(tensor.nbytes for tensor in network.state_dict().values()) for network in networks]
    expected = expected_bytes(config, step, save_step, *sizes)
    contents: dict[int, list[str]] = {}  # by file system
    try:
        for name, folder in config.folders.items():
            contents.setdefault(os.stat(folder).st_dev, []).append(name)
        free = {device: shutil.disk_usage(config.folders[names[0]]).free for device, names in contents.items()}
    except OSError:  # a file system that does not tell
        return
    print(
        f"disk: the results will take about {_format(sum(expected.values()))} ("
        + ", ".join(f"{name} {_format(size)}" for name, size in expected.items())
        + f"); free: {', '.join(map(_format, free.values()))}"
    )
    for device, names in contents.items():
        if sum(expected[name] for name in names) > free[device]:
            warn(
                f"the disk of {config.folders[names[0]]} is too small for the run's {', '.join(names)}: use "
                "--keep_samples, --keep_weights, larger --sample_step, --attn_step, --min_save_step, or another disk"
            )


def expected_bytes(config: Config, step: int, save_step: int, g_bytes: int, d_bytes: int) -> dict[str, int]:
    """Return about how many bytes a run will have written after `step`, by content as in `config.folders`.

    Args:
        step: finished steps at the start.
        save_step: steps between checkpoints.
        g_bytes, d_bytes: of the networks.
    """

    def count(interval: int, keep: int = 0) -> int:
        """Return how often something is due that comes at each interval and after the last step."""
        times = math.ceil(config.total_step / interval) - step // interval
        return min(times, keep) if keep else times

    real = config.sample_folder / "real.png"  # as large as a sample grid
    grid_bytes = real.stat().st_size if real.exists() else config.batch_size * config.imsize**2 * 3
    weights_bytes = g_bytes + d_bytes
    state_bytes = weights_bytes + g_bytes + 2 * weights_bytes  # both networks, the EMA, and Adam's two moments
    layers = LAYERS[config.model] if config.attention == "full" else 0
    grids, figures = 2 * grid_bytes, layers * config.g_num * FIGURE_ROW  # per step; grids of G and of its EMA
    weights = count(save_step, config.keep_weights and config.keep_weights + config.keep_checkpoints)
    logs = count(config.log_step) * LOG_ENTRY + PAGES
    if config.use_tensorboard:  # which holds all images once more
        logs += count(config.log_step) * EVENTS_ENTRY + count(config.sample_step) * grids
        logs += count(config.attn_step) * figures
    return {
        "samples": count(config.sample_step, config.keep_samples) * grids,
        "attention": count(config.attn_step, config.keep_samples) * figures,
        "checkpoints": weights * weights_bytes + count(save_step, config.keep_checkpoints) * state_bytes,
        "logs": logs,
    }


def _format(size: int) -> str:
    return tqdm.format_sizeof(size, "B")
