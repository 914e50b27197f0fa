"""`--metrics` of a generator, as the options say: in training and in `--train false`."""

from pathlib import Path

import torch
from torch import Tensor

from data_loader import Loader
from metrics import scores as metrics
from parameter import Config
from sagan_models import Generator


def check_metrics(config: Config, device: torch.device) -> None:
    """Makes sure, before any work, that `compute_metrics` will find the libraries and weights that it needs.

    Raises:
        UserError: it would not.
    """
    if config.metrics:
        scores.check_requirements(
            config.metrics.split(","),
            image_size=config.imsize,
            device=device,
            cache_path=Path(config.cache_path).expanduser(),
            feature_extractor=_extractor(config),
        )


def compute_metrics(config: Config, G: Generator, z: Tensor, loader: Loader) -> dict[str, float]:
    """The metrics of what G makes of noise z (N, z_dim), against the loader's images; see metrics.py.

    Raises:
        UserError: something that they need cannot be had.
    """
    return scores.compute_scores(
        lambda start, count: G(z[start : start + count]),
        loader.images,
        config.metrics.split(","),
        num_images=len(z),
        batch_size=config.batch_size,
        device=z.device,
        cache_path=Path(config.cache_path).expanduser(),
        real_name=f"{loader.source.name}_{loader.source.fingerprint}",
        feature_extractor=_extractor(config),
    )


def _extractor(config: Config) -> Path | None:
    return Path(config.feature_extractor).expanduser() if config.feature_extractor else None
