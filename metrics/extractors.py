"""The networks whose features --metrics compares: Inception and VGG16, whose weights are fetched, or one of the user's.

for extractor in find_extractors(["fid", "prc"], 64, torch.device("cpu"), Path("cache"), None): ...
"""

import hashlib
import http.client
import re
import socket
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from errors import UserError, require
from utils import is_out_of_memory

DOWNLOAD_TIMEOUT = 10  # seconds without a byte


class Extractor(NamedTuple):
    """A network that turns images into features, and the metrics to compute from them."""

    name: str  # torch-fidelity's, also part of the names of cached files
    metrics: list[str]
    weights: Path
    kind: type | None  # None: one of torch-fidelity's own


def find_extractors(
    names: Sequence[str], image_size: int, device: torch.device, cache_path: Path, feature_extractor: Path | None
) -> list[Extractor]:
    """The extractors that these metrics need, ready to run; weights that are not there yet go into `cache_path`.

    Raises:
        UserError: torch-fidelity, weights or the extractor cannot be had or used.
    """
    wanted = [name for name in names if name != "faces"]
    if not wanted:
        return []
    require("torch_fidelity", "KEY_METRIC_PRECISION", "torch-fidelity>=0.4", wanted)
    if feature_extractor is not None:
        return [_own_extractor(feature_extractor, wanted, image_size, device)]
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
    from torchvision.models import VGG16_Weights

    extractors = []
    for name, url, metrics in (
        ("inception-v3-compat", URL_INCEPTION_V3, [metric for metric in wanted if metric != "prc"]),
        ("vgg16", VGG16_Weights.IMAGENET1K_V1.url, [metric for metric in wanted if metric == "prc"]),
    ):
        if metrics:
            extractors.append(Extractor(name, metrics, _weights(url, metrics, cache_path), None))
    return extractors


def _weights(url: str, names: Sequence[str], cache_path: Path) -> Path:
    """The file of that address: from the cache, else from torch hub's folder, else downloaded into the cache."""
    file = url.rsplit("/", 1)[1]
    digits = re.search(r"-([0-9a-f]{8})\.", file)[1]  # torch hub's custom: how its SHA-256 begins
    for path in (cache_path / file, Path(torch.hub.get_dir()) / "checkpoints" / file):
        if path.exists():
            if not _sha256(path).startswith(digits):  # torch-fidelity runs code that is in it
                raise UserError(f"{path} is damaged: its SHA-256 should begin with {digits}; fetch {url} anew")
            return path
    path = cache_path / file
    timeout = socket.getdefaulttimeout()
    try:
        socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)  # torch hub has none of its own
        cache_path.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), digits)  # under a temporary name until it is whole
    except (OSError, http.client.HTTPException, RuntimeError) as error:
        reason = " ".join(str(getattr(error, "reason", error)).split())
        raise UserError(
            f"--metrics {','.join(names)} needs {file}, which cannot be downloaded ({reason}): "
            f"fetch {url} yourself and put it into {cache_path}"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)
    return path


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    return digest.hexdigest()


def _own_extractor(path: Path, metrics: list[str], image_size: int, device: torch.device) -> Extractor:
    """Loads a TorchScript file, which runs what is in it, and tries it on two pictures.

    Raises:
        UserError: it is none, or does not give features for images.
    """
    name = f"torchscript-{_sha256(path)[:16]}"
    where = device if device.type == "cuda" else torch.device("cpu")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch does not look at the checksums
        if damaged:
            raise UserError(f"--feature_extractor {path} is damaged: the checksum of {damaged} in it is wrong")
        script = torch.jit.load(str(path), map_location=where).eval()
    except (RuntimeError, ValueError, zipfile.BadZipFile) as error:
        reason = _last_line(error).split(". ")[0]
        raise UserError(f"--feature_extractor {path} is no TorchScript file, or a damaged one: {reason}") from error
    shape = (2, 3, image_size, image_size)
    pictures = torch.arange(int(np.prod(shape)), device=where).remainder(256).byte().view(shape)
    _features(script, path, pictures)
    return Extractor(name, metrics, path, _extractor_type(script, path))


def _features(script: Callable[[Tensor], Any], path: Path, images: Tensor) -> Tensor:
    """Images (B, 3, S, S) uint8 -> features (B, F) float32.

    Raises:
        UserError: the file at `path`, which `script` is from, fails or gives something else.
    """
    try:
        features = script(images)
    except (RuntimeError, torch.jit.Error) as error:
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"--feature_extractor {path} fails on uint8 images {tuple(images.shape)}: {_last_line(error)}"
        ) from error
    is_tensor = isinstance(features, Tensor)
    if not is_tensor or features.dim() != 2 or len(features) != len(images) or features.shape[1] < 2:
        found = f"shape {tuple(features.shape)}" if is_tensor else type(features).__name__
        raise UserError(
            f"--feature_extractor {path} must give features ({len(images)}, F) with F >= 2 for {len(images)} images, "
            f"not {found}"
        )
    features = features.float()
    if not features.isfinite().all():
        raise UserError(f"--feature_extractor {path} gives features that are not finite")
    return features


def _last_line(error: Exception) -> str:
    """What matters in a message of TorchScript's, which is a page long."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _extractor_type(script: Callable[[Tensor], Any], path: Path) -> type:
    """torch-fidelity makes extractors itself, so it needs a class: one that holds this script."""
    from torch_fidelity import FeatureExtractorBase

    class ScriptExtractor(FeatureExtractorBase):
        def __init__(self, name: str, features_list: list[str], **options: Any):  # all options of calculate_metrics
            super().__init__(name, features_list)

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return ("features",)

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return "features"

        def forward(self, images: Tensor) -> tuple[Tensor]:
            return (_features(script, path, images),)

    return ScriptExtractor


@contextmanager
def registered(extractor: Extractor) -> Iterator[None]:
    """torch-fidelity finds extractors by name: makes one of the user's known to it for this once."""
    from torch_fidelity import registry

    if extractor.kind is None:
        yield
        return
    registry.register_feature_extractor(extractor.name, extractor.kind)
    try:
        yield
    finally:
        del registry.FEATURE_EXTRACTORS_REGISTRY[extractor.name]
