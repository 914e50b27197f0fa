"""Export a trained generator: files that need neither this program nor a checkpoint.

python export.py --pretrained_model latest                         # of --version sagan_celeb, to ./exports
python export.py --pretrained_model 20000 --version cats --format onnx --maps true

Writes <export_path>/<version>/<step>/:
  generator.safetensors   weights, spectral norm folded in, and what it takes to build the network again
  generator.onnx          z, and labels of a conditional generator, to images, in standard ONNX operators
  model_card.md           what it is, data and license, metrics, how to load it, as model hubs read it
  samples.png             the grid of --train false

All options of main.py may be given too (python main.py --help) and mean what they mean with --train false, such as
--version, --model_save_path, --use_ema, --num_samples, --truncation, --class_name and --seed. A format that is missing
in an earlier export of the same generator is added to it; --overwrite true replaces an earlier export.
"""

import argparse
import copy
import importlib
import io
import json
import math
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # which PYTHONSAFEPATH and python -I leave out

from errors import UserError, exit_code, make_output_robust, warn
from parameter import EXPORT_PATH, Config, Parser, boolean, comma_list, get_parameters, given_options, subset_of

if TYPE_CHECKING:
    from torch import nn

    from exporting.description import Description
    from training.checkpoint import Checkpoint
    from training.resuming import TestNetworks

PACKAGES = {"safetensors": ("safetensors",), "onnx": ("onnx", "onnxscript", "onnxruntime")}
FORMATS = subset_of(*PACKAGES)
FILES = ("generator.safetensors", "generator.onnx", "model_card.md", "samples.png")


def main() -> int:
    """Run the command line. Returns the exit code."""
    make_output_robust()
    try:
        own, arguments = parse(sys.argv[1:])
        return export(own, get_parameters(arguments, "export.py"), given_options(arguments))
    except (Exception, KeyboardInterrupt) as error:
        return exit_code(error)


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the options format, maps and export_path, and the arguments for main.py's parser.

    Raises:
        UserError: a value is not allowed, or a package is missing.
    """
    parser = Parser(
        usage="python export.py [--option value] ...",
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = partial(parser.add_argument, metavar="")
    add("--format", type=comma_list, default="safetensors,onnx", help=f"{FORMATS.description}; default both")
    add("--maps", type=boolean, default=False, help="attention maps as outputs of ONNX; default false")
    add("--export_path", default=EXPORT_PATH, help=f"folder for exports; default {EXPORT_PATH}")
    own, arguments = parser.parse_known_args(argv)
    if not FORMATS.check(own.format):
        raise UserError(f"--format must be {FORMATS.description}, not {own.format}")
    own.format = own.format.split(",")
    if own.maps and "onnx" not in own.format:
        raise UserError("--maps true is for --format onnx")
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # onnxruntime would report to Microsoft
    for package in (package for name in own.format for package in PACKAGES[name]):
        try:
            importlib.import_module(package)
        except Exception as error:  # such as protobuf's TypeError where its version does not fit
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise UserError(
                f"--format {','.join(own.format)} needs {package}: pip install -r requirements-export.txt ({reason})"
            ) from error
    return own, [*arguments, "--train=false"]


def export(own: argparse.Namespace, config: Config, given: set[str]) -> int:
    """Write the files and print where they are. Returns the exit code, 0.

    Raises:
        UserError: the checkpoint cannot be loaded, or another export of this step is there already.
    """
    from datasets.labels import as_text
    from exporting.model_card import metrics_command, model_card
    from tester import samples_grid
    from training.resuming import load_test_checkpoint, load_test_networks
    from utils import check_writable, write_atomically

    if config.metrics:
        raise UserError("--metrics: export.py computes none; the model card has those of main.py --train false")
    saved, config = load_test_checkpoint(config, given)
    folder = Path(os.path.expanduser(own.export_path)) / config.version / str(saved.step)
    networks = load_test_networks(saved, config)
    description = describe(networks, config, saved, given)
    if own.maps and not description.has_attention:
        raise UserError("--maps true: this generator has no attention layers")
    others = read_other_formats(folder, own.format, description.metadata())
    other_maps = others.get("onnx", {}).get("maps", "").split()
    command = metrics_command(config, saved.step, networks.is_ema) if saved.state else ""
    metrics = read_metrics(config, description, saved, command)
    card = partial(model_card, as_text(config.version), description)
    if not config.overwrite:  # metrics may have been computed since
        cards = [card(scores, command, others, other_maps) for scores in (metrics, None)] if others else []
        check_folder(folder, own.format, cards)
    check_writable(folder)
    contents = generator_files(own, networks.G, description)
    maps = [name for name, _ in networks.G.named_children() if name.startswith("attn")] if own.maps else other_maps
    contents["model_card.md"] = card(metrics, command, {*own.format, *others}, maps).encode("utf-8", "replace")
    if config.overwrite or not (folder / "samples.png").exists():
        samples_grid(networks.G, config, networks.classes).save(png := io.BytesIO(), "png")
        contents["samples.png"] = png.getvalue()
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically({folder / name: content for name, content in contents.items()})
    for path in (folder / f"generator.{name}" for name in {*PACKAGES} - {*own.format, *others}):
        if path.exists():
            path.unlink()
            print(f"removed {path}: it was not of this generator, or not readable")
    print(f"{'EMA ' * networks.is_ema}generator, step {saved.step}, in {folder}:")
    for name, content in contents.items():
        print(f"  {name:<23}{math.ceil(len(content) / 1024):>9,} KiB")
    return 0


def read_other_formats(folder: Path, formats: Collection[str], metadata: Mapping[str, str]) -> dict[str, dict]:
    """Return the metadata of this generator's files in other formats that the folder has, by format."""
    from exporting import onnx_file, safetensors_file

    found = {}
    for name, module in (("safetensors", safetensors_file), ("onnx", onnx_file)):
        with suppress(Exception):  # it is missing or damaged, or its library is missing
            entries = module.read_metadata(folder / f"generator.{name}")
            if name not in formats and metadata.items() <= entries.items():
                found[name] = entries
    return found


