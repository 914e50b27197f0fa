"""Scores of generated images: FID, KID, Inception Score, precision and recall, face-detection rate, HOG distance.

    scores = compute_metrics(config, G, loader)  # those of --metrics

docs/metrics.md describes the metrics and their protocol. Compare values of equal `--metric_num` only: FID and the HOG
distance fall as the number of images grows. torch-fidelity and opencv-python-headless are optional dependencies,
imported only for the metrics that need them.
"""

import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from data_loader import Loader
from errors import StopFn, UserError, import_optional, warn_once
from networks.latents import sample_z
from parameter import Config
from utils import SEED_METRICS, SEED_METRICS_LABELS, derive_seed, to_uint8

OPENCV_METRICS = ("faces", "hog")
MIN_IMAGES = 10  # one for each split of isc; the other metrics need fewer
ImageFn = Callable[[int, int], Tensor]  # (start, count) -> images start ... start + count - 1, (count, 3, S, S)


class Images(NamedTuple):
    """`count` images, which `read` returns as uint8."""

    read: ImageFn
    count: int


def check_metrics(config: Config, device: torch.device) -> None:
    """Check, before any work, that `compute_metrics` will find its libraries and weights; downloads missing weights.

    Raises:
        UserError: a library or weights are missing or unusable.
    """
    if config.metrics:
        with preserve_global_state(device):
            _import_libraries(config.metrics.split(","))


def compute_metrics(config: Config, G: nn.Module, loader: Loader, should_stop: StopFn = lambda: 0) -> dict[str, float]:
    """Compare `--metric_num` images of G with the loader's images.

    Args:
        G: in evaluation mode.
        loader: opened.
        should_stop: asked before each batch of images.

    Raises:
        UserError: see `compute_scores`.
    """
    count, device, labels = config.metric_num, loader.device, None
    z = sample_z(derive_seed(config.seed, SEED_METRICS), count, config.z_dim, device)
    if config.conditional:
        rng = torch.Generator().manual_seed(derive_seed(config.seed, SEED_METRICS_LABELS))
        labels = loader.labels[torch.randint(len(loader.labels), (count,), generator=rng).to(device)]

    def generate(start: int, count: int) -> Tensor:
        rows = slice(start, start + count)
        return G(z[rows], None if labels is None else labels[rows])

    return compute_scores(config, generate, loader, should_stop)


def compute_scores(
    config: Config, generate: ImageFn, loader: Loader, should_stop: StopFn = lambda: 0
) -> dict[str, float]:
    """Compare generated images with real ones by `--metrics`. Saves and restores RNG state and backend flags.

    What is computed of real images, except for hog, is cached in the folder `metrics` of `--cache_path`, by the images,
    their size and their number.

    Args:
        generate: returns images in [-1, 1] on any device; called from 0 on for faces, for hog and for each extractor.
        loader: its real images, at most `--metric_num` of them, are read batch by batch; extractors run on its device.

    Returns:
        By the names that they have in the log and in metrics.json.

    Raises:
        UserError: a library or weights are missing or unusable, there are too few images, the disk is
            full, generated images are not finite, or it was told to stop.
    """
    names, device, real = config.metrics.split(","), loader.device, loader.images

    def stoppable(read: ImageFn) -> ImageFn:
        def checked(start: int, count: int) -> Tensor:
            if should_stop():
                raise UserError("stopped by a signal")
            return read(start, count)

        return checked

    fewest = min(config.metric_num, len(real))
    if fewest < MIN_IMAGES:
        raise UserError(f"--metrics {config.metrics} needs at least {MIN_IMAGES} training images, not {fewest}")
    chosen = torch.arange(fewest) * len(real) // fewest  # evenly spaced
    fakes = Images(stoppable(lambda start, count: _pixels_of(generate(start, count))), config.metric_num)
    reals = Images(
        stoppable(lambda start, count: real[chosen[start : start + count]].permute(0, 3, 1, 2).contiguous()), fewest
    )
    key = f"{loader.source.name}_{loader.source.fingerprint}_{real.shape[1]}px_{fewest}_of_{len(real)}"
    folder, batch_size = Path(os.path.expanduser(config.cache_path)) / "metrics", config.batch_size
    scores: dict[str, float] = {}
    with preserve_global_state(device), _open_cache(folder) as cache:
        opencv, extractors = _import_libraries(names)
        if "faces" in names:
            scores |= opencv.face_scores(fakes, reals, batch_size, cache / f"{key}-faces.json")
        if "hog" in names:
            scores |= opencv.hog_scores(fakes, reals, batch_size)
        if extractors:
            features = [name for name in names if name not in OPENCV_METRICS]
            scores |= extractors.feature_scores(features, fakes, reals, batch_size, device, cache, key)
    return scores


@contextmanager
def preserve_global_state(device: torch.device) -> Iterator[None]:
    """Save and restore RNG state, backend flags and warning filters, so that metrics do not change training.

    Inside, there are no gradients and no warnings, arithmetic is plain float32 and cuDNN deterministic: scores are
    comparable between runs of any `--precision`, and with published ones.
    """
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    allow_tf32 = matmul.allow_tf32
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False),
        torch.no_grad(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        matmul.allow_tf32 = False
        try:
            yield
        finally:
            matmul.allow_tf32 = allow_tf32


@contextmanager
def _open_cache(folder: Path) -> Iterator[Path]:
    """Create and yield the folder, or a temporary one where it may only be read.

    Raises:
        UserError: a file in it cannot be written.
    """
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        warn_once(f"cannot write to {folder}: what metrics need of the training images is computed again each time")
        with tempfile.TemporaryDirectory() as temporary:
            yield Path(temporary)
        return
    try:
        yield folder
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save on a full disk: a RuntimeError
        if not isinstance(cause, OSError):
            raise
        raise UserError(f"cannot write to {folder}: {cause.strerror}; --cache_path puts it elsewhere") from error


def _import_libraries(names: Sequence[str]) -> tuple[ModuleType | None, ModuleType | None]:
    """Return `metrics.opencv` and `metrics.extractors` if the metrics need them; downloads missing weights."""

    def load(module: str, package: str, names: Sequence[str]) -> ModuleType | None:
        problem = f'--metrics {",".join(names)} needs {package}: pip install "{package}"'
        return import_optional(module, problem) if names else None

    features = [name for name in names if name not in OPENCV_METRICS]
    opencv = load("metrics.opencv", "opencv-python-headless<5", [name for name in names if name in OPENCV_METRICS])
    extractors = load("metrics.extractors", "torch-fidelity>=0.4", features)
    if extractors:
        extractors.fetch_weights(features)
    return opencv, extractors


def _pixels_of(images: Tensor) -> Tensor:
    """Return the pixels that saved samples have."""
    if not images.isfinite().all():
        raise UserError("the generator returns NaN or Inf: use an earlier checkpoint")
    return to_uint8(images).contiguous()
