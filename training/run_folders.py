"""The folders of a run: can they be written, does another run write to them, what did an earlier one leave there?"""

import dataclasses
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from errors import UserError, warn
from parameter import Config
from training import checkpoint
from utils import check_writable


def check_folders(config: Config, step: int) -> None:
    """Looks, before any work, whether a run that starts after `step` steps may write where it wants to.

    Raises:
        UserError: a folder cannot be written, or holds the results of an earlier run that this one would overwrite.
    """
    for folder in (*config.folders.values(), Path(config.cache_path).expanduser()):
        check_writable(folder)
    if config.overwrite or config.pretrained_model == "auto":
        return
    newer = [found for found in checkpoint.steps(config.model_folder) if found > step]
    if step and newer:
        warn(
            f"{config.model_folder} has checkpoints after step {step}, up to {max(newer)}: until this run has passed "
            "them, they are what --pretrained_model latest means; --overwrite true removes them"
        )
    elif newer or (not step and _is_filled(config.log_folder / "metrics.jsonl")):
        raise UserError(
            f"version {config.version} has results of an earlier run: --pretrained_model latest continues it, "
            "another --version keeps both, --overwrite true removes them"
        )


@contextmanager
def lock_folders(config: Config) -> Iterator[None]:
    """Makes the folders and holds them for this process, as long as the context or, should it be killed, the process.

    Raises:
        UserError: another run holds one of them.
    """
    with ExitStack() as locks:
        for folder in config.folders.values():
            folder.mkdir(parents=True, exist_ok=True)
            try:
                locks.enter_context(FileLock(folder / ".lock", timeout=0))
            except Timeout as error:
                raise UserError(
                    f"another run is writing to {folder}: wait for its end, or choose another --version"
                ) from error
            except NotImplementedError:
                warn(f"{folder} is on a file system without locks: see to it that no other run writes there")
        yield


def prepare(config: Config, step: int, skipped: Sequence[str]) -> None:
    """Clears the folders for a run that starts after `step` steps, and writes down its configuration.

    What a killed save left goes; under --overwrite, so does all that an earlier run left of later steps. `skipped`
    are the images that are left out; they are listed, with a warning.
    """
    checkpoint.remove_unfinished(config.model_folder)
    if config.overwrite:
        _remove_later(config, step)
    resolved = json.dumps(dataclasses.asdict(config), indent=2)
    (config.log_folder / "config.json").write_text(resolved, encoding="utf-8")
    path = config.log_folder / "skipped_images.txt"
    path.unlink(missing_ok=True)
    if skipped:
        path.write_text("\n".join(skipped) + "\n", encoding="utf-8")
        warn(f"{len(skipped)} images could not be read and are left out, see {path}")


def _remove_later(config: Config, step: int) -> None:
    """Removes what earlier runs left of steps after `step`, where their names tell; of a new run's version all."""
    for folder in (config.model_folder, config.sample_folder, config.attn_folder):
        for path in folder.iterdir():
            numbered = re.fullmatch(r"([0-9]+)_\w+\.(pth|png|html)", path.name)
            tested = re.fullmatch(r"test_([0-9]+)", path.name)
            if numbered and int(numbered[1]) > step:
                path.unlink()
            elif tested and int(tested[1]) > step:
                shutil.rmtree(path)
    if step == 0:
        for path in (*config.log_folder.glob("events.out.tfevents.*"), *config.model_folder.glob("best_*.pth")):
            path.unlink()


def _is_filled(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0
