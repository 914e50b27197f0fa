"""The two networks of the SAGAN paper (arXiv 1805.08318), at 32x32 to 128x128: ResNets with one attention layer each.

    images = Generator()(torch.randn(16, 128))              # (16, 3, 64, 64) in [-1, 1]
    logits = Discriminator()(images)                        # (16,)
    images, attn1 = Generator()(z, return_attention=True)
    images = Generator(num_classes=10)(z, labels)           # labels (16,), integers from 0 to 9

Spectral norm on all convolutions, linear layers and D's embedding, whose weights are Xavier uniform and biases 0 at
first. With classes, G has class-conditional BatchNorm, and D is a projection discriminator (arXiv 1802.05637).
"""

import re
from collections.abc import Mapping
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.attention import self_attention
from networks.latents import check_labels
from spectral import SpectralNorm


class Layout(NamedTuple):
    """What differs between image sizes. Widths are in units of conv_dim."""

    g_widths: tuple[int, ...]  # of G's linear layer and each of its blocks
    d_widths: tuple[int, ...]  # of each block of D
    num_keeping: int  # last blocks of D, which keep height and width
    attention_size: int  # height and width of the feature maps with attention


LAYOUTS = {
    32: Layout((4, 4, 4, 4), (2, 2, 2, 2), 2, 16),
    64: Layout((16, 8, 4, 2, 1), (1, 2, 4, 8, 16), 1, 32),
    128: Layout((16, 16, 8, 4, 2, 1), (1, 2, 4, 8, 16, 16), 1, 32),
}


class PooledAttention(nn.Module):
    """Self-attention (the paper's equations 1 to 3) with keys and values max-pooled 2x2 and without biases.

    ``out = gamma * out_conv(v A^T) + x`` with ``A = softmax(q^T k)`` over the keys, not scaled by sqrt(d). gamma is
    learned and starts at 0, so that the layer starts as the identity.

    Args:
        channels: C of the input, a multiple of 8; queries and keys have C/8 channels, values C/2.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.query_conv = _conv(channels, channels // 8, 1, bias=False)
        self.key_conv = _conv(channels, channels // 8, 1, bias=False)
        self.value_conv = _conv(channels, channels // 2, 1, bias=False)
        self.out_conv = _conv(channels // 2, channels, 1, bias=False)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, return_attention: bool = False) -> tuple[Tensor, Tensor | None]:
        """x (B, C, H, W) -> out (B, C, H, W) and, by `self_attention`, the map A (B, N, N/4) or None; N = H * W.

        ``A[b, i, j]`` is how much position i attends to the j-th 2x2 square.
        """
        projected = (self.query_conv(x), F.max_pool2d(self.key_conv(x), 2), F.max_pool2d(self.value_conv(x), 2))
        query, key, value = (tensor.flatten(2).transpose(1, 2) for tensor in projected)  # (B, N or N/4, channels)
        out, attention = self_attention(query, key, value, return_attention)  # (B, N, C/2)
        out = self.out_conv(out.transpose(1, 2).unflatten(2, x.shape[2:]))
        return torch.addcmul(x, self.gamma.to(x.dtype), out), attention


class UpsampledConv2d(nn.Conv2d):
    """A 3x3 convolution after nearest-neighbor upsampling, as one transposed 4x4 convolution: 4/9 of the work."""

    def forward(self, x: Tensor) -> Tensor:
        """x (B, inputs, H, W) -> (B, outputs, 2H, 2W)."""
        return F.conv_transpose2d(x, self.kernel(), self.bias, stride=2, padding=1)

    def kernel(self) -> Tensor:
        """Return the 4x4 kernel, (inputs, outputs, 4, 4)."""
        # Each pixel of x is a 2x2 square after upsampling: its kernel is the sum of the 3x3 one at four positions.
        return F.avg_pool2d(self.weight.flip(2, 3).transpose(0, 1), 2, stride=1, padding=1, divisor_override=1)

    def as_conv_transpose(self) -> nn.ConvTranspose2d:
        """Return the transposed convolution, for evaluation."""
        layer = nn.ConvTranspose2d(self.in_channels, self.out_channels, 4, stride=2, padding=1)
        layer.load_state_dict({"weight": self.kernel(), "bias": self.bias})
        return layer


class PooledConv2d(nn.Conv2d):
    """A 3x3 convolution before 2x2 average pooling, as one 4x4 convolution with stride 2: 4/9 of the work."""

    def forward(self, x: Tensor) -> Tensor:
        """x (B, inputs, H, W) -> (B, outputs, H/2, W/2); H and W are even."""
        kernel = F.avg_pool2d(self.weight, 2, stride=1, padding=1)  # the mean of the 3x3 one at four positions
        return F.conv2d(x, kernel, self.bias, stride=2, padding=1)


class ConditionalBatchNorm2d(nn.Module):
    """BatchNorm whose scale and shift of each channel are looked up by class."""

    def __init__(self, channels: int, num_classes: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.gain, self.shift = nn.Embedding(num_classes, channels), nn.Embedding(num_classes, channels)
        nn.init.ones_(self.gain.weight)
        nn.init.zeros_(self.shift.weight)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, C, H, W); labels (B,), or weights of the classes (B, num_classes)."""
        tables = (self.gain, self.shift)
        vectors = [labels @ table.weight if labels.is_floating_point() else table(labels) for table in tables]
        gain, shift = (vector[:, :, None, None].to(x.dtype) for vector in vectors)
        return torch.addcmul(shift, self.norm(x), gain)