def check_folder(folder: Path, formats: Sequence[str], cards: Sequence[str]) -> None:
    """Raise `UserError` if an export would replace a file, other than one of the cards of the other formats there."""
    found = [name for name in FILES if (folder / name).exists()]
    path, lacking = folder / "model_card.md", [name for name in formats if f"generator.{name}" not in found]
    is_edited = bool(cards) and path.exists() and path.read_text("utf-8", "replace") not in cards
    if found and (not cards or is_edited or lacking != formats):
        reason = " (model_card.md was changed)" if is_edited and lacking == formats else ""
        way = f"; --format {lacking[0]} adds to an export of this generator" if 0 < len(lacking) < len(formats) else ""
        raise UserError(
            f"{folder} already has {', '.join(found)}{reason}: move them, or replace them with --overwrite true{way}"
        )


def generator_files(own: argparse.Namespace, G: "nn.Module", description: "Description") -> dict[str, bytes]:
    """Return the contents of the generator's files by name."""
    from exporting.onnx_file import onnx_bytes
    from exporting.safetensors_file import safetensors_bytes
    from spectral import fold_spectral_norm

    G, metadata, contents = fold_spectral_norm(copy.deepcopy(G)), description.metadata(), {}
    if "safetensors" in own.format:
        contents["generator.safetensors"] = safetensors_bytes(G, metadata)
    if "onnx" in own.format:
        contents["generator.onnx"] = onnx_bytes(G, description.z_dim, len(description.classes), own.maps, metadata)
    return contents


def describe(networks: "TestNetworks", config: Config, saved: "Checkpoint", given: set[str]) -> "Description":
    """Return what the generator is. Its data and batch size are the checkpoint's, or those on the command line."""
    from exporting.description import Description
    from training.models import checksum

    trained = saved.state["config"] if saved.state else {name: getattr(config, name) for name in given}
    if saved.metadata:
        trained = {"dataset": saved.metadata["dataset"] or None, **trained}
    data = saved.state.get("data") if saved.state else None
    # Checkpoints of older versions do not have the number of those that were not held out.
    num_images = data.get("training_images", None if trained.get("holdout") else data["images"]) if data else None
    return Description(
        model=config.model, image_size=config.imsize, z_dim=config.z_dim, conv_dim=config.g_conv_dim,
        has_attention=config.has_attention, classes=networks.classes, step=saved.step, is_ema=networks.is_ema,
        dataset=trained.get("dataset"), num_images=num_images, batch_size=trained.get("batch_size"),
        checksum=int(saved.metadata["checksum"]) if saved.metadata else checksum(networks.G.state_dict()),
    )  # fmt: skip


def read_metrics(
    config: Config, description: "Description", saved: "Checkpoint", command: str
) -> dict[str, Any] | None:
    """Return what `main.py --train false --metrics` wrote for this generator and its training images.

    None if there is nothing; with a warning if it is of something else.
    """
    path, data = config.test_folder(saved.step) / "metrics.json", (saved.state or {}).get("data") or {}
    if not path.exists():  # not computed
        return None
    if not data:
        warn(f"{path} is not used: only a {{step}}_state.pth tells which images its generator was trained on")
        return None
    reason = "is damaged or of an older version"
    with suppress(ValueError, KeyError, TypeError):
        metrics = json.loads(path.read_text(encoding="utf-8"))
        if metrics["checksum"] != description.checksum:
            reason = "is of other weights"
        elif metrics["data"]["checksum"] != data.get("checksum"):
            reason = "is of other images than those that the checkpoint names"
        elif metrics["images"]:
            return metrics
    warn(f"{path} {reason}, so the model card has no metrics: compute them by {command}")
    return None


if __name__ == "__main__":
    sys.exit(main())
