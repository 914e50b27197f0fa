"""The folders of a run: check that it may write there, lock them, remove what earlier runs left and old results."""

import dataclasses
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from torch import nn

from errors import UserError, warn
from parameter import Config
from training import checkpoint
from utils import STEP, check_writable, files_by_step

FINAL_KINDS = ("checkpoints", "tests")  # of results with a step in their name
KINDS = (*FINAL_KINDS, "pictures")
TEST_RESULTS = re.compile(  # what `--train false` writes to its folder
    r"samples/([^/]+/)?\d{5,}\.png|grid\.png|(class_)?interpolation\.(png|gif)|progress\.gif|[GD]_attn[1-9]\.png"
    r"|(attention|metrics)\.json|(nearest|directions)\.png|projection\.(png|npy)|playground\.html"
)


def check_folders(config: Config, step: int) -> None:
    """Check, before any work, that a run that starts after `step` steps may write to its folders.

    The results in a folder are of one course of training: none can start where another has later checkpoints.

    Raises:
        UserError: a folder cannot be written, or has results of an earlier run that this one would overwrite.
    """
    for folder in config.folders:
        check_writable(folder)
    file, own = config.pretrained_file, (checkpoint.path_of(config.model_folder, step).name, "best_state.pth")
    if file and not _starts_course(config) and file.name not in own and checkpoint.has_any(config.model_folder):
        raise UserError(
            f"to go on from {file} would replace checkpoints of --version {config.version}: choose another --version, "
            "or give the step of a checkpoint"
        )
    if config.overwrite or config.pretrained_model == "latest":
        return
    if config.pretrained_model == "auto":
        if checkpoint.has_any(config.model_folder):
            return
        # A run that was killed before its first checkpoint has neither of these.
        if (config.log_folder / "report.html").exists() or any(_later_results(config, 0, FINAL_KINDS)):
            raise UserError(
                f"--version {config.version} has results, but no checkpoint in {config.model_folder}: correct "
                "--model_save_path, choose another --version, or delete the results with --overwrite true"
            )
        return
    if _starts_course(config):
        log = config.log_folder / "metrics.jsonl"
        if (log.exists() and log.stat().st_size) or any(_later_results(config, 0, KINDS)):
            resume = "resume with --pretrained_model latest, " * checkpoint.has_any(config.model_folder)
            raise UserError(
                f"--version {config.version} already has results: {resume}choose another --version, or delete them "
                "with --overwrite true"
            )
        return
    # The best checkpoint alone may be later than the newest one, from which the run goes on then.
    results = [path.name for path in _later_results(config, step, FINAL_KINDS)]
    if later := [name for name in results if not name.startswith("best_")]:
        saved = config.pretrained_file or checkpoint.path_of(config.model_folder, config.pretrained_model)
        raise UserError(
            f"--version {config.version} has results after step {step}, such as {later[-1]}: remove them with "
            f"--overwrite true, or keep them and go on in another --version with --pretrained_model {saved}"
        )


def _starts_course(config: Config) -> bool:
    """Return whether a run does not continue what its folders have: a new one, or a checkpoint from elsewhere."""
    if config.pretrained_file:
        return not checkpoint.is_in(config.model_folder, config.pretrained_file)
    return config.pretrained_model is None


def warn_of_small_disk(config: Config, networks: Iterable[nn.Module]) -> None:
    """Warn if the disk of the checkpoints has no room for three: networks, EMA and the moments of both optimizers."""
    size = 4 * sum(tensor.nbytes for network in networks for tensor in network.state_dict().values())
    folder = config.model_folder.absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    with suppress(OSError):  # a file system that does not tell
        if shutil.disk_usage(existing).free < 3 * size:
            warn(f"the disk of {config.model_folder} has no room for three checkpoints of {size / 2**20:,.1f} MiB each")


@contextmanager
def lock_folders(config: Config) -> Iterator[None]:
    """Create the folders and lock them until the context or the process ends; `UserError` if another run has them."""
    folders = {os.path.realpath(folder): folder for folder in config.folders}.values()  # some may be the same
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    without = [folder for folder in folders if not _can_lock(folder)]
    if without:
        names = ", ".join(map(str, without))
        warn(f"no locks on the file system of {names}: make sure that no other run writes there")
    with ExitStack() as locks:
        for folder in folders:
            try:
                if folder not in without:
                    locks.enter_context(FileLock(folder / ".lock", timeout=0))
            except Timeout as error:
                raise UserError(
                    f"another run is writing to {folder}: wait until it ends, or choose another --version"
                ) from error
        yield


def _can_lock(folder: Path) -> bool:
    """Return whether the file system has locks. Versions of filelock differ in what they do without."""
    if os.name != "posix":  # Windows, where all file systems have them
        return True
    import fcntl

    with tempfile.TemporaryFile(dir=folder) as file, suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX)
        return True
    return False


