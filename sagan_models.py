"""The two networks, with the layer names and state-dict keys of the 2018 reference (heykeetae/Self-Attention-GAN).

    images = Generator()(torch.randn(16, 128))              # (16, 3, 64, 64) in [-1, 1]
    logits = Discriminator()(images)                        # (16,)
    images, attn1, attn2 = Generator()(z, return_attention=True)

DCGAN stacks with spectral norm on every hidden convolution and two self-attention layers (arXiv 1805.08318) each. The
attention layers' 1x1 convolutions and the last layers have no spectral norm. The paper's: networks/paper_models.py.
"""

import math
import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.attention import self_attention
from networks.latents import check_labels
from spectral import SpectralNorm

IMAGE_SIZES = (32, 64, 128, 256)


class SelfAttention(nn.Module):
    """Self-attention over all positions of a feature map (the paper's equations 1 to 3).

    ``out = gamma * (v A^T) + x`` with ``A = softmax(q^T k)`` over the keys, not scaled by sqrt(d). gamma is learned and
    starts at 0, so that the layer starts as the identity.

    Args:
        channels: C of the input, a multiple of 8; queries and keys have C/8 channels.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.query_conv = nn.Conv2d(channels, channels // 8, 1)
        self.key_conv = nn.Conv2d(channels, channels // 8, 1)
        self.value_conv = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, return_attention: bool = False) -> tuple[Tensor, Tensor | None]:
        """x (B, C, H, W) -> out (B, C, H, W) and, by `self_attention`, the map A (B, N, N) or None; N = H * W.

        ``A[b, i, j]`` is how much position i attends to position j.
        """
        batch, channels, height, width = x.shape
        convolutions = (self.query_conv, self.key_conv, self.value_conv)
        weight = torch.cat([convolution.weight for convolution in convolutions])  # one convolution reads x once
        bias = torch.cat([convolution.bias for convolution in convolutions])
        projected = F.conv2d(x, weight, bias).flatten(2).transpose(1, 2)  # (B, N, C/8 + C/8 + C)
        query, key, value = projected.split([channels // 8, channels // 8, channels], dim=2)
        out, attention = self_attention(query, key, value, return_attention)  # (B, N, C)
        out = out.transpose(1, 2).reshape(batch, channels, height, width)
        return torch.addcmul(x, self.gamma.to(x.dtype), out), attention


class Generator(nn.Module):
    """z to images: ``log2(image_size) - 2`` upsampling blocks, attention at 16x16 and 32x32 (8x8 and 16x16 at size 32).

    Args:
        image_size: 32, 64, 128 or 256.
        z_dim: length of z.
        conv_dim: width of the last block, a multiple of 8; widths double towards z.
        num_classes: 0; the reference's networks have no classes.
        has_attention: False for a network without attention layers.

    Raises:
        ValueError: an argument is none of these.
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
        self.num_blocks = _count_blocks(image_size, conv_dim, num_classes)
        self.attention_sizes = () if not has_attention else (8, 16) if image_size == 32 else (16, 32)
        width, num_attention = conv_dim * 2 ** (self.num_blocks - 1), 0
        for index in range(1, self.num_blocks + 1):
            block = _up_block(2 * width, width, stride=2, padding=1) if index > 1 else _up_block(z_dim, width, 1, 0)
            self.add_module(f"l{index}", block)
            if 2 ** (index + 1) in self.attention_sizes:
                num_attention += 1
                self.add_module(f"attn{num_attention}", SelfAttention(width))
            width //= 2
        self.last = nn.Sequential(nn.ConvTranspose2d(conv_dim, 3, 4, 2, 1), nn.Tanh())

    @property
    def first_layer(self) -> nn.Module:
        """The layer that reads z."""
        return self.l1[0]

    def forward(self, z: Tensor, labels: None = None, return_attention: bool = False) -> Tensor | tuple[Tensor, ...]:
        """z (B, z_dim) -> images (B, 3, S, S) in [-1, 1]; with return_attention also all maps, (B, N, N)."""
        check_labels(labels, 0)
        x, maps = z.reshape(*z.shape[:2], 1, 1), []  # (B, z_dim, 1, 1)
        for index in range(1, self.num_blocks + 1):
            x = getattr(self, f"l{index}")(x)  # at size 64: (B, 512, 4, 4), (B, 256, 8, 8), ... (B, 64, 32, 32)
            if x.shape[2] in self.attention_sizes:
                x, attention = getattr(self, f"attn{len(maps) + 1}")(x, return_attention)  # the same shape; (B, N, N)
                maps.append(attention)
        images = self.last(x)  # (B, 3, S, S)
        return (images, *maps) if return_attention else images


