"""The networks that `--model` chooses from, and where the weights of each tell their sizes."""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor, nn

import sagan_models
from networks import paper_models

Axis = tuple[str, int]  # a key of a state dict, and an axis of its tensor


class Model(NamedTuple):
    """A pair of networks.

    Attributes:
        make_G: constructor of G, of image_size, z_dim and conv_dim.
        make_D: constructor of D, of image_size and conv_dim.
        block: pattern of the keys of which G has one for each block that doubles the size.
        z_dim, g_conv_dim: axes of G's weights that have these lengths.
        d_conv_dim: axis of D's weights that has this length.
        num_classes: axis of G's weights that has this length in a conditional network; None if there is none.
    """

    make_G: Callable[..., nn.Module]
    make_D: Callable[..., nn.Module]
    block: str
    z_dim: Axis
    g_conv_dim: Axis
    d_conv_dim: Axis
    num_classes: Axis | None = None

    def sizes(self, G: Mapping[str, Tensor], D: Mapping[str, Tensor] | None) -> dict[str, int | bool]:
        """Return the sizes of networks by their state dicts.

        Returns:
            imsize, num_classes, has_attention, z_dim, g_conv_dim and, if D is given, d_conv_dim.

        Raises:
            KeyError: these are other networks.
        """
        axes = [("z_dim", self.z_dim, G), ("g_conv_dim", self.g_conv_dim, G)]
        axes += [("d_conv_dim", self.d_conv_dim, D)] if D is not None else []
        lengths = {name: weights[key].shape[axis] for name, (key, axis), weights in axes}
        imsize = 4 * 2 ** sum(bool(re.fullmatch(self.block, key)) for key in G)
        is_conditional = self.num_classes is not None and self.num_classes[0] in G
        num_classes = G[self.num_classes[0]].shape[self.num_classes[1]] if is_conditional else 0
        has_attention = any(key.startswith("attn") for key in G)
        return {"imsize": imsize, "num_classes": num_classes, "has_attention": has_attention, **lengths}


def network_options(num_classes: int, attention: str) -> dict[str, int | bool]:
    """Return the keyword arguments of `make_G` and `make_D`: for conditional networks, for those without attention."""
    options = {"num_classes": num_classes} if num_classes else {}
    return options | ({"has_attention": False} if attention == "none" else {})


MODELS = {
    "sagan": Model(
        sagan_models.Generator,
        sagan_models.Discriminator,
        block=r"l\d+\.0\.module\.weight_bar",
        z_dim=("l1.0.module.weight_bar", 0),
        g_conv_dim=("last.0.weight", 0),
        d_conv_dim=("l1.0.module.weight_bar", 0),
    ),
    "paper": Model(
        paper_models.Generator,
        paper_models.Discriminator,
        block=r"block\d+\.conv1\.module\.weight_bar",
        z_dim=("linear.module.weight_bar", 1),
        g_conv_dim=("last.module.weight_bar", 1),
        d_conv_dim=("block1.conv1.module.weight_bar", 0),
        num_classes=("block1.bn1.gain.weight", 0),
    ),
}