class UpBlock(nn.Module):
    """Residual block of G, which doubles height and width. Conditional if num_classes is not 0."""

    def __init__(self, inputs: int, outputs: int, num_classes: int):
        super().__init__()
        self.bn1, self.bn2 = _batch_norm(inputs, num_classes), _batch_norm(outputs, num_classes)
        self.conv1, self.conv2 = _conv(inputs, outputs, 3, UpsampledConv2d), _conv(outputs, outputs, 3)
        self.shortcut = _conv(inputs, outputs, 1)

    def forward(self, x: Tensor, labels: Tensor | None) -> Tensor:
        """x (B, inputs, H, W) -> (B, outputs, 2H, 2W); labels (B,) in a conditional block."""
        out = self.conv1(F.relu(_normalize(self.bn1, x, labels)))
        out = self.conv2(F.relu(_normalize(self.bn2, out, labels)))
        # A 1x1 convolution before upsampling has the result of one after it, for a quarter of the work.
        return out + F.interpolate(self.shortcut(x), scale_factor=2, mode="nearest")


class DownBlock(nn.Module):
    """Residual block of D: the first one has no ReLU before its first convolution, the last ones keep the size."""

    def __init__(self, inputs: int, outputs: int, *, is_first: bool, keeps_size: bool):
        super().__init__()
        self.is_first, self.keeps_size = is_first, keeps_size
        self.conv1 = _conv(inputs, outputs, 3)
        self.conv2 = _conv(outputs, outputs, 3, nn.Conv2d if keeps_size else PooledConv2d)
        self.shortcut = nn.Identity() if keeps_size and inputs == outputs else _conv(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, inputs, H, W) -> (B, outputs, H/2, W/2), or (B, outputs, H, W) by a block that keeps the size."""
        out = self.conv2(F.relu(self.conv1(x if self.is_first else F.relu(x))))
        if not self.keeps_size:
            # Pooling before the 1x1 convolution has the result of pooling after it, for a quarter of the work.
            x = F.avg_pool2d(x, 2)
        return out + self.shortcut(x)


class Generator(nn.Module):
    """z to images: a linear layer to 4x4, residual blocks that double the size, attention at 32x32 (size 32: 16x16).

    Args:
        image_size: 32, 64 or 128.
        z_dim: length of z.
        conv_dim: width of the last block, at size 32 a quarter of it; a multiple of 8.
        num_classes: 0 for an unconditional network.
        has_attention: False for a network without its attention layer.

    Raises:
        ValueError: image_size or conv_dim is none of these.
    """

    def __init__(
        self,
        image_size: int = 64,
        z_dim: int = 128,
        conv_dim: int = 64,
        *,
        num_classes: int = 0,
        has_attention: bool = True,
    ):
        super().__init__()
        layout = _check_sizes(image_size, conv_dim)
        widths = [conv_dim * factor for factor in layout.g_widths]
        self.num_blocks, self.num_classes = len(widths) - 1, num_classes
        self.attention_size = layout.attention_size if has_attention else None
        self.linear = _spectral_norm(nn.Linear(z_dim, widths[0] * 4 * 4))
        for index, (inputs, outputs) in enumerate(pairwise(widths), 1):
            self.add_module(f"block{index}", UpBlock(inputs, outputs, num_classes))
            if 4 * 2**index == self.attention_size:
                self.attn1 = PooledAttention(outputs)
        self.bn = nn.BatchNorm2d(widths[-1])
        self.last = _conv(widths[-1], 3, 3)

    @property
    def first_layer(self) -> nn.Module:
        """The layer that reads z."""
        return self.linear

    def forward(
        self, z: Tensor, labels: Tensor | None = None, return_attention: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """z (B, z_dim) -> images (B, 3, S, S) in [-1, 1]; with return_attention also the map (B, N, N/4).

        N is 1024, at size 32 it is 256.

        Args:
            labels: (B,), integers below num_classes, or (B, num_classes), floats: weights by which the scales and
                shifts of the classes are averaged, to interpolate between classes. None in an unconditional network.
        """
        check_labels(labels, self.num_classes)
        x, maps = self.linear(z).unflatten(1, (-1, 4, 4)), []
        for index in range(1, self.num_blocks + 1):
            x = getattr(self, f"block{index}")(x, labels)  # at 64: (B, 512, 8, 8), ... (B, 64, 64, 64)
            if x.shape[2] == self.attention_size:
                x, attention = self.attn1(x, return_attention)  # the same shape; (B, N, N/4)
                maps.append(attention)
        images = torch.tanh(self.last(F.relu(self.bn(x))))
        return (images, *maps) if return_attention else images


class Discriminator(nn.Module):
    """Images to logits: residual blocks, of which the last ones keep the size, and attention as in `Generator`.

    Args:
        conv_dim: width of the first block, at size 32 half of it; a multiple of 8.
        image_size, num_classes, has_attention: as in `Generator`.

    Raises:
        ValueError: image_size or conv_dim is none of these.
    """

    def __init__(self, image_size: int = 64, conv_dim: int = 64, *, num_classes: int = 0, has_attention: bool = True):
        super().__init__()
        layout = _check_sizes(image_size, conv_dim)
        widths = [3, *(conv_dim * factor for factor in layout.d_widths)]
        self.num_blocks, self.num_classes = len(widths) - 1, num_classes
        self.attention_size = layout.attention_size if has_attention else None
        for index, (inputs, outputs) in enumerate(pairwise(widths), 1):
            keeps_size = index > self.num_blocks - layout.num_keeping
            self.add_module(f"block{index}", DownBlock(inputs, outputs, is_first=index == 1, keeps_size=keeps_size))
            if image_size // 2**index == self.attention_size:
                self.attn1 = PooledAttention(outputs)
        self.linear = _spectral_norm(nn.Linear(widths[-1], 1))
        if num_classes:
            self.embedding = _spectral_norm(nn.Embedding(num_classes, widths[-1]))

    def forward(
        self, x: Tensor, labels: Tensor | None = None, return_attention: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x (B, 3, S, S) -> logits (B,); with return_attention also the map (B, N, N/4) of `Generator`'s shape.

        Args:
            labels: (B,), integers below num_classes; None in an unconditional network.
        """
        check_labels(labels, self.num_classes)
        maps = []
        for index in range(1, self.num_blocks + 1):
            x = getattr(self, f"block{index}")(x)  # at 64: (B, 64, 32, 32), ... (B, 512, 4, 4), (B, 1024, 4, 4)
            if x.shape[2] == self.attention_size:
                x, attention = self.attn1(x, return_attention)  # the same shape; (B, N, N/4)
                maps.append(attention)
        features = F.relu(x).sum((2, 3))  # at 64: (B, 1024)
        logits = self.linear(features).flatten()  # (B,)
        if labels is not None:
            logits = logits + (self.embedding(labels) * features).sum(1)
        return (logits, *maps) if return_attention else logits


