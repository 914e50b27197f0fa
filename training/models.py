"""The networks that `--model` chooses from: built from options, and recognized by their weights."""

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from torch import Tensor, nn

import sagan_models
from networks import paper_models
from parameter import Config

MODELS = {"sagan": sagan_models, "paper": paper_models}


def build_networks(config: Config, num_classes: int) -> tuple[nn.Module, nn.Module]:
    """Return G and D, on the CPU in training mode."""
    module, options = MODELS[config.model], {"num_classes": num_classes, "has_attention": config.has_attention}
    G = module.Generator(config.imsize, config.z_dim, config.g_conv_dim, **options)
    return G, module.Discriminator(config.imsize, config.d_conv_dim, **options)


def find_model(sizes: Callable[[ModuleType], dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    """Return the name of the model whose networks these are, and their sizes.

    Args:
        sizes: returns the sizes that weights have in a module of `MODELS`, see `generator_sizes` there.

    Raises:
        KeyError: they are none of these.
    """
    for name, module in MODELS.items():
        try:
            return name, sizes(module)
        except (KeyError, AttributeError, IndexError, TypeError):  # they are of another model
            continue
    raise KeyError("no --model has networks with these weights")
