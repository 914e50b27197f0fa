"""The networks that `--model` chooses from, and how a checkpoint's weights tell which they are of."""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor, nn

import sagan_models
from networks import paper_models


class Model(NamedTuple):
    """The constructors of a pair of networks, and what their state dicts tell.

    Attributes:
        make_G: takes image_size, z_dim and conv_dim.
        make_D: takes image_size and conv_dim.
        g_sizes: state dict of G -> imsize, z_dim and g_conv_dim; `KeyError` if it is of another network.
        d_sizes: state dict of D -> d_conv_dim; likewise.
    """

    make_G: Callable[..., nn.Module]
    make_D: Callable[..., nn.Module]
    g_sizes: Callable[[Mapping[str, Tensor]], dict[str, int]]
    d_sizes: Callable[[Mapping[str, Tensor]], dict[str, int]]


def _sagan_g_sizes(G: Mapping[str, Tensor]) -> dict[str, int]:
    blocks = sum(bool(re.fullmatch(r"l\d+\.0\.module\.weight_bar", key)) for key in G)
    z_dim, conv_dim = G["l1.0.module.weight_bar"].shape[0], G["last.0.weight"].shape[0]
    return {"imsize": 4 * 2**blocks, "z_dim": z_dim, "g_conv_dim": conv_dim}


def _sagan_d_sizes(D: Mapping[str, Tensor]) -> dict[str, int]:
    return {"d_conv_dim": D["l1.0.module.weight_bar"].shape[0]}


def _paper_g_sizes(G: Mapping[str, Tensor]) -> dict[str, int]:
    blocks = sum(bool(re.fullmatch(r"block\d+\.conv1\.module\.weight_bar", key)) for key in G)
    z_dim, conv_dim = G["linear.module.weight_bar"].shape[1], G["last.module.weight_bar"].shape[1]
    return {"imsize": 4 * 2**blocks, "z_dim": z_dim, "g_conv_dim": conv_dim}


def _paper_d_sizes(D: Mapping[str, Tensor]) -> dict[str, int]:
    return {"d_conv_dim": D["block1.conv1.module.weight_bar"].shape[0]}


MODELS = {
    "sagan": Model(sagan_models.Generator, sagan_models.Discriminator, _sagan_g_sizes, _sagan_d_sizes),
    "paper": Model(paper_models.Generator, paper_models.Discriminator, _paper_g_sizes, _paper_d_sizes),
}
