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

if sys.version_info < (3, 10):  # noqa: UP036  before the imports, whose syntax older versions do not know
    sys.exit("error: Python 3.10 or newer is needed; this is Python " + sys.version.split()[0])

from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # which PYTHONSAFEPATH and python -I leave out

from errors import UserError, exit_code, handle_signals, import_optional, make_output_robust, stop_signals, warn
from parameter import Config, get_parameters, given_options

if TYPE_CHECKING:
    import torch

    from data_loader import Loader
    from trainer import Trainer
    from training.checkpoint import Checkpoint
    from training.distributed import Ranks


def main() -> int:
    """Run this process's command line. Returns the exit code."""
    make_output_robust()
    try:
        with ExitStack() as stack:
            if "WORLD_SIZE" in os.environ:  # imports torch, for which --help need not wait
                from training.distributed import silence_other_ranks

                stack.enter_context(silence_other_ranks())
            config = get_parameters()
            # Outside of the training loop, a signal ends the process at once, which cleans up.
            signals = [number for number in stop_signals() if number.name != "SIGINT"]  # that is KeyboardInterrupt
            stack.enter_context(handle_signals(lambda number, _: sys.exit(128 + number), signals))
            return run(config)
    except (Exception, KeyboardInterrupt) as error:
        return exit_code(error)


def run(config: Config) -> int:
    """Train or evaluate, in this process, in several that it starts, or as one of several. Returns the exit code."""
    # Imported here, so that --help and bad options need not wait seconds for torch.
    import torch

    from training.distributed import launch, process_group, processes_to_start
    from training.guards import NonFiniteError
    from training.resuming import non_finite_message
    from utils import set_backends, setup_device, tune_malloc

    if config.parallel and (processes := processes_to_start(config.device, config.train)) > 1:
        return launch(processes)
    with process_group(config.device) as ranks:
        ranks.check_equal(config.checksum, "the ranks have different options: start all of them with the same command")
        with ranks.raise_together():
            device = setup_device(config.device, ranks.local_rank if ranks.size > 1 else None)
            precision = set_backends(device, config.precision if config.train else "fp32", config.deterministic)
        if config.tune_malloc and device.type == "cpu":
            tune_malloc()
        torch.manual_seed(config.seed)
        if not config.train:
            return ranks.on_rank_zero(test, config, device)
        trainer = make_trainer(config, device, precision, ranks)
        print(config.summary())
        print(f"data: {trainer.loader.source.description}")
        try:
            signal_number = trainer.train()
        except NonFiniteError as error:
            raise UserError(non_finite_message(config, error)) from error
        print_outcome(config, trainer.step, signal_number)
        return 128 + signal_number if signal_number else 0


def make_trainer(config: Config, device: "torch.device", precision: str, ranks: "Ranks") -> "Trainer":
    """Check all that a training needs before any work, open its data, and return its trainer."""
    from metrics.scores import check_metrics
    from trainer import Trainer
    from training import resuming
    from training.run_folders import check_folders, warn_of_small_disk

    with ranks.raise_together():
        ranks.shard(config.batch_size)  # raises if it cannot be shared
        if config.use_tensorboard:
            import_optional("tensorboardX", "--use_tensorboard true: tensorboardX cannot be imported")
    saved = ranks.on_rank_zero(resuming.load_resume_checkpoint, config)
    loader = ranks.rank_zero_first(lambda: make_loader(config, device, precision))
    if saved:
        ranks.on_rank_zero(resuming.check_classes, saved, loader.classes)
    ranks.on_rank_zero(check_folders, config, saved.step if saved else 0)
    ranks.on_rank_zero(check_metrics, config, device)
    ranks.rank_zero_first(loader.open)
    data = loader.fingerprint
    differ = "the machines have different images or labels: copy them, or --cache_path, to all of them"
    ranks.check_equal(data["checksum"] ^ data["held_out_checksum"], differ)
    trainer = Trainer(config, loader, device, precision, ranks, saved)
    ranks.on_rank_zero(warn_of_small_disk, config, (trainer.G, trainer.D))
    if saved:
        ranks.on_rank_zero(resuming.print_differences, saved, config, data)
    return trainer


def print_outcome(config: Config, step: int, signal_number: int) -> None:
    """Print how to resume after a signal, otherwise which files to open first."""
    if signal_number:
        resume = f"checkpoint saved at step {step}. Resume with:\n  {config.command_line(pretrained_model=str(step))}"
        print(signal.Signals(signal_number).name + (f": {resume}" if step else " before the first step"))
        return
    print(f"training finished at step {step}. Open first:")
    explorer = [config.attn_folder / f"{step}_explorer.html"] if config.has_attention else []
    for path in (config.log_folder / "report.html", *explorer, config.sample_folder / f"{step}_ema.png"):
        print(f"  {path}")


def test(config: Config, device: "torch.device") -> int:
    """Evaluate a checkpoint. Returns the exit code."""
    from data_loader import load_photo
    from tester import Tester
    from training.resuming import load_test_checkpoint

    saved, config = load_test_checkpoint(config, given_options())
    photo = load_photo(config.project, config.dataset, config.crop_size, config.imsize) if config.project else None
    return Tester(config, open_loader_if_any(config, device, saved), saved, device, photo).test()


def make_loader(
    config: Config, device: "torch.device", precision: str = "fp32", saved: "Checkpoint | None" = None
) -> "Loader":
    """Return the loader of the training images, not yet opened.

    The seed of `saved`, a checkpoint to evaluate, decides which images are held out and which toy faces are drawn.
    """
    from data_loader import Loader
    from datasets.sources import find_source
    from utils import conv_memory_format

    seed = saved.state["config"]["seed"] if saved and saved.state else config.seed
    source = find_source(config.dataset, config.image_path, config.crop_size, config.download, config.toy_num,
                         seed, attribute=config.attribute, run_folders=config.folders,
                         exclude=config.output_folders)  # fmt: skip
    return Loader(source, config.imsize, config.batch_size, cache_path=config.cache_path, hflip=config.hflip,
                  num_workers=config.num_workers, seed=seed, conditional=config.conditional,
                  holdout=config.holdout, device=device,
                  memory_format=conv_memory_format(device, precision))  # fmt: skip


def open_loader_if_any(config: Config, device: "torch.device", saved: "Checkpoint") -> "Loader | None":
    """Return the opened loader, or None without images of the checkpoint's classes, if no --metrics need them."""
    from training.resuming import check_classes

    try:
        # Without --metrics, which take no batches, only the first g_num images of one are shown.
        loader = make_loader(replace(config, batch_size=min(config.batch_size, config.g_num)), device, saved=saved)
        check_classes(saved, loader.classes)
        loader.open()
        print(f"data: {loader.source.description}")
        return loader
    except UserError as error:
        if config.metrics:
            raise
        warn(f"nearest.png and D's maps of real images are skipped, without training images: {error}")
        return None


if __name__ == "__main__":
    try:
        code = main()
        ends_at_once = os.environ.get("WORLD_SIZE", "1") != "1"
    except SystemExit as error:  # such as of a second signal, anywhere in a step
        code, ends_at_once = error.code, True
    if ends_at_once:
        # Without the interpreter's own end, in which threads of torch may abort the process (pytorch issue 190489).
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)