def generator_sizes(weights: Mapping[str, Tensor]) -> dict[str, int | bool]:
    """Return the arguments of the `Generator` with these weights, named as folded ones; `KeyError` if of others."""
    z_dim, width = (weights[f"{name}.weight"].shape[1] for name in ("linear", "last"))
    sizes = _common_sizes(weights, "block1.bn1.gain.weight", 4)
    return {"z_dim": z_dim, "conv_dim": width // LAYOUTS[sizes["image_size"]].g_widths[-1], **sizes}


def discriminator_sizes(weights: Mapping[str, Tensor]) -> dict[str, int | bool]:
    """Return the arguments of the `Discriminator`, as `generator_sizes`."""
    width, sizes = len(weights["block1.conv1.weight"]), _common_sizes(weights, "embedding.weight", 2)
    return {"conv_dim": width // LAYOUTS[sizes["image_size"]].d_widths[0], **sizes}


def _common_sizes(weights: Mapping[str, Tensor], classes: str, base: int) -> dict[str, int | bool]:
    """`classes` is the key of a row per class, `base` the image size / 2**blocks."""
    blocks = sum(re.fullmatch(r"block\d+\.conv1\.weight", key) is not None for key in weights)
    num_classes, has_attention = len(weights.get(classes, ())), any(key.startswith("attn") for key in weights)
    return {"image_size": base * 2**blocks, "num_classes": num_classes, "has_attention": has_attention}


def _check_sizes(image_size: int, conv_dim: int) -> Layout:
    if image_size not in LAYOUTS:
        raise ValueError(f"image_size must be one of {tuple(LAYOUTS)}, got {image_size}")
    if conv_dim < 8 or conv_dim % 8:
        raise ValueError(f"conv_dim must be a positive multiple of 8, got {conv_dim}")
    return LAYOUTS[image_size]


def _spectral_norm(layer: nn.Conv2d | nn.Linear | nn.Embedding) -> SpectralNorm:
    nn.init.xavier_uniform_(layer.weight)
    if getattr(layer, "bias", None) is not None:
        nn.init.zeros_(layer.bias)
    return SpectralNorm(layer)


def _conv(
    inputs: int, outputs: int, kernel_size: int, layer: type[nn.Conv2d] = nn.Conv2d, bias: bool = True
) -> SpectralNorm:
    return _spectral_norm(layer(inputs, outputs, kernel_size, padding=kernel_size // 2, bias=bias))


def _normalize(batch_norm: nn.Module, x: Tensor, labels: Tensor | None) -> Tensor:
    return batch_norm(x) if labels is None else batch_norm(x, labels)


def _batch_norm(channels: int, num_classes: int) -> nn.Module:
    return ConditionalBatchNorm2d(channels, num_classes) if num_classes else nn.BatchNorm2d(channels)
