"""Read files of weights, without running code in them."""

import os
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

EXPORT_CONTENT, EXPORT_VERSION = "sagan-generator", "1"  # in the metadata of generator.safetensors


def read_dict(path: Path) -> dict[str, Any]:
    """Return the dict that a file of torch.save contains, on the CPU, read with `weights_only=True`.

    Raises:
        ValueError: the file is missing, damaged or contains something else; the message is one line.
    """
    try:
        if zipfile.is_zipfile(path):  # torch does not verify the checksums in its own zip files
            with zipfile.ZipFile(path) as archive:
                if broken := archive.testzip():
                    raise ValueError(f"wrong checksum of {broken}")
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict):
            raise TypeError(f"it contains a {type(content).__name__}, not a dict")
    except FileNotFoundError as error:
        raise ValueError(f"there is no {path}") from error
    except Exception as error:  # OSError, RuntimeError, UnpicklingError, BadZipFile, EOFError, ...: all kinds of damage
        # torch's messages are long, and advise to switch off `weights_only`.
        reason = str(error) if isinstance(error, (OSError, TypeError, ValueError)) else "torch cannot read it"
        raise ValueError(f"{path} is damaged or not a checkpoint ({' '.join(reason.split())})") from error
    return content


def read_export(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the weights and the metadata of a generator.safetensors, see `exporting.description`.

    Raises:
        ValueError: the file is missing, damaged or not an export of this program; the message is one line.
        ModuleNotFoundError: safetensors is not installed.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            weights = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118  not a dict; not mapped
        if (metadata.get("content"), metadata.get("content_version")) != (EXPORT_CONTENT, EXPORT_VERSION):
            raise ValueError(f"its metadata does not say {EXPORT_CONTENT}, version {EXPORT_VERSION}")
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged or not an export of this program: {one_line(error)}") from error
    return weights, metadata


def checksum(weights: Mapping[str, Tensor]) -> int:
    """Return a CRC32 of the numbers of a state dict, whatever device and memory format they are in."""
    value = 0
    for tensor in weights.values():
        value = zlib.crc32(tensor.cpu().contiguous().numpy(), value)
    return value


def one_line(error: Exception) -> str:
    """Return the type and the message of an error, at most 200 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def strip_dataparallel_prefix(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove the "module." that the reference's `--parallel` puts before every key."""
    if all(key.startswith("module.") for key in weights):
        return {key.removeprefix("module."): value for key, value in weights.items()}
    return weights
