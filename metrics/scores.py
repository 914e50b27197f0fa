"""Scores of generated images: FID, KID, Inception Score, precision and recall, face-detection rate, HOG distance.

    scores = compute_scores(generate, loader.images, ["fid", "faces"], num_images=10_000, batch_size=64, ...)

Protocol. `num_images` images of the EMA generator (of G with `--use_ema false`) in evaluation mode, of z drawn from
the seed, rounded to uint8, are compared with `num_images` real images from all over the training set (the first of
every N // num_images images of N, in the order of the files; all if there are fewer), cropped and resized as in
training, without flips. The classes of a conditional generator are drawn from the seed, as frequent as those of the
real images. Arithmetic is float32 for any `--precision`. torch-fidelity computes

- fid, kid (mean over 100 subsets of up to 1,000 images; kid_std is their standard deviation, left out where each subset
  would be all images) and isc (mean over 10 splits; isc_std) from the Inception network of the original FID, with its
  own resize to 299x299;
- precision, recall and f_score (prc) from VGG16, with its own resize to 224x224, by 3 nearest neighbors.

The weights of both are downloaded once, into torch.hub's folder (`$TORCH_HOME/hub/checkpoints`).

faces is the face-detection rate: the fraction of generated images in which OpenCV's frontal-face cascade finds a face.
faces_real is that of the real images, as a reference, because the detector misses some faces: it finds 0.96 on CelebA
at 64x64, and 0 on noise.

hog is the Fréchet distance of histograms of oriented gradients, of the shapes in the gray images: a measure without any
network, which needs no download. hog_real is that between two halves of the real images, which are half as many, so
that it is about twice what images as good as real ones would get. Compare values of equal `num_images` only.

FID falls as the number of images grows: compare values of equal `num_images` only. 10,000 or more are customary; below
2,048, the number of Inception features, prefer KID, which is unbiased.

torch-fidelity and opencv-python-headless are optional dependencies, imported only for the metrics that need them.
"""

import glob
import importlib
import os
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from errors import UserError, warn_once
from utils import progress, to_uint8

OPENCV_METRICS = ("faces", "hog")
ImageFn = Callable[[int, int], Tensor]  # (start, count) -> images start ... start + count - 1, (count, 3, S, S)

OPTIONAL_DEPENDENCIES = {"metrics.extractors": "torch-fidelity>=0.4", "metrics.opencv": "opencv-python-headless<5"}
ISC_SPLITS = 10
MIN_IMAGES = ISC_SPLITS  # one image for each split; the other metrics need fewer
KID_SUBSET_SIZE = 1000
PRC_BATCH_SIZE = 1000  # rows of the distance matrix in memory at a time


class Images(NamedTuple):
    """`count` images, which `read` returns as uint8."""

    read: ImageFn
    count: int


