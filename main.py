"""Train SAGAN, or look at what it learned.

python main.py --dataset celeb --imsize 64          # train; results in ./samples ./attn ./models ./logs
python main.py --pretrained_model latest            # continue
python main.py --train false                        # samples and attention figures from the latest checkpoint
python main.py --dataset toy --batch_size 16        # try it without any data
torchrun --nproc_per_node=8 main.py ...             # on eight GPUs; --parallel true does the same on all there are
python main.py --help                               # all options
"""

import signal
import sys
import time
from typing import TYPE_CHECKING

from errors import PeerFailed, UserError, silence_other_ranks, warn
from parameter import Config, get_parameters

if TYPE_CHECKING:
    import torch

    from data_loader import Loader
    from training.distributed import Ranks


def main() -> int:
    """Runs the command line of this process; returns its exit code."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a path may hold what the terminal's encoding does not
    try:
        with silence_other_ranks():
            config = get_parameters()
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # while the data is decoded: clear up, then end
            return run(config)
    except PeerFailed:
        time.sleep(2)  # a launcher ends all processes when one ends: let the one speak that knows why
        return 2
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a folder that went away, a name that is too long
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before the loop, which ends in its own way, or a second one in it
        print("stopped", file=sys.stderr)
        return 130


def run(config: Config) -> int:
    """Runs `config` in this process, or in several that it starts, or as one of several; returns the exit code."""
    from training.distributed import (  # here, as all that imports torch:
        RankLost,
        give_up,
        launch,
        process_group,
        processes_to_start,
    )
    # --help and bad options do not wait for it

    if config.parallel and config.train and (processes := processes_to_start(config.device)) > 1:
        return launch(processes)
    try:
        with process_group(config.device) as ranks:
            return work(config, ranks)
    except RankLost as error:
        give_up(error)


def work(config: Config, ranks: "Ranks") -> int:
    """Trains or evaluates as `config` says, as one of the processes of `ranks`; returns the exit code."""
    import torch

    from tester import Tester
    from trainer import Trainer
    from utils import is_out_of_memory, resolve_device, tune_malloc

    with ranks.raise_together():
        device = resolve_device(config.device, ranks.local_rank if ranks.size > 1 else None)
    if config.tune_malloc and device.type == "cpu":
        tune_malloc()
    torch.manual_seed(config.seed)
    try:
        if config.train:
            return Trainer(ranks.rank_zero_first(lambda: _loader(config, device)), config, ranks).train()
        return ranks.on_rank_zero(lambda: Tester(config, _loader_if_any(config, device)).test())
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise
        raise UserError(f"out of memory on {device}: a smaller --batch_size, --imsize or network needs less") from error


def _loader(config: Config, device: "torch.device") -> "Loader":
    from data_loader import get_loader
    from datasets.sources import find_source

    source = find_source(
        config.dataset, config.image_path, config.crop_size, config.download, config.toy_num, config.seed
    )
    return get_loader(
        source,
        config.imsize,
        config.batch_size,
        cache_path=config.cache_path,
        num_workers=config.num_workers,
        seed=config.seed,
        hflip=config.hflip,
        device=device,
    )


def _loader_if_any(config: Config, device: "torch.device") -> "Loader | None":
    """A checkpoint can be looked at without the images that it was trained on."""
    try:
        return _loader(config, device)
    except UserError as error:
        if config.metrics:
            raise
        warn(f"{error}. Without training images, what compares with them is left out")
        return None


if __name__ == "__main__":
    sys.exit(main())
