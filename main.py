"""Train SAGAN, or evaluate a checkpoint.

python main.py --dataset celeb --imsize 64          # train; results in ./samples ./attn ./models ./logs
python main.py --pretrained_model latest            # resume
python main.py --train false                        # samples and attention figures of the latest checkpoint
python main.py --dataset toy --batch_size 16        # try it without any data
torchrun --nproc_per_node=8 main.py ...             # train on eight GPUs; --parallel true uses all there are
python main.py --help                               # all options
"""

import os
import signal
import sys
from typing import TYPE_CHECKING

from errors import UserError, exit_code, silence_other_ranks, warn
from parameter import Config, get_parameters

if TYPE_CHECKING:
    import torch

    from data_loader import Loader


def main() -> int:
    """Run this process's command line. Returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a path may have characters that the terminal's encoding lacks
    try:
        with silence_other_ranks():
            config = get_parameters()
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # before the training loop: clean up and end
            return run(config)
    except (Exception, KeyboardInterrupt) as error:
        return exit_code(error)


def run(config: Config) -> int:
    """Train or evaluate, in this process, in several that it starts, or as one of several. Returns the exit code."""
    # Imported here, so that --help and bad options need not wait seconds for torch.
    import torch

    from tester import Tester
    from trainer import Trainer
    from training.distributed import launch, process_group, processes_to_start
    from utils import resolve_device, tune_malloc

    if config.parallel and config.train and (processes := processes_to_start(config.device)) > 1:
        return launch(processes)
    with process_group(config.device) as ranks:
        with ranks.raise_together():
            device = resolve_device(config.device, ranks.local_rank if ranks.size > 1 else None)
        if config.tune_malloc and device.type == "cpu":
            tune_malloc()
        torch.manual_seed(config.seed)
        if config.train:
            loader = ranks.rank_zero_first(lambda: make_loader(config, device))
            return Trainer(loader, config, ranks).train()
        return ranks.on_rank_zero(lambda: Tester(config, open_loader_if_any(config, device)).test())


def make_loader(config: Config, device: "torch.device") -> "Loader":
    """Return the loader of the training images, not yet opened."""
    from data_loader import Loader
    from datasets.sources import find_source

    source = find_source(config.dataset, config.image_path, config.crop_size, config.download, config.toy_num,
                         config.seed)  # fmt: skip
    return Loader(source, config.imsize, config.batch_size, cache_path=config.cache_path, hflip=config.hflip,
                  num_workers=config.num_workers, seed=config.seed, device=device)  # fmt: skip


def open_loader_if_any(config: Config, device: "torch.device") -> "Loader | None":
    """Return the opened loader, or None without training images, if no --metrics need them."""
    try:
        return make_loader(config, device).open()
    except UserError as error:
        if config.metrics:
            raise
        warn(f"{error}. Without training images, nearest.png and D's maps of real images are skipped")
        return None


if __name__ == "__main__":
    code = main()
    if "WORLD_SIZE" in os.environ:
        # Without the interpreter's own end, in which a thread of gloo may abort the process (pytorch issue 190489).
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)
