"""Safetensors files: weights, and what it takes to build the network again.

generator.safetensors has spectral norm folded in; G.safetensors and D.safetensors have it, so that training can start
from them, and numbers of half the size.

    G = read_generator("generator.safetensors")
    images = G(torch.randn(16, 128))                # (16, 3, 64, 64) in [-1, 1]

A safetensors file has a header of JSON and numbers: reading one runs no code.
"""

import os
from collections.abc import Mapping

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from errors import one_line
from spectral import fold_spectral_norm
from training.checkpoint import UNFOLDED, is_folded, read_export
from training.models import build_empty, export_sizes


def safetensors_bytes(G: nn.Module, metadata: Mapping[str, str]) -> bytes:
    """Return the content of the file: of G, on the CPU with spectral norm folded, and its metadata."""
    return _save(G.state_dict(), metadata)


def weights_bytes(network: nn.Module, metadata: Mapping[str, str]) -> bytes:
    """Return the content of the file of G or D, on the CPU, to train from; `metadata` is that of G for both.

    Kernels and matrices are in float16. Vectors stay as they are: u and v of spectral norm must have length 1, and
    variances of BatchNorm may be too small for it.
    """
    weights = {key: value.half() if value.dim() > 1 else value for key, value in network.state_dict().items()}
    return _save(weights, {**metadata, "spectral_norm": UNFOLDED, "precision": "float16"})


def _save(weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    # "format" is what Hugging Face's loaders ask for: the library whose tensors these are.
    return save({key: tensor.contiguous() for key, tensor in weights.items()}, {"format": "pt", **metadata})


def read_metadata(path: str | os.PathLike) -> dict[str, str]:
    """Return the metadata of a safetensors file; raises what safetensors does where it cannot be read."""
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def read_generator(path: str | os.PathLike) -> nn.Module:
    """Return the generator of a file, on the CPU in evaluation mode; an export's has plain layers, no spectral norm.

    Raises:
        ValueError: the file is missing, damaged or not an export of this program; the message is one line.
    """
    weights, metadata = read_export(path)
    try:
        G = build_empty("generator", *export_sizes(metadata))
        G = fold_spectral_norm(G) if is_folded(metadata) else G
        G.load_state_dict(weights, assign=True)
    except (KeyError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged or not an export of this program: {one_line(error)}") from error
    return G.eval()
