"""Write the files of an export. None is ever replaced unasked."""

import copy
import hashlib
import io
import math
import os
from collections.abc import Collection, Mapping, Sequence
from itertools import chain
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from datasets.labels import as_text
from errors import UserError
from exporting.model_card import describe, model_card, read_metrics
from exporting.onnx_file import onnx_bytes
from parameter import Config
from spectral import fold_spectral_norm
from training.previews import samples_grid, select_classes
from training.resuming import TestNetworks, load_test_checkpoint, load_test_networks
from utils import check_writable, write_atomically

FILES = {"safetensors": ["generator.safetensors"], "onnx": ["generator.onnx"],
         "weights": ["G.safetensors", "D.safetensors"]}  # fmt: skip
NETWORK_FILES = [*chain(*FILES.values())]


def export(config: Config, given: set[str], export_path: str, formats: Sequence[str], with_maps: bool) -> int:
    """Write the files and print where they are. Returns the exit code, 0.

    Args:
        given: names of main.py's options on the command line.
        formats: one or more of `FILES`.
        with_maps: make attention maps outputs of ONNX.

    Raises:
        UserError: the checkpoint cannot be loaded, or another export of this step is there already.
    """
    if config.metrics:
        raise UserError("--metrics: export.py computes none; the model card has those of main.py --train false")
    if config.project:
        raise UserError("--project is for main.py --train false")
    saved, config = load_test_checkpoint(config, given)
    networks = load_test_networks(saved, config)
    select_classes(config.class_name, networks.classes)  # before the files are made, which takes minutes
    print(f"{'EMA ' * networks.is_ema}generator, step {saved.step}")
    metadata = describe(config, saved, networks, given)
    if with_maps and not config.has_attention:
        raise UserError("--maps true: this generator has no attention layers")
    if "weights" in formats and networks.D is None:
        raise UserError("--format weights needs a checkpoint with a discriminator")
    folder = Path(os.path.expanduser(export_path)) / config.version / str(saved.step)
    found = [name for name in (*NETWORK_FILES, "model_card.md", "samples.png") if (folder / name).exists()]
    if found and not config.overwrite:
        raise UserError(f"{folder} already has {', '.join(found)}: move them, or replace them with --overwrite true")
    check_writable(folder)
    metrics = read_metrics(config.test_folder(saved.step) / "metrics.json", metadata, saved)
    contents = network_files(networks, metadata, formats, with_maps)
    maps = [name for name, _ in networks.G.named_children() if name.startswith("attn")] if with_maps else []
    num_images = saved.state["data"].get("training_images") if saved.state else None
    digests = {name: hashlib.sha256(contents[name]).hexdigest() for name in FILES["weights"] if name in contents}
    card = model_card(as_text(config.version), metadata, num_images, metrics, formats, maps, digests)
    samples_grid(networks.G, config, networks.classes).save(png := io.BytesIO(), "png")
    write_files(folder, contents | {"model_card.md": card.encode("utf-8"), "samples.png": png.getvalue()})
    if saved.state and metrics is None:
        is_named = config.pretrained_file or config.pretrained_model == "best"
        wanted = config.pretrained_model if is_named else str(saved.step)
        command = config.command_line(pretrained_model=wanted, metrics="fid,kid,isc,prc")
        print(f"The card has no metrics: compute them by {command}, then export with --overwrite true")
    return 0


def network_files(
    networks: TestNetworks, metadata: Mapping[str, str], formats: Collection[str], with_maps: bool
) -> dict[str, bytes]:
    """Return the contents of the networks' files by name."""
    contents = {}
    if "weights" in formats:
        for name, network in zip(FILES["weights"], (networks.G, networks.D), strict=True):
            contents[name] = weights_bytes(network.state_dict(), metadata)
    G = fold_spectral_norm(copy.deepcopy(networks.G))
    if "safetensors" in formats:
        contents["generator.safetensors"] = safetensors_bytes(G.state_dict(), metadata)
    if "onnx" in formats:
        contents["generator.onnx"] = onnx_bytes(G, metadata, with_maps)
    return contents


def weights_bytes(weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return the content of the file of G or D to train from; `metadata` is that of G for both.

    Kernels and matrices are in float16. Vectors stay as they are: u and v of spectral norm must have length 1, and
    variances of BatchNorm may be too small for it.
    """
    weights = {key: value.half() if value.dim() > 1 else value for key, value in weights.items()}
    return safetensors_bytes(weights, {**metadata, "spectral_norm": "not folded", "precision": "float16"})


def safetensors_bytes(weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return the content of a file of weights, which are on the CPU; reading one runs no code, unlike pickle."""
    # "format" is what Hugging Face's loaders ask for: the library whose tensors these are.
    return save({key: tensor.contiguous() for key, tensor in weights.items()}, {"format": "pt", **metadata})


def write_files(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write all files or none and print their sizes. Other networks of an earlier export are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically({folder / name: content for name, content in contents.items()})
    print(f"results in {folder}:")
    for name, content in contents.items():
        print(f"  {name:<23}{math.ceil(len(content) / 1024):>9,} KiB")
    for name in NETWORK_FILES:
        if name not in contents:
            (folder / name).unlink(missing_ok=True)
