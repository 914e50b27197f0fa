"""Scores of generated images: FID, KID, Inception Score, precision and recall, and face-detection rate.

    scores = compute_scores(generate, loader.images, ["fid", "faces"], num_images=10_000, batch_size=64, ...)

Protocol. `num_images` images of the EMA generator (of G with `--use_ema false`) in evaluation mode, of z drawn from
the seed, rounded to uint8, are compared with `num_images` real images: evenly spaced over the training set, all of
them if there are fewer, cropped and resized as in training, without flips. Arithmetic is float32 for any
`--precision`. torch-fidelity computes

- fid, kid (mean over 100 subsets of up to 1,000 images; kid_std is their standard deviation) and isc (mean over 10
  splits; isc_std) from the Inception network of the original FID, with its own resize to 299x299;
- precision, recall and f_score (prc) from VGG16, with its own resize to 224x224, by 3 nearest neighbors.

With `--feature_extractor`, a TorchScript file, all of these use it instead: images (B, 3, S, S) uint8 in, features
(B, F) out, F >= 2; isc takes the features as logits. Loading such a file runs the code in it: use only files that you
trust.

faces is the face-detection rate: the fraction of generated images in which OpenCV's frontal-face cascade finds a face.
faces_real is that of the real images, as a reference, because the detector misses some faces: 0.96 on CelebA at 64x64,
and 0 on noise.

FID falls as the number of images grows: compare values of equal `num_images` only. 10,000 or more are customary; below
2,048, the number of Inception features, prefer KID, which is unbiased.

torch-fidelity and opencv-python-headless are optional dependencies, imported only for the metrics that need them.
"""

import glob
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from errors import UserError
from utils import progress

if TYPE_CHECKING:
    from metrics.extractors import Extractor

