"""Write the files of an export. None is ever replaced unasked; a format that an earlier export lacks is added to it."""

import copy
import hashlib
import io
import math
import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from datasets.labels import as_text
from errors import UserError, import_optional
from exporting.model_card import describe, model_card, read_metrics
from exporting.onnx_file import onnx_bytes, read_onnx_metadata
from parameter import Config
from spectral import fold_spectral_norm
from training.checkpoint import read_export
from training.previews import samples_grid, select_classes
from training.resuming import TestNetworks, load_test_checkpoint, load_test_networks
from utils import check_writable, write_atomically

FILES = {"safetensors": ["generator.safetensors"], "onnx": ["generator.onnx"],
         "weights": ["G.safetensors", "D.safetensors"]}  # fmt: skip


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
    others = read_other_formats(folder, formats, metadata)
    metrics = read_metrics(config.test_folder(saved.step) / "metrics.json", metadata, saved)
    if not config.overwrite:
        check_folder(folder, others)
    check_writable(folder)
    contents = network_files(networks, metadata, formats, with_maps)
    available = {*formats, *others}
    maps = others.get("onnx", {}).get("maps", "").split()
    if with_maps:
        maps = [name for name, _ in networks.G.named_children() if name.startswith("attn")]
    num_images = saved.state["data"].get("training_images") if saved.state else None
    digests = {  # of weights to train from: those that are written now, and those that stay
        name: hashlib.sha256(contents[name] if name in contents else (folder / name).read_bytes()).hexdigest()
        for name in (FILES["weights"] if "weights" in available else ())
    }
    card = model_card(as_text(config.version), metadata, num_images, metrics, available, maps, digests)
    if config.overwrite or not (folder / "model_card.md").exists():
        contents["model_card.md"] = card.encode("utf-8")
    if config.overwrite or not (folder / "samples.png").exists():
        samples_grid(networks.G, config, networks.classes).save(png := io.BytesIO(), "png")
        contents["samples.png"] = png.getvalue()
    write_files(folder, contents, keep=[file for name in others for file in FILES[name]])
    if "model_card.md" not in contents:
        print("model_card.md is left as it was, without this format: --overwrite true writes it anew")
    elif saved.state and metrics is None:
        is_named = config.pretrained_file or config.pretrained_model == "best"
        wanted = config.pretrained_model if is_named else str(saved.step)
        command = config.command_line(pretrained_model=wanted, metrics="fid,kid,isc,prc")
        print(f"The card has no metrics: compute them by {command}, then export with --overwrite true")
    return 0


def read_other_formats(folder: Path, formats: Collection[str], metadata: Mapping[str, str]) -> dict[str, dict]:
    """Return the metadata of this generator's files in other formats that the folder has, by format.

    Raises:
        UserError: there is an ONNX file, and no library to read it.
    """
    found = {}
    for name in FILES.keys() - formats:
        paths = [folder / file for file in FILES[name]]
        if name == "onnx" and paths[0].exists():
            import_optional("onnx", f"{paths[0]} cannot be read: pip install -r requirements-export.txt, or move it")
        with suppress(Exception):  # it is missing or damaged
            entries = [read_onnx_metadata(path) if name == "onnx" else read_export(path)[1] for path in paths]
            if all(metadata.items() <= of_file.items() for of_file in entries):
                found[name] = entries[0]
    return found


def check_folder(folder: Path, others: Collection[str]) -> None:
    """Raise `UserError` if there are files already, other than those of other formats of this generator."""
    found = [name for name in (*chain(*FILES.values()), "model_card.md", "samples.png") if (folder / name).exists()]
    expected = {"model_card.md", "samples.png"}.union(*(FILES[name] for name in others)) if others else set()
    if not expected.issuperset(found):
        raise UserError(f"{folder} already has {', '.join(found)}: move them, or replace them with --overwrite true")


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


def write_files(folder: Path, contents: Mapping[str, bytes], keep: Collection[str]) -> None:
    """Write all files or none and print their sizes. Networks that are neither among them nor kept are removed.

    Without `--overwrite true` there are none of these, see `check_folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically({folder / name: content for name, content in contents.items()})
    print(f"results in {folder}:")
    for name, content in contents.items():
        print(f"  {name:<23}{math.ceil(len(content) / 1024):>9,} KiB")
    for path in (folder / name for name in {*chain(*FILES.values())} - {*contents, *keep}):
        if path.exists():
            path.unlink()
            print(f"removed {path}: it was not of this generator, or not readable")
