"""The metrics that `--metrics` lists, in training and in `--train false`."""

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from data_loader import Loader
from metrics.scores import check_requirements, compute_scores
from networks.latents import sample_z
from parameter import Config
from utils import SEED_METRICS, SEED_METRICS_LABELS, derive_seed


def check_metrics(config: Config, device: torch.device) -> None:
    """Check, before any work, that `compute_metrics` will find its libraries and weights; downloads missing weights.

    Raises:
        UserError: a library, or weights are missing or unusable.
    """
    if config.metrics:
        check_requirements(config.metrics.split(","), device)


def compute_metrics(
    config: Config, G: nn.Module, loader: Loader, should_stop: Callable[[], bool] = lambda: False
) -> dict[str, float]:
    """Compare `--metric_num` images of G with the loader's images; see `metrics/scores.py`.

    z and, for a conditional G, classes as frequent as the loader's are drawn from the seed.

    Args:
        G: in evaluation mode.
        loader: opened.
        should_stop: asked before each batch of images.

    Raises:
        UserError: see `compute_scores`.
    """
    count, device, labels = config.metric_num, loader.device, None
    truncation = None if config.train else config.truncation
    z = sample_z(derive_seed(config.seed, SEED_METRICS), count, config.z_dim, device, truncation)
    if config.conditional:
        rng = torch.Generator().manual_seed(derive_seed(config.seed, SEED_METRICS_LABELS))
        labels = loader.labels[torch.randint(len(loader.labels), (count,), generator=rng).to(device)]

    def generate(start: int, count: int) -> Tensor:
        rows = slice(start, start + count)
        return G(z[rows], None if labels is None else labels[rows])

    return compute_scores(
        generate,
        loader.images,
        config.metrics.split(","),
        num_images=count,
        batch_size=config.batch_size,
        device=device,
        cache_path=Path(os.path.expanduser(config.cache_path)),
        real_name=f"{loader.source.name}_{loader.source.fingerprint}",
        should_stop=should_stop,
    )