def init_folders(config: Config, step: int, skipped: Sequence[str], total: int) -> None:
    """Prepare the locked folders for a run that starts after `step` steps, and write `config.json`.

    Removes unfinished checkpoints and, as `RunLog` does with log entries, the sample grids and figures of later steps,
    which the run takes again; under `--overwrite` all results of later steps, and all of another course. `skipped`
    names the images that could not be read, of `total`: they are listed in `skipped_images.txt`, with a warning.
    """
    checkpoint.remove_unfinished(config.model_folder)
    if config.overwrite and _starts_course(config):
        step = 0
        (config.log_folder / "metrics.jsonl").unlink(missing_ok=True)
    for path in _later_results(config, step, KINDS if config.overwrite else ["pictures"]):
        if path.is_dir():
            remove_test_results(path)
        else:
            path.unlink()
    (config.sample_folder / "augmented.png").unlink(missing_ok=True)  # written again under --augment
    resolved = json.dumps(dataclasses.asdict(config), indent=2)
    (config.log_folder / "config.json").write_text(resolved, encoding="utf-8")
    path = config.log_folder / "skipped_images.txt"
    path.unlink(missing_ok=True)
    if skipped:
        path.write_text("\n".join(skipped) + "\n", encoding="utf-8")
        warn(f"{len(skipped):,} of {total:,} images could not be read and are skipped, see {path}")


def remove_test_results(folder: Path, keep: Sequence[str] = ()) -> None:
    """Remove what `--train false` wrote to a folder, but not the files `keep`, and then its folders that are empty."""
    names = {path: path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    results = [path for path, name in names.items() if TEST_RESULTS.fullmatch(name) and name not in keep]
    for path in results:
        path.unlink()
    for path in dict.fromkeys([*(path.parent for path in results), folder / "samples", folder]):
        with suppress(OSError):  # it is missing, or has other files
            path.rmdir()


def folder_names(classes: Sequence[str]) -> list[str]:
    """Return a folder's name for each class: a checkpoint from elsewhere may have any names, such as paths.

    If some would be one folder, on some systems also by their upper and lower case, all end in the class's number.
    """
    texts = [name.encode("utf-8", "replace").decode() for name in classes]
    names = [re.sub(r'[<>:"/\\|?*\0]', "_", text).strip(". ") or "_" for text in texts]
    names = [os.fsdecode(name.encode()) for name in names]  # UTF-8 in every locale
    if len({name.lower() for name in names}) == len(names):
        return names
    return [f"{name}_{number}" for number, name in enumerate(names)]


def thin_results(folder: Path, ending: str, interval: int, keep: int, step: int) -> None:
    """Remove files `{step}_{ending}` before `step` so that at most `keep`, that of `step` included, are left.

    The others that stay are evenly spaced: of each ``interval * 2**k`` steps, with the smallest k that makes them few
    enough where none is missing, the last one. Later steps are not counted. `keep` is at least 1, `interval` the steps
    between results.
    """
    files = {number: path for number, path in files_by_step(folder, ending).items() if 0 < number < step}
    spacing = interval
    while math.ceil(step / spacing) - math.ceil(min(files, default=step) / spacing) >= keep:
        spacing *= 2
    if spacing > interval or len(files) >= keep:
        kept = {math.ceil(number / spacing): number for number in [*files, step]}
        for number in files.keys() - kept.values():
            files[number].unlink(missing_ok=True)


def _later_results(config: Config, step: int, kinds: Collection[str]) -> Iterator[Path]:
    """Yield the results of these `KINDS` after `step`; the best checkpoint is of the step at which it was saved.

    Only files and folders with names that this program writes: others in the folders are the user's.
    """
    best_step = checkpoint.peek(config.model_folder, "best").get("step", 0)
    for kind, folder, names in (
        ("checkpoints", config.model_folder, rf"(best|{STEP})_(state|G|D)\.pth"),
        ("tests", config.sample_folder, f"test_{STEP}"),
        ("pictures", config.sample_folder, rf"{STEP}_(fake|ema)\.png"),
        ("pictures", config.attn_folder, rf"{STEP}_([GD]_attn[1-9]\.png|explorer\.html)"),
        *([("pictures", config.log_folder, r"(events\.out\.tfevents\..*|report\.html)")] if step == 0 else []),
    ):
        for path in sorted(folder.iterdir()) if kind in kinds and folder.is_dir() else ():
            match = path.is_dir() == (kind == "tests") and re.fullmatch(names, path.name)
            if match and (step == 0 or (best_step if match[1] == "best" else int(match[1])) > step):
                yield path
