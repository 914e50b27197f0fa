"""Safetensors files: weights, and what it takes to build the network again (see `exporting.loading`).

generator.safetensors has spectral norm folded in; G.safetensors and D.safetensors have it, so that training can start
from them, and numbers of half the size. Such a file has a header of JSON and numbers: reading one runs no code.
"""

from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from training.checkpoint import UNFOLDED


def safetensors_bytes(weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return the content of a file of these weights, which are on the CPU, and metadata."""
    # "format" is what Hugging Face's loaders ask for: the library whose tensors these are.
    return save({key: tensor.contiguous() for key, tensor in weights.items()}, {"format": "pt", **metadata})


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a file, of which only the header is read; raises what safetensors does where it cannot."""
    with safe_open(path, "pt") as file:
        return file.metadata()


def weights_bytes(network: nn.Module, metadata: Mapping[str, str]) -> bytes:
    """Return the content of the file of G or D, on the CPU, to train from; `metadata` is that of G for both.

    Kernels and matrices are in float16. Vectors stay as they are: u and v of spectral norm must have length 1, and
    variances of BatchNorm may be too small for it.
    """
    weights = {key: value.half() if value.dim() > 1 else value for key, value in network.state_dict().items()}
    return safetensors_bytes(weights, {**metadata, "spectral_norm": UNFOLDED, "precision": "float16"})
