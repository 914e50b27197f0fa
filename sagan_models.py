"""The two networks of SAGAN (arXiv 1805.08318), with the layer names and state-dict keys of the 2018 reference.

    images = Generator()(torch.randn(16, 128))              # (16, 3, 64, 64) in [-1, 1]
    logits = Discriminator()(images)                        # (16,)
    images, attn1, attn2 = Generator()(z, return_attention=True)

Both hold their layers in the order they run in, so that the constructor reads as the network and `_run` walks it.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.attention import attend, attention_map
from spectral import SpectralNorm

IMAGE_SIZES = (32, 64, 128, 256)


class SelfAttention(nn.Module):
    """Every position of a feature map looks at every other (paper section 3).

    ``out = gamma * (v A^T) + x`` with ``A = softmax(q^T k)`` over the keys, not scaled by sqrt(d); gamma is learned
    and starts at 0, so that the layer starts as the identity.

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
        """x (B, C, H, W) -> out (B, C, H, W) and, when asked for, the map A (B, N, N), else None; N = H * W.

        ``A[b, i, j]`` is how much position i looks at position j. The path without the map is faster; the path with it
        can be differentiated twice.
        """
        batch, channels, height, width = x.shape
        convolutions = (self.query_conv, self.key_conv, self.value_conv)
        weight = torch.cat([convolution.weight for convolution in convolutions])  # one convolution reads x once
        bias = torch.cat([convolution.bias for convolution in convolutions])
        projected = F.conv2d(x, weight, bias).flatten(2).transpose(1, 2)  # (B, N, C/8 + C/8 + C)
        query, key, value = projected.split([channels // 8, channels // 8, channels], dim=2)
        if return_attention:
            attention = attention_map(query, key)  # (B, N, N)
            out = attention.to(value.dtype) @ value  # (B, N, C)
        else:
            attention, out = None, attend(query, key, value)
        out = out.transpose(1, 2).reshape(batch, channels, height, width)
        return torch.addcmul(x, self.gamma.to(x.dtype), out), attention


class _Layers(nn.Module):
    """A network whose children run one after the other, in the order in which they were registered."""

    def _run(self, x: Tensor, return_attention: bool, sizes: Sequence[int] = ()) -> tuple[Tensor, list[Tensor]]:
        """The output, and the maps of the attention layers where they were asked for.

        `sizes` are those of the batches that x consists of, where it is several on end.
        """
        maps = []
        for layer in self.children():
            if isinstance(layer, SelfAttention):
                x, attention = layer(x, return_attention)
                maps.append(attention)
            elif isinstance(layer, _Block):
                x = layer(x, sizes)
            else:
                x = layer(x)
        return x, maps


class _Block(nn.Sequential):
    """A spectral-normed convolution and what follows it."""

    def forward(self, x: Tensor, sizes: Sequence[int] = ()) -> Tensor:
        convolution, *rest = self
        x = convolution(x, sizes)
        for layer in rest:
            x = layer(x)
        return x


class Generator(_Layers):
    """z to images: ``log2(image_size) - 2`` upsampling blocks, attention at 16x16 and 32x32 (8x8 and 16x16 at size 32).

    Args:
        image_size: 32, 64, 128 or 256.
        z_dim: length of z.
        conv_dim: width of the last block, a multiple of 8; widths double towards z.

    Raises:
        ValueError: image_size or conv_dim is none of these.
    """

    def __init__(self, image_size: int = 64, z_dim: int = 128, conv_dim: int = 64):
        super().__init__()
        blocks = _count_blocks(image_size, conv_dim)
        attention_at = (8, 16) if image_size == 32 else (16, 32)
        width, size = conv_dim * 2 ** (blocks - 1), 4
        self.l1 = _up_block(z_dim, width, stride=1, padding=0)  # (B, width, 4, 4)
        for index in range(2, blocks + 1):
            width, size = width // 2, size * 2
            self.add_module(f"l{index}", _up_block(2 * width, width, stride=2, padding=1))
            if size in attention_at:
                self.add_module(f"attn{attention_at.index(size) + 1}", SelfAttention(width))
        self.last = nn.Sequential(nn.ConvTranspose2d(width, 3, 4, 2, 1), nn.Tanh())

    def forward(self, z: Tensor, return_attention: bool = False) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """z (B, z_dim) -> images (B, 3, S, S) in [-1, 1]; with return_attention also both maps, (B, N, N) each."""
        images, maps = self._run(z.reshape(*z.shape[:2], 1, 1), return_attention)
        return (images, *maps) if return_attention else images


class Discriminator(_Layers):
    """Images to logits: the generator's mirror, attention at 8x8 and 4x4.

    Args:
        image_size: 32, 64, 128 or 256.
        conv_dim: width of the first block, a multiple of 8; widths double from there.

    Raises:
        ValueError: image_size or conv_dim is none of these.
    """

    def __init__(self, image_size: int = 64, conv_dim: int = 64):
        super().__init__()
        blocks = _count_blocks(image_size, conv_dim)
        width, size = conv_dim, image_size // 2
        self.l1 = _down_block(3, width)  # (B, width, S/2, S/2)
        for index in range(2, blocks + 1):
            width, size = width * 2, size // 2
            self.add_module(f"l{index}", _down_block(width // 2, width))
            if size in (8, 4):
                self.add_module("attn1" if size == 8 else "attn2", SelfAttention(width))
        self.last = nn.Sequential(nn.Conv2d(width, 1, 4))

    def forward(self, *batches: Tensor, return_attention: bool = False) -> Tensor | tuple[Tensor, ...]:
        """x (B, 3, S, S) -> logits (B,); with return_attention also both maps, (B, 64, 64) and (B, 16, 16).

        Several batches, ``real_logits, fake_logits = D(real, fake)``, run as one, with the results of one forward after
        the other: nothing here but spectral norm looks beyond an image, and that keeps a sigma for each.
        """
        x = batches[0] if len(batches) == 1 else torch.cat(batches)
        out, maps = self._run(x, return_attention, [len(batch) for batch in batches])
        logits = out.flatten()  # (B, 1, 1, 1) -> (B,)
        if len(batches) > 1:
            return logits.split([len(batch) for batch in batches])
        return (logits, *maps) if return_attention else logits


def _count_blocks(image_size: int, conv_dim: int) -> int:
    if image_size not in IMAGE_SIZES:
        raise ValueError(f"image_size must be one of {IMAGE_SIZES}, got {image_size}")
    if conv_dim < 8 or conv_dim % 8:
        raise ValueError(f"conv_dim must be a positive multiple of 8, got {conv_dim}")
    return int(math.log2(image_size)) - 2


def _up_block(inputs: int, outputs: int, stride: int, padding: int) -> nn.Sequential:
    convolution = nn.ConvTranspose2d(inputs, outputs, 4, stride, padding)
    return _Block(SpectralNorm(convolution), nn.BatchNorm2d(outputs), nn.ReLU())


def _down_block(inputs: int, outputs: int) -> nn.Sequential:
    return _Block(SpectralNorm(nn.Conv2d(inputs, outputs, 4, 2, 1)), nn.LeakyReLU(0.1))


@torch.no_grad()
def gammas_and_sigmas(prefix: str, network: nn.Module) -> dict[str, Tensor]:
    """What a log shows of a network: gamma of each attention layer, sigma of each spectral norm, 0-d and detached.

    They are named as in "gamma/G_attn1" and "sigma/G_l1", with `prefix` in place of "G".
    """
    values = {}
    for name, layer in network.named_modules():
        if isinstance(layer, SelfAttention):
            values[f"gamma/{prefix}_{name}"] = layer.gamma[0]
        elif isinstance(layer, SpectralNorm):
            values[f"sigma/{prefix}_{name.split('.')[0]}"] = layer.sigma()
    return values
