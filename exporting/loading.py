"""Networks from files, for hubconf.py: a checkpoint of this program or of the reference, or generator.safetensors."""

import hashlib
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch import nn

from exporting.safetensors_file import read_generator
from training.models import MODELS, Model, network_options
from training.weights import one_line, read_dict, strip_dataparallel_prefix


def load_generator(checkpoint: str | os.PathLike) -> nn.Module:
    """Return the generator of a file, on the CPU in evaluation mode; of `{step}_state.pth` the EMA generator.

    Args:
        checkpoint: path, or http(s) URL of a file, which is downloaded once.

    Raises:
        ValueError: the file is missing, damaged or has no generator of this program; the message is one line.
    """
    path = _local(checkpoint)
    if path.suffix == ".safetensors":
        return read_generator(path)
    content = read_dict(path)
    return _network(path, "generator", content.get("ema", content.get("G", content)))


def load_discriminator(checkpoint: str | os.PathLike) -> nn.Module:
    """Return the discriminator of a file; see `load_generator`."""
    path = _local(checkpoint)
    if path.suffix == ".safetensors":
        raise ValueError(f"{path} is an export, which has no discriminator: use {{step}}_D.pth or {{step}}_state.pth")
    content = read_dict(path)
    return _network(path, "discriminator", content.get("D", content))


def _local(checkpoint: str | os.PathLike) -> Path:
    """Return the path; of a URL, that of its file in torch.hub's folder, downloaded if it is not there."""
    text = os.fspath(checkpoint)
    if not text.startswith(("http://", "https://")):
        return Path(os.path.expanduser(text))
    # With a digest: the exports of all runs have the same name.
    name = f"{hashlib.sha256(text.encode()).hexdigest()[:16]}_{Path(urlparse(text).path).name}"
    path = Path(torch.hub.get_dir(), "checkpoints", name)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(text, str(path))
    return path


def _network(path: Path, kind: str, weights: dict[str, Any]) -> nn.Module:
    """Return the network of a state dict. `kind` is generator or discriminator."""
    build = _build_generator if kind == "generator" else _build_discriminator
    for model in MODELS.values():
        with suppress(KeyError, AttributeError, IndexError):  # it is of another model
            weights = strip_dataparallel_prefix(weights)
            try:
                with torch.device("meta"):  # without memory and random numbers: the weights follow
                    network = build(model, weights)
                network.load_state_dict(weights, assign=True)
            except (TypeError, ValueError, RuntimeError) as error:
                raise ValueError(f"{path} has no {kind} of this program: {one_line(error)}") from error
            return network.float().eval()
    raise ValueError(f"{path} has no {kind} of this program")


def _build_generator(model: Model, weights: Mapping[str, Any]) -> nn.Module:
    sizes = model.G_sizes(weights)
    return model.make_G(sizes["imsize"], sizes["z_dim"], sizes["g_conv_dim"], **_options(sizes))


def _build_discriminator(model: Model, weights: Mapping[str, Any]) -> nn.Module:
    sizes = model.D_sizes(weights)
    return model.make_D(sizes["imsize"], sizes["d_conv_dim"], **_options(sizes))


def _options(sizes: Mapping[str, int]) -> dict[str, int | bool]:
    return network_options(sizes["num_classes"], "full" if sizes["has_attention"] else "none")