class Discriminator(nn.Module):
    """Images to logits: the mirror image of the generator, with attention at 8x8 and 4x4.

    Args:
        conv_dim: width of the first block, a multiple of 8; widths double from there.
        image_size, num_classes, has_attention: as in `Generator`.

    Raises:
        ValueError: an argument is none of these.
    """

    def __init__(self, image_size: int = 64, conv_dim: int = 64, *, num_classes: int = 0, has_attention: bool = True):
        super().__init__()
        self.num_blocks = _count_blocks(image_size, conv_dim, num_classes)
        self.attention_sizes = (8, 4) if has_attention else ()
        width, num_attention = conv_dim, 0
        for index in range(1, self.num_blocks + 1):
            self.add_module(f"l{index}", _down_block(width // 2 if index > 1 else 3, width))
            if image_size // 2**index in self.attention_sizes:
                num_attention += 1
                self.add_module(f"attn{num_attention}", SelfAttention(width))
            width *= 2
        self.last = nn.Sequential(nn.Conv2d(width // 2, 1, 4))

    def forward(self, x: Tensor, labels: None = None, return_attention: bool = False) -> Tensor | tuple[Tensor, ...]:
        """x (B, 3, S, S) -> logits (B,); with return_attention also the maps, (B, 64, 64) and (B, 16, 16)."""
        check_labels(labels, 0)
        maps = []
        for index in range(1, self.num_blocks + 1):
            x = getattr(self, f"l{index}")(x)  # at size 64: (B, 64, 32, 32), (B, 128, 16, 16), ... (B, 512, 4, 4)
            if x.shape[2] in self.attention_sizes:
                x, attention = getattr(self, f"attn{len(maps) + 1}")(x, return_attention)  # the same shape; (B, N, N)
                maps.append(attention)
        logits = self.last(x).flatten()  # (B, 1, 1, 1) -> (B,)
        return (logits, *maps) if return_attention else logits


def generator_sizes(weights: Mapping[str, Tensor]) -> dict[str, int | bool]:
    """Return the arguments of the `Generator` with these weights, named as folded ones; `KeyError` if of others."""
    z_dim, conv_dim = len(weights["l1.0.weight"]), len(weights["last.0.weight"])
    return {"z_dim": z_dim, "conv_dim": conv_dim, **_common_sizes(weights)}


def discriminator_sizes(weights: Mapping[str, Tensor]) -> dict[str, int | bool]:
    """Return the arguments of the `Discriminator`, as `generator_sizes`."""
    return {"conv_dim": len(weights["l1.0.weight"]), **_common_sizes(weights)}


def _common_sizes(weights: Mapping[str, Tensor]) -> dict[str, int | bool]:
    blocks = sum(re.fullmatch(r"l\d+\.0\.weight", key) is not None for key in weights)
    has_attention = any(key.startswith("attn") for key in weights)
    return {"image_size": 4 * 2**blocks, "num_classes": 0, "has_attention": has_attention}


def _count_blocks(image_size: int, conv_dim: int, num_classes: int) -> int:
    if image_size not in IMAGE_SIZES:
        raise ValueError(f"image_size must be one of {IMAGE_SIZES}, got {image_size}")
    if conv_dim < 8 or conv_dim % 8:
        raise ValueError(f"conv_dim must be a positive multiple of 8, got {conv_dim}")
    if num_classes:
        raise ValueError(f"these networks have no classes: num_classes must be 0, got {num_classes}")
    return int(math.log2(image_size)) - 2


def _up_block(inputs: int, outputs: int, stride: int, padding: int) -> nn.Sequential:
    convolution = nn.ConvTranspose2d(inputs, outputs, 4, stride, padding)
    return nn.Sequential(SpectralNorm(convolution), nn.BatchNorm2d(outputs), nn.ReLU())


def _down_block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(SpectralNorm(nn.Conv2d(inputs, outputs, 4, 2, 1)), nn.LeakyReLU(0.1))