def compute_scores(
    generate: ImageFn,
    real: Tensor,
    names: Sequence[str],
    *,
    num_images: int,
    batch_size: int,
    device: torch.device,
    cache_path: Path,
    real_name: str,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """Compare generated images with real ones. Saves and restores RNG state and backend flags.

    Args:
        generate: generate(start, count) returns images start ... start + count - 1, (count, 3, S, S) in [-1, 1] on any
            device, of a network in evaluation mode; called from 0 on for faces, for hog and for each extractor.
        real: real images (N, S, S, 3) uint8, which may be memory-mapped or on the GPU; read batch by batch.
        names: some of "fid", "kid", "isc", "prc", "faces", "hog".
        num_images: number of generated images, and maximum number of real images.
        batch_size: images per batch of the generator and the extractors; scores do not depend on it.
        device: of the extractors; those that are neither CUDA nor CPU are replaced by the CPU.
        cache_path: what is computed from the real images, except for hog, is cached in its folder `metrics`, if that
            can be written.
        real_name: identifies the real images in the names of cached files; their size and number are added here.
        should_stop: asked before each batch of images.

    Returns:
        Those of fid, kid, kid_std, isc, isc_std, precision, recall, f_score, faces, faces_real, hog, hog_real that
        `names` ask for.

    Raises:
        UserError: a library or weights are missing or unusable, there are too few images, the disk is
            full, generated images are not finite, or it was told to stop.
    """

    def stoppable(read: ImageFn) -> ImageFn:
        def checked(start: int, count: int) -> Tensor:
            if should_stop():
                raise UserError("stopped by a signal")
            return read(start, count)

        return checked

    fewest = min(num_images, len(real))
    if fewest < MIN_IMAGES:
        raise UserError(f"--metrics {','.join(names)} needs at least {MIN_IMAGES} images, got {fewest}")
    chosen = torch.arange(fewest) * len(real) // fewest  # evenly spaced
    fakes = Images(stoppable(lambda start, count: _pixels_of(generate(start, count))), num_images)
    reals = Images(
        stoppable(lambda start, count: real[chosen[start : start + count]].permute(0, 3, 1, 2).contiguous()), fewest
    )
    key = f"{real_name}_{real.shape[1]}px_{fewest}_of_{len(real)}"
    scores: dict[str, float] = {}
    with preserve_global_state(device), _open_cache(cache_path / "metrics") as cache:
        if "faces" in names:
            scores |= _face_scores(fakes, reals, batch_size, cache / f"{key}-faces.json")
        if "hog" in names:
            scores |= _hog_scores(fakes, reals, batch_size)
        if feature_metrics := [name for name in names if name not in OPENCV_METRICS]:
            extractors = _import_optional("metrics.extractors", feature_metrics)
            extractors.fetch_weights(feature_metrics)
            scores |= _feature_scores(feature_metrics, fakes, reals, batch_size, device, cache, key)
    return scores


def check_requirements(names: Sequence[str], device: torch.device) -> None:
    """Check that `compute_scores` will find all it needs, before hours of training; downloads missing weights.

    Raises:
        UserError: a library or weights are missing or unusable.
    """
    with preserve_global_state(device):
        if opencv_metrics := [name for name in names if name in OPENCV_METRICS]:
            _import_optional("metrics.opencv", opencv_metrics)
        if feature_metrics := [name for name in names if name not in OPENCV_METRICS]:
            extractors = _import_optional("metrics.extractors", feature_metrics)
            extractors.fetch_weights(feature_metrics)


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


def _import_optional(module: str, names: Sequence[str]) -> ModuleType:
    """Import a module that needs an optional dependency, or raise a `UserError` that says what to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = OPTIONAL_DEPENDENCIES[module]
        raise UserError(f'--metrics {",".join(names)} needs {package}: pip install "{package}" ({error})') from error


def _pixels_of(images: Tensor) -> Tensor:
    """Return the pixels that saved samples have."""
    if not images.isfinite().all():
        raise UserError("the generator returns NaN or Inf: use an earlier checkpoint")
    return to_uint8(images).contiguous()


def _face_scores(fakes: Images, reals: Images, batch_size: int, cached: Path) -> dict[str, float]:
    """Return the face-detection rates; that of the real images is cached in a file."""
    face_rate = _import_optional("metrics.opencv", ["faces"]).face_rate
    scores = {"faces": face_rate(*fakes, batch_size, "faces")}
    try:
        scores["faces_real"] = float(cached.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # not cached yet, or cut off
        scores["faces_real"] = face_rate(*reals, batch_size, "faces of real images")
        cached.write_text(str(scores["faces_real"]), encoding="utf-8")
    return scores


def _hog_scores(fakes: Images, reals: Images, batch_size: int) -> dict[str, float]:
    """Return the Fréchet distances of HOG features."""
    opencv = _import_optional("metrics.opencv", ["hog"])
    fake = opencv.hog_features(*fakes, batch_size, "hog")
    real = opencv.hog_features(*reals, batch_size, "hog of real images")
    distance, distance_real = opencv.hog_distances(fake, real)
    return {"hog": distance, "hog_real": distance_real}


def _feature_scores(
    names: Sequence[str],
    fakes: Images,
    reals: Images,
    batch_size: int,
    device: torch.device,
    cache: Path,
    key: str,
) -> dict[str, float]:
    """Run torch-fidelity; it caches the features of the real images in files whose names begin with `key`."""
    from torch_fidelity import calculate_metrics

    from metrics.extractors import RESULT_NAMES, ImageSource

    for path in cache.glob(f"{glob.escape(key)}-*.pt"):
        if not zipfile.is_zipfile(path):  # cut off by a power failure: torch-fidelity's error would not name the file
            path.unlink()
    kid_subset_size = min(KID_SUBSET_SIZE, fakes.count, reals.count)
    with progress(None, ", ".join(names), "img", total=0) as bar:
        results = calculate_metrics(
            input1=ImageSource(*fakes, bar),
            input1_model_num_samples=fakes.count,
            input2=None if names == ["isc"] else ImageSource(*reals, bar),  # isc needs no real images
            input2_model_num_samples=reals.count,
            input2_cache_name=key,
            fid="fid" in names,
            kid="kid" in names,
            isc="isc" in names,
            prc="prc" in names,
            isc_splits=ISC_SPLITS,
            kid_subset_size=kid_subset_size,
            prc_batch_size=PRC_BATCH_SIZE,
            cuda=device.type == "cuda",
            batch_size=batch_size,
            cache_root=str(cache),
            save_cpu_ram=True,
            verbose=False,
        )
    scores = {ours: results[theirs] for theirs, ours in RESULT_NAMES.items() if theirs in results}
    if kid_subset_size == fakes.count == reals.count:  # all subsets are the whole set
        scores.pop("kid_std", None)
    return scores
