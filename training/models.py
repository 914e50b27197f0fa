"""The networks that `--model` chooses from: built from options, and recognized by their weights."""

import zlib
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Literal

import torch
from torch import Tensor, nn

import sagan_models
from networks import paper_models
from parameter import Config

MODELS = {"sagan": sagan_models, "paper": paper_models}
Kind = Literal["generator", "discriminator"]


def build_networks(config: Config, num_classes: int) -> tuple[nn.Module, nn.Module]:
    """Return G and D, on the CPU in training mode."""
    module, options = MODELS[config.model], {"num_classes": num_classes, "has_attention": config.has_attention}
    G = module.Generator(config.imsize, config.z_dim, config.g_conv_dim, **options)
    return G, module.Discriminator(config.imsize, config.d_conv_dim, **options)


def recognize(kind: Kind, weights: Mapping[str, Tensor]) -> tuple[str, dict[str, Any]]:
    """Return the `--model` that a state dict is of, and its arguments to the constructor; `ValueError` if of none.

    Spectral norm may be folded.
    """
    for name, module in MODELS.items():
        with suppress(KeyError, AttributeError, IndexError, TypeError):  # it is of another model
            plain = {key.replace(".module.weight_bar", ".weight"): value for key, value in weights.items()}
            return name, getattr(module, f"{kind}_sizes")(plain)
    raise ValueError(f"these are not the weights of a {kind} of any --model")


def build_empty(kind: Kind, model: str, sizes: Mapping[str, Any]) -> nn.Module:
    """Return a network without memory, to `load_state_dict(weights, assign=True)`; draws no random numbers."""
    with torch.device("meta"):
        return getattr(MODELS[model], kind.capitalize())(**sizes)


def checksum(weights: Mapping[str, Tensor]) -> int:
    """Return a CRC32 of the numbers of a state dict, whatever device and memory format they are in."""
    value = 0
    for tensor in weights.values():
        value = zlib.crc32(tensor.cpu().contiguous().numpy(), value)
    return value
