"""generator.safetensors: weights with spectral norm folded in, and what it takes to build the network again.

    G = read_generator("generator.safetensors")
    images = G(torch.randn(16, 128))                # (16, 3, 64, 64) in [-1, 1]

A safetensors file has a header of JSON and numbers: reading one runs no code. The library is an optional dependency.
"""

import os
from collections.abc import Mapping

from torch import nn

from errors import one_line
from spectral import fold_spectral_norm
from training.checkpoint import read_export
from training.models import build_empty, export_sizes


def safetensors_bytes(G: nn.Module, metadata: Mapping[str, str]) -> bytes:
    """Return the content of the file: of G, on the CPU with spectral norm folded, and its metadata."""
    from safetensors.torch import save

    # "format" is what Hugging Face's loaders ask for: the library whose tensors these are.
    return save({key: tensor.contiguous() for key, tensor in G.state_dict().items()}, {"format": "pt", **metadata})


def read_metadata(path: str | os.PathLike) -> dict[str, str]:
    """Return the metadata of a safetensors file; raises what safetensors does where it cannot be read."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def read_generator(path: str | os.PathLike) -> nn.Module:
    """Return the generator of a file, on the CPU in evaluation mode; it has plain layers in place of spectral norm.

    Raises:
        ValueError: the file is missing, damaged or not an export of this program; the message is one line.
        ModuleNotFoundError: safetensors is not installed.
    """
    weights, metadata = read_export(path)
    try:
        G = fold_spectral_norm(build_empty("generator", *export_sizes(metadata)))
        G.load_state_dict(weights, assign=True)
    except (KeyError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged or not an export of this program: {one_line(error)}") from error
    return G.eval()
