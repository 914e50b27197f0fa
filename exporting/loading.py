"""Networks from files, for hubconf.py: a checkpoint of this program or of the reference, or a safetensors file."""

import hashlib
import os
from http.client import HTTPException
from pathlib import Path
from typing import Literal
from urllib.parse import urlparse

import torch
from torch import nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from errors import UserError, one_line
from spectral import fold_spectral_norm
from training.checkpoint import is_folded, read_dict, read_export
from training.models import Kind, build_empty, recognize

PRETRAINED = Path(__file__).resolve().parents[1] / "pretrained"  # folders of weights, of the format of export.py


def load_generator(checkpoint: str | os.PathLike) -> nn.Module:
    """Return the generator of a file, as `hubconf.generator` does."""
    return _network(_local(checkpoint), "generator", "ema")


def load_discriminator(checkpoint: str | os.PathLike) -> nn.Module:
    """Return the discriminator of a file, as `hubconf.discriminator` does."""
    return _network(_local(checkpoint), "discriminator", "D")


def pretrained_file(name: str, network: Literal["G", "D"]) -> Path:
    """Return the file of weights that come with the repository; `ValueError` with the names there are."""
    names = sorted(path.parent.name for path in PRETRAINED.glob(f"*/{network}.safetensors"))
    if name not in names:
        raise ValueError(f"pretrained must be one of {', '.join(names) or '(there are none)'}, got {name}")
    return PRETRAINED / name / f"{network}.safetensors"


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
        try:
            torch.hub.download_url_to_file(text, str(path))
        except (OSError, HTTPException) as error:
            raise ValueError(f"{text} cannot be downloaded: {one_line(error)}") from error
    return path


def _network(path: Path, kind: Kind, part: str) -> nn.Module:
    """Return the network of a file of weights, or of that part of a state file."""
    try:
        content = read_export(path)[0] if path.suffix == ".safetensors" else read_dict(path)
        weights = content.get(part, content)
        consume_prefix_in_state_dict_if_present(weights, "module.")  # of the reference's `--parallel`
        network = build_empty(kind, *recognize(kind, weights))
        if is_folded(weights):
            fold_spectral_norm(network)
        network.load_state_dict(weights, assign=True)
    except UserError as error:
        raise ValueError(str(error)) from error
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:  # torch's reason: keys and shapes
        raise ValueError(f"{path} has no {kind} of this program, or is damaged") from error
    return network.float().eval()