ImageFn = Callable[[int, int], Tensor]  # (start, count) -> images start ... start + count - 1, (count, 3, S, S)

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
    real: Tensor | np.ndarray,
    names: Sequence[str],
    *,
    num_images: int,
    batch_size: int,
    device: torch.device,
    cache_path: Path,
    real_name: str,
    feature_extractor: Path | None = None,
) -> dict[str, float]:
    """Compare generated images with real ones. Saves and restores RNG state and backend flags.

    Args:
        generate: generate(start, count) returns images start ... start + count - 1, (count, 3, S, S) in [-1, 1] on any
            device, of a network in evaluation mode; called from 0 on for faces and for each extractor.
        real: real images (N, S, S, 3) uint8, which may be memory-mapped or on the GPU; read batch by batch.
        names: some of "fid", "kid", "isc", "prc", "faces".
        num_images: number of generated images, and maximum number of real images.
        batch_size: images per batch of the generator and the extractors; scores do not depend on it.
        device: of the extractors; those that are neither CUDA nor CPU are replaced by the CPU.
        cache_path: folder of downloaded weights; what is computed from real images is cached in its folder `metrics`.
        real_name: identifies the real images in the names of cached files; their size and number are added here.
        feature_extractor: a TorchScript file to use instead of Inception and VGG16.

    Returns:
        Those of fid, kid, kid_std, isc, isc_std, precision, recall, f_score, faces, faces_real that `names` ask for.

    Raises:
        UserError: a library, weights or the extractor is missing or unusable, there are too few images, the cache
            cannot be written, or generated images are not finite.
    """
    if min(num_images, len(real)) < MIN_IMAGES:
        raise UserError(
            f"--metrics {','.join(names)} needs at least {MIN_IMAGES} images, got {min(num_images, len(real))}"
        )
    cache = cache_path / "metrics"
    real = torch.as_tensor(real)
    real = real[:: max(1, len(real) // num_images)][:num_images]  # a view
    key = f"{real_name}_{real.shape[1]}px_{len(real)}"
    fakes = Images(lambda start, count: _to_uint8(generate(start, count)), num_images)
    reals = Images(lambda start, count: real[start : start + count].permute(0, 3, 1, 2).contiguous(), len(real))
    scores: dict[str, float] = {}
    with preserve_global_state(device), _report_write_errors(cache):
        extractors = _find_extractors(names, real.shape[1], device, cache_path, feature_extractor)
        if "faces" in names:
            scores |= _face_scores(fakes, reals, batch_size, cache / f"{key}-faces.json")
        for extractor in extractors:
            scores |= _feature_scores(extractor, fakes, reals, batch_size, device, cache, key)
    return scores


def check_requirements(
    names: Sequence[str],
    *,
    image_size: int,
    device: torch.device,
    cache_path: Path,
    feature_extractor: Path | None = None,
) -> None:
    """Check that `compute_scores` will find all it needs, before hours of training; downloads missing weights.

    Raises:
        UserError: a library, weights or the extractor is missing or unusable.
    """
    with preserve_global_state(device):
        _find_extractors(names, image_size, device, cache_path, feature_extractor)
        if "faces" in names:
            _import_face_rate()


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
def _report_write_errors(folder: Path) -> Iterator[None]:
    """Create the folder; raise a `UserError` where it, or later a file in it, cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save on a full disk: a RuntimeError
        if not isinstance(cause, OSError):
            raise
        raise UserError(f"cannot write to {folder}: {cause.strerror}; --cache_path puts it elsewhere") from error


@contextmanager
def _optional_dependency(package: str, names: Sequence[str]) -> Iterator[None]:
    """Raise a `UserError` that says what to install where an import fails."""
    try:
        yield
    except ImportError as error:
        raise UserError(f'--metrics {",".join(names)} needs {package}: pip install "{package}" ({error})') from error


def _find_extractors(
    names: Sequence[str], image_size: int, device: torch.device, cache_path: Path, feature_extractor: Path | None
) -> list["Extractor"]:
    names = [name for name in names if name != "faces"]
    if not names:
        return []
    with _optional_dependency("torch-fidelity>=0.4", names):
        from metrics.extractors import find_extractors
    return find_extractors(names, image_size, device, cache_path, feature_extractor)


def _import_face_rate() -> Callable[..., float]:
    with _optional_dependency("opencv-python-headless<5", ["faces"]):
        from metrics.faces import face_rate
    return face_rate


def _to_uint8(images: Tensor) -> Tensor:
    """Round generated images in [-1, 1] to the pixels that a saved sample has."""
    images = images.float()
    if not images.isfinite().all():
        raise UserError("the generator returns NaN or Inf: use an earlier checkpoint")
    return images.add(1).mul(127.5).round().clamp(0, 255).byte().contiguous()


def _face_scores(fakes: Images, reals: Images, batch_size: int, cached: Path) -> dict[str, float]:
    """Return the face-detection rates; that of the real images is kept in the file `cached`."""
    face_rate = _import_face_rate()
    scores = {"faces": face_rate(*fakes, batch_size, "faces")}
    try:
        scores["faces_real"] = float(cached.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # not cached yet, or cut off
        scores["faces_real"] = face_rate(*reals, batch_size, "faces of real images")
        cached.write_text(str(scores["faces_real"]), encoding="utf-8")
    return scores


def _feature_scores(
    extractor: "Extractor", fakes: Images, reals: Images, batch_size: int, device: torch.device, cache: Path, key: str
) -> dict[str, float]:
    """Run torch-fidelity for the metrics of one extractor; it caches the features of the real images under `key`."""
    from torch_fidelity import calculate_metrics

    from metrics.extractors import RESULT_NAMES, ImageSource

    for path in cache.glob(f"{glob.escape(key)}-{extractor.name}-*.pt"):
        if not zipfile.is_zipfile(path):  # cut off, as by a power failure: torch-fidelity would fail to load it
            path.unlink()
    wanted = extractor.metrics
    with progress(None, ", ".join(wanted), "img", total=0) as bar:
        results = calculate_metrics(
            input1=ImageSource(*fakes, bar),
            input1_model_num_samples=fakes.count,
            input2=None if wanted == ["isc"] else ImageSource(*reals, bar),  # isc needs no real images
            input2_model_num_samples=reals.count,
            input2_cache_name=key,
            fid="fid" in wanted,
            kid="kid" in wanted,
            isc="isc" in wanted,
            prc="prc" in wanted,
            isc_splits=ISC_SPLITS,
            kid_subset_size=min(KID_SUBSET_SIZE, fakes.count, reals.count),
            prc_batch_size=PRC_BATCH_SIZE,
            feature_extractor=extractor.name,
            feature_extractor_weights_path=str(extractor.weights),
            cuda=device.type == "cuda",
            batch_size=batch_size,
            cache_root=str(cache),
            save_cpu_ram=True,
            verbose=False,
        )
    return {ours: results[theirs] for theirs, ours in RESULT_NAMES.items() if theirs in results}
