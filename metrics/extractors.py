"""Scores by torch-fidelity: FID, KID, Inception score, precision and recall, of features of Inception and VGG16.

torch-fidelity is an optional dependency: import this module only for metrics that need it.
"""

import hashlib
import socket
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch_fidelity import GenerativeModelBase, calculate_metrics
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torch_fidelity.metric_fid import KEY_METRIC_FID
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD
from torch_fidelity.metric_prc import KEY_METRIC_F_SCORE, KEY_METRIC_PRECISION, KEY_METRIC_RECALL  # new in 0.4
from torchvision.models import VGG16_Weights
from tqdm import tqdm

from errors import UserError
from metrics.scores import MIN_IMAGES, ImageFn, Images
from utils import progress

RESULT_NAMES = {  # ours, by torch-fidelity's
    KEY_METRIC_FID: "fid",
    KEY_METRIC_KID_MEAN: "kid",
    KEY_METRIC_KID_STD: "kid_std",
    KEY_METRIC_ISC_MEAN: "isc",
    KEY_METRIC_ISC_STD: "isc_std",
    KEY_METRIC_PRECISION: "precision",
    KEY_METRIC_RECALL: "recall",
    KEY_METRIC_F_SCORE: "f_score",
}
ISC_SPLITS = MIN_IMAGES
KID_SUBSET_SIZE = 1000
PRC_BATCH_SIZE = 1000  # rows of the distance matrix in memory at a time
DOWNLOAD_TIMEOUT = 10  # seconds without data


class ImageSource(GenerativeModelBase):
    """Images in the form of a torch-fidelity generator: it ignores z and returns the next images by position."""

    z_size, z_type, num_classes = 1, "normal", 0

    def __init__(self, read: ImageFn, count: int, bar: tqdm):
        super().__init__()
        self.read, self.count, self.bar = read, count, bar
        self.position = 0

    def forward(self, z: Tensor) -> Tensor:
        if self.position == 0:  # of another extractor
            self.bar.total += self.count
        images = self.read(self.position, len(z)).to(z.device)
        self.position = (self.position + len(z)) % self.count
        self.bar.update(len(z))
        return images


def feature_scores(
    names: Sequence[str], fakes: Images, reals: Images, batch_size: int, device: torch.device, cache: Path, key: str
) -> dict[str, float]:
    """Run torch-fidelity; it caches the features of the real images in files whose names begin with `key`."""
    kid_subset_size = min(KID_SUBSET_SIZE, fakes.count, reals.count)
    with progress(None, ", ".join(names), "img", total=0) as bar:
        results = calculate_metrics(
            input1=ImageSource(*fakes, bar),
            input1_model_num_samples=fakes.count,
            input2=None if names == ["isc"] else ImageSource(*reals, bar),  # isc needs no real images
            input2_model_num_samples=reals.count,
            input2_cache_name=key,
            **{name: name in names for name in ("fid", "kid", "isc", "prc")},
            isc_splits=ISC_SPLITS,
            kid_subset_size=kid_subset_size,
            prc_batch_size=PRC_BATCH_SIZE,
            cuda=device.type == "cuda",
            batch_size=batch_size,
            cache_root=str(cache),
            save_cpu_ram=True,
            verbose=False,
        )
    if kid_subset_size == fakes.count == reals.count:  # all subsets are the whole set
        results.pop(KEY_METRIC_KID_STD, None)
    return {ours: results[theirs] for theirs, ours in RESULT_NAMES.items() if theirs in results}


def fetch_weights(metrics: Sequence[str]) -> None:
    """Download those weights of torch-fidelity's extractors that are missing.

    Raises:
        UserError: weights are damaged or cannot be downloaded.
    """
    timeout = socket.getdefaulttimeout()
    for url in sorted({VGG16_Weights.IMAGENET1K_V1.url if name == "prc" else URL_INCEPTION_V3 for name in metrics}):
        path = Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[1])  # where torch-fidelity looks for it
        digits = path.stem.rsplit("-", 1)[1]  # of the file's SHA-256, by torch.hub's naming convention
        socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)  # torch.hub sets none
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                torch.hub.download_url_to_file(url, str(path), digits)
            elif not hashlib.sha256(path.read_bytes()).hexdigest().startswith(digits):
                raise UserError(f"{path} is damaged (its SHA-256 does not begin with {digits}): download {url} again")
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"--metrics {','.join(metrics)} needs {path}, and it cannot be read or downloaded ({error}): "
                f"download {url} yourself and put it there"
            ) from error
        finally:
            socket.setdefaulttimeout(timeout)
