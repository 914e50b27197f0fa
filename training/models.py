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
        block: regular expression that matches one key per block in the state dict of either network.
        z_dim, g_conv_dim: axes of G's weights that have these lengths.
        d_conv_dim: axis of D's weights that has this length.
        g_num_classes, d_num_classes: axes of the weights of conditional networks that have the number of classes as
            their length; None if there are none.
        d_extra_blocks: blocks of D that keep the size of the feature map; the others halve it, and G's double it.
    """

    make_G: Callable[..., nn.Module]
    make_D: Callable[..., nn.Module]
    block: str
    z_dim: Axis
    g_conv_dim: Axis
    d_conv_dim: Axis
    g_num_classes: Axis | None = None
    d_num_classes: Axis | None = None
    d_extra_blocks: int = 0

    def G_sizes(self, G: Mapping[str, Tensor]) -> dict[str, int | bool]:
        """Return imsize, num_classes, has_attention, z_dim and g_conv_dim of a generator by its state dict.

        Raises:
            KeyError: this is another network.
        """
        return self._sizes(G, {"z_dim": self.z_dim, "g_conv_dim": self.g_conv_dim}, self.g_num_classes, 0)

    def D_sizes(self, D: Mapping[str, Tensor]) -> dict[str, int | bool]:
        """Return imsize, num_classes, has_attention and d_conv_dim of a discriminator by its state dict.

        Raises:
            KeyError: this is another network.
        """
        return self._sizes(D, {"d_conv_dim": self.d_conv_dim}, self.d_num_classes, self.d_extra_blocks)

    def _sizes(
        self, weights: Mapping[str, Tensor], axes: Mapping[str, Axis], num_classes: Axis | None, extra_blocks: int
    ) -> dict[str, int | bool]:
        lengths = {name: weights[key].shape[axis] for name, (key, axis) in axes.items()}
        is_conditional = num_classes is not None and num_classes[0] in weights
        return {
            "imsize": 4 * 2 ** (sum(bool(re.fullmatch(self.block, key)) for key in weights) - extra_blocks),
            "num_classes": weights[num_classes[0]].shape[num_classes[1]] if is_conditional else 0,
            "has_attention": any(key.startswith("attn") for key in weights),
            **lengths,
        }


def network_options(num_classes: int, attention: str = "full") -> dict[str, int | bool]:
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
        g_num_classes=("block1.bn1.gain.weight", 0),
        d_num_classes=("embedding.module.weight_bar", 0),
        d_extra_blocks=1,
    ),
}
