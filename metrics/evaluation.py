"""The metrics that `--metrics` lists, in training and in `--train false`."""

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from data_loader import Loader
from metrics.scores import check_requirements, compute_scores
from parameter import Config
from utils import SEED_METRICS_LABELS, derive_seed


def check_metrics(config: Config, device: torch.device) -> None:
    """Check, before any work, that `compute_metrics` will find its libraries and weights; downloads missing weights.

    Raises:
        UserError: a library, weights or the feature extractor is missing or unusable.
    """
    if config.metrics:
        check_requirements(config.metrics.split(","), config.imsize, device, _feature_extractor(config))


def compute_metrics(
    config: Config, G: nn.Module, z: Tensor, loader: Loader, should_stop: Callable[[], bool] = lambda: False
) -> dict[str, float]:
    """Compute the metrics of G's images of z (N, z_dim) against the loader's images; see `metrics/scores.py`.

    The classes of a conditional G's images are drawn by their frequency in the loader's, from the seed.

    Args:
        config: the options.
        G: in evaluation mode.
        z: an image is generated for each; also the maximum number of real images.
        loader: opened.
        should_stop: asked before each batch of images.

    Raises:
        UserError: see `compute_scores`.
    """
    inputs = (z,)
    if config.conditional:
        rng = torch.Generator().manual_seed(derive_seed(config.seed, SEED_METRICS_LABELS))
        inputs += (loader.labels[torch.randint(len(loader.labels), (len(z),), generator=rng).to(z.device)],)
    return compute_scores(
        lambda start, count: G(*(given[start : start + count] for given in inputs)),
        loader.images,
        config.metrics.split(","),
        num_images=len(z),
        batch_size=config.batch_size,
        device=z.device,
        cache_path=Path(os.path.expanduser(config.cache_path)),
        real_name=f"{loader.source.name}_{loader.source.fingerprint}",
        feature_extractor=_feature_extractor(config),
        should_stop=should_stop,
    )


def _feature_extractor(config: Config) -> Path | None:
    return Path(os.path.expanduser(config.feature_extractor)) if config.feature_extractor else None
