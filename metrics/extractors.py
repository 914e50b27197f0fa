"""Feature extractors for FID and related scores: Inception and VGG16 with their weights, or a TorchScript file.

torch-fidelity is an optional dependency: import this module only for metrics that need it.
"""

import hashlib
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch_fidelity import (  # fails here, at import, with versions before 0.4, which have no precision and recall
    KEY_METRIC_F_SCORE,
    KEY_METRIC_FID,
    KEY_METRIC_ISC_MEAN,
    KEY_METRIC_ISC_STD,
    KEY_METRIC_KID_MEAN,
    KEY_METRIC_KID_STD,
    KEY_METRIC_PRECISION,
    KEY_METRIC_RECALL,
    FeatureExtractorBase,
    GenerativeModelBase,
)
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
from torchvision.models import VGG16_Weights
from tqdm import tqdm

from errors import UserError

RESULT_NAMES = {
    KEY_METRIC_FID: "fid",
    KEY_METRIC_KID_MEAN: "kid",
    KEY_METRIC_KID_STD: "kid_std",
    KEY_METRIC_ISC_MEAN: "isc",
    KEY_METRIC_ISC_STD: "isc_std",
    KEY_METRIC_PRECISION: "precision",
    KEY_METRIC_RECALL: "recall",
    KEY_METRIC_F_SCORE: "f_score",
}
DOWNLOAD_TIMEOUT = 10  # seconds without data


class Extractor(NamedTuple):
    """A feature extractor in torch-fidelity's registry, and the metrics to compute from its features."""

    name: str  # in the registry, and in the names of cached files
    metrics: list[str]
    weights: Path


class ImageSource(GenerativeModelBase):
    """Images in the form of a torch-fidelity generator: it ignores z and returns the next images by position.

    Args:
        read: read(start, count) returns images start ... start + count - 1, (count, 3, S, S) uint8.
        count: number of images, added to the bar's total when the first are read; none are read from a cache hit.
    """

    z_size, z_type, num_classes = 1, "normal", 0

    def __init__(self, read: Callable[[int, int], Tensor], count: int, bar: tqdm):
        super().__init__()
        self.read, self.count, self.bar = read, count, bar
        self.position = 0

    def forward(self, z: Tensor) -> Tensor:
        if self.position == 0:
            self.bar.total += self.count
        images = self.read(self.position, len(z)).to(z.device)
        self.position += len(z)
        self.bar.update(len(z))
        return images


def find_extractors(
    metrics: Sequence[str], image_size: int, device: torch.device, cache_path: Path, feature_extractor: Path | None
) -> list[Extractor]:
    """Return the extractors that these metrics need; downloads missing weights into `cache_path`.

    Raises:
        UserError: weights are damaged or can be neither found nor downloaded, or the TorchScript file is unusable.
    """
    if feature_extractor is not None:
        return [_torchscript_extractor(feature_extractor, list(metrics), image_size, device)]
    extractors = []
    for name, url, wanted in (
        ("inception-v3-compat", URL_INCEPTION_V3, [metric for metric in metrics if metric != "prc"]),
        ("vgg16", VGG16_Weights.IMAGENET1K_V1.url, [metric for metric in metrics if metric == "prc"]),
    ):
        if wanted:
            extractors.append(Extractor(name, wanted, _find_weights(url, wanted, cache_path)))
    return extractors


def _torchscript_extractor(path: Path, metrics: list[str], image_size: int, device: torch.device) -> Extractor:
    """Check a TorchScript file and enter it into torch-fidelity's registry, from which it creates its extractors."""
    device = device if device.type == "cuda" else torch.device("cpu")  # all that torch-fidelity runs on
    name = f"torchscript-{_sha256(path)[:16]}"
    _check_torchscript(path, image_size, device)

    class TorchScriptExtractor(FeatureExtractorBase):
        def __init__(self, name: str, features_list: list[str], **options: Any):  # all options of calculate_metrics
            super().__init__(name, features_list)
            self.script = torch.jit.load(str(path), map_location=device)

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return ("features",)

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return "features"

        def forward(self, images: Tensor) -> tuple[Tensor]:
            return (self.script(images).float(),)

    FEATURE_EXTRACTORS_REGISTRY[name] = TorchScriptExtractor  # register_feature_extractor accepts a name only once
    return Extractor(name, metrics, path)


def _check_torchscript(path: Path, image_size: int, device: torch.device) -> None:
    """Load the file, which runs the code in it, and try it on two images.

    Raises:
        UserError: it cannot be loaded, fails, or does not return finite features (B, F), F >= 2.
    """
    images = torch.arange(2 * 3 * image_size**2, device=device).byte().view(2, 3, image_size, image_size)
    try:
        features = torch.jit.load(str(path), map_location=device).eval()(images)
    except (ValueError, RuntimeError, torch.jit.Error) as error:
        reason = str(error).strip().splitlines()[-1].split(". ")[0]  # what precedes and follows is many lines
        raise UserError(
            f"--feature_extractor {path} fails to load or to run on uint8 images {tuple(images.shape)}: {reason}"
        ) from error
    is_tensor = isinstance(features, Tensor)
    if not is_tensor or features.dim() != 2 or len(features) != 2 or features.shape[1] < 2:
        found = f"shape {tuple(features.shape)}" if is_tensor else type(features).__name__
        raise UserError(f"--feature_extractor {path} must return features (2, F), F >= 2, for 2 images, got {found}")
    if not features.isfinite().all():
        raise UserError(f"--feature_extractor {path} returns NaN or Inf")


def _find_weights(url: str, metrics: Sequence[str], cache_path: Path) -> Path:
    """Return the path of the file at `url`: in `cache_path` or in torch.hub's folder, else downloaded to `cache_path`."""
    file = url.rsplit("/", 1)[1]
    digits = Path(file).stem.rsplit("-", 1)[1]  # of its SHA-256, by torch.hub's naming convention
    for path in (cache_path / file, Path(torch.hub.get_dir(), "checkpoints", file)):
        if path.exists():
            if not _sha256(path).startswith(digits):  # such as a partial download; torch.hub checks only its own
                raise UserError(f"{path} is damaged (SHA-256 does not begin with {digits}): download {url} again")
            return path
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)  # torch.hub sets none
    try:
        cache_path.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(cache_path / file), digits)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"--metrics {','.join(metrics)} needs {file}, and its download failed ({error}): "
            f"download {url} yourself and put it into {cache_path}"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)
    return cache_path / file


def _sha256(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
