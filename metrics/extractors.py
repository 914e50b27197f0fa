"""torch-fidelity's feature extractors for FID and related scores, Inception and VGG16: their weights and input.

torch-fidelity is an optional dependency: import this module only for metrics that need it.
"""

import hashlib
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch_fidelity import GenerativeModelBase
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torch_fidelity.metric_fid import KEY_METRIC_FID
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD
from torch_fidelity.metric_prc import KEY_METRIC_F_SCORE, KEY_METRIC_PRECISION, KEY_METRIC_RECALL  # new in 0.4
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


class ImageSource(GenerativeModelBase):
    """Images in the form of a torch-fidelity generator: it ignores z and returns the next images by position.

    Args:
        read: read(start, count) returns images start ... start + count - 1, (count, 3, S, S) uint8.
        count: number of images per extractor, added to the bar's total when an extractor reads the first.
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
        self.position = (self.position + len(z)) % self.count  # the next extractor begins at the first image
        self.bar.update(len(z))
        return images


def fetch_weights(metrics: Sequence[str]) -> None:
    """Download those weights of torch-fidelity's extractors that are missing.

    Raises:
        UserError: weights are damaged or cannot be downloaded.
    """
    if "prc" in metrics:
        _fetch_weights(VGG16_Weights.IMAGENET1K_V1.url, metrics)
    if set(metrics) - {"prc"}:
        _fetch_weights(URL_INCEPTION_V3, metrics)


def _fetch_weights(url: str, metrics: Sequence[str]) -> None:
    """Download a file into torch.hub's folder, where torch-fidelity looks for it, or check the one that is there."""
    path = Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[1])
    digits = path.stem.rsplit("-", 1)[1]  # of the file's SHA-256, by torch.hub's naming convention
    if path.exists():
        if not _sha256(path).startswith(digits):  # such as a partial download; torch.hub checks only its own
            raise UserError(f"{path} is damaged (its SHA-256 does not begin with {digits}): download {url} again")
        return
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)  # torch.hub sets none
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), digits)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"--metrics {','.join(metrics)} needs {path.name}, and its download failed ({error}): "
            f"download {url} yourself and put it into {path.parent}"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)


def _sha256(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
