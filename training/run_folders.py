"""The folders of a run: check that it may write there, lock them, remove what earlier runs left and old results."""

import dataclasses
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from errors import UserError, warn
from parameter import Config
from training import checkpoint
from utils import check_writable, files_by_step

TEST_RESULTS = re.compile(  # what `--train false` writes to its folder
    r"samples/([^/]+/)?\d{5,}\.png|grid\.png|(class_)?interpolation\.(png|gif)|progress\.gif|[GD]_attn\d+\.png|gamma\.svg"
    r"|(attention|metrics)\.json|nearest\.png|playground\.html"
)


def check_folders(config: Config, step: int) -> None:
    """Check, before any work, that a run that starts after `step` steps may write to its folders.

    Raises:
        UserError: a folder cannot be written, or has results of an earlier run that this one would overwrite.
    """
    for folder in config.folders.values():
        check_writable(folder)
    if config.overwrite or config.pretrained_model == "auto":
        return
    if not step:
        if _is_nonempty(config.log_folder / "metrics.jsonl") or any(_later_results(config, 0)):
            raise UserError(
                f"--version {config.version} already has results: resume with --pretrained_model latest, choose "
                "another --version, or delete them with --overwrite true"
            )
    elif newest := _newest_later_step(config, step):
        warn(
            f"{config.model_folder} has checkpoints after step {step}, up to {newest}: --pretrained_model latest "
            "resumes from those until this run has passed them; --overwrite true deletes them"
        )


@contextmanager
def lock_folders(config: Config) -> Iterator[None]:
    """Create the folders and lock them for this process until the context ends or the process dies.

    Raises:
        UserError: another run has locked one of them.
    """
    with ExitStack() as locks:
        for folder in config.folders.values():
            folder.mkdir(parents=True, exist_ok=True)
        folders = {os.path.realpath(folder): folder for folder in config.folders.values()}  # some may be the same
        if without := [str(folder) for folder in folders.values() if not _can_lock(folder)]:
            warn(f"no locks on the file system of {', '.join(without)}: make sure that no other run writes there")
        for folder in folders.values():
            if str(folder) in without:
                continue
            try:
                locks.enter_context(FileLock(folder / ".lock", timeout=0))
            except Timeout as error:
                raise UserError(
                    f"another run is writing to {folder}: wait until it ends, or choose another --version"
                ) from error
        yield


def _can_lock(folder: Path) -> bool:
    """Return whether the file system has locks. Versions of filelock differ in what they do without."""
    try:
        import fcntl
    except ModuleNotFoundError:  # Windows, where all file systems have them
        return True
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            return False
    return True


def init_folders(config: Config, step: int, skipped: Sequence[str], total: int) -> None:
    """Prepare the locked folders for a run that starts after `step` steps, and write `config.json`.

    Removes unfinished checkpoints, and under `--overwrite` the results of later steps; otherwise, where there are later
    checkpoints, it copies the log, of which the run drops the later entries. `skipped` names the images that could not
    be read, of `total`: they are listed in `skipped_images.txt`, with a warning.
    """
    checkpoint.remove_unfinished(config.model_folder)
    if config.overwrite:
        _remove_later_results(config, step)
    elif newest := _newest_later_step(config, step):
        log, kept = (config.log_folder / name for name in ("metrics.jsonl", f"metrics_until_{newest}.jsonl"))
        if log.exists() and not kept.exists():  # the log is complete only before the first of such runs
            shutil.copy(log, kept)
            print(f"the log up to step {newest} is kept as {kept}")
    resolved = json.dumps(dataclasses.asdict(config), indent=2)
    (config.log_folder / "config.json").write_text(resolved, encoding="utf-8")
    path = config.log_folder / "skipped_images.txt"
    path.unlink(missing_ok=True)
    if skipped:
        path.write_text("\n".join(skipped) + "\n", encoding="utf-8")
        warn(f"{len(skipped):,} of {total:,} images could not be read and are skipped, see {path}")


def remove_test_results(folder: Path, keep: Sequence[str] = ()) -> None:
    """Remove what `--train false` wrote to a folder, but not the files `keep`, and then its folders that are empty."""
    found = [path for pattern in ("samples/*/*", "samples/*", "*") for path in folder.glob(pattern)]
    names = {path: path.relative_to(folder).as_posix() for path in found}
    results = [path for path, name in names.items() if TEST_RESULTS.fullmatch(name) and name not in keep]
    for path in results:
        path.unlink()
    for path in dict.fromkeys([*(path.parent for path in results), folder / "samples", folder]):
        with suppress(OSError):  # it is missing, or has other files
            path.rmdir()


def thin_results(folder: Path, ending: str, interval: int, keep: int, step: int) -> None:
    """Remove files `{step}_{ending}` before `step` so that at most `keep`, that of `step` included, are left.

    The others that stay are those at multiples of ``interval * 2**k`` with the smallest k that makes them few enough,
    so that they are always evenly spaced. Later steps are not counted.

    Args:
        interval: steps between results.
        keep: at least 1.
    """
    files = {number: path for number, path in files_by_step(folder, ending).items() if number < step}
    kept = list(files)
    while len(kept) >= keep:
        kept = [number for number in kept if number % interval == 0]
        interval *= 2
    for number in files.keys() - kept:
        files[number].unlink(missing_ok=True)


def _newest_later_step(config: Config, step: int) -> int | None:
    """Return the step of the newest checkpoint after `step`; None if there is none."""
    return max((found for found in checkpoint.list_steps(config.model_folder) if found > step), default=None)


def _remove_later_results(config: Config, step: int) -> None:
    """Remove results of steps after `step`, and for a new run those without a step too."""
    for path, remove in list(_later_results(config, step)):
        remove(path)
    if step == 0:  # unlike real.png, not every run writes it
        (config.sample_folder / "augmented.png").unlink(missing_ok=True)


def _later_results(config: Config, step: int) -> Iterator[tuple[Path, Callable[[Path], None]]]:
    """Yield what a run has written after `step`, for a new run also what has no step, with what removes it.

    Only files and folders with names that this program writes: others in the folders are the user's.
    """
    for folder, names, remove in (
        (config.model_folder, r"([0-9]+)_(?:G|D|state)\.pth", Path.unlink),
        (config.sample_folder, r"([0-9]+)_(?:fake|ema)\.png", Path.unlink),
        (config.sample_folder, r"test_([0-9]+)", remove_test_results),
        (config.attn_folder, r"([0-9]+)_(?:[GD]_attn[0-9]+\.png|explorer\.html)", Path.unlink),
        *([(config.model_folder, r"best_(?:G|D|state)\.pth", Path.unlink)] if step == 0 else []),
        *([(config.log_folder, r"events\.out\.tfevents\..*", Path.unlink)] if step == 0 else []),
        (config.log_folder, r"metrics_until_([0-9]+)\.jsonl", Path.unlink),
    ):
        for path in folder.iterdir() if folder.is_dir() else ():
            match = re.fullmatch(names, path.name)
            if match and (not match.groups() or int(match[1]) > step):
                yield path, remove


def _is_nonempty(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0
