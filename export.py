"""Export a trained generator: files that need neither this program nor a checkpoint.

python export.py --pretrained_model latest                         # of --version sagan_celeb, to ./exports
python export.py --pretrained_model 20000 --version cats --format onnx --maps true

Writes <export_path>/<version>/<step>/:
  generator.safetensors   weights, spectral norm folded in, and what it takes to build the network again
  generator.onnx          z, and labels of a conditional generator, to images, in standard ONNX operators
  model_card.md           what it is, data and license, metrics, how to load it, as model hubs read it
  samples.png             the grid of --train false

All options of main.py may be given too (python main.py --help) and mean what they mean with --train false, such as
--version, --model_save_path, --use_ema, --num_samples, --truncation, --class_name and --seed. --overwrite true
replaces an earlier export of the same step.
"""

import argparse
import copy
import importlib
import io
import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # which PYTHONSAFEPATH and python -I leave out

from errors import UserError, exit_code, make_output_robust
from parameter import EXPORT_PATH, Config, Parser, boolean, comma_list, get_parameters, given_options, subset_of

if TYPE_CHECKING:
    from exporting.description import Description
    from tester import Tester
    from training.checkpoint import Checkpoint

PACKAGES = {"safetensors": ("safetensors",), "onnx": ("onnx", "onnxscript", "onnxruntime")}
FORMATS = subset_of(*PACKAGES)
FILES = ("generator.safetensors", "generator.onnx", "model_card.md", "samples.png")


def main() -> int:
    """Run the command line. Returns the exit code."""
    make_output_robust()
    try:
        own, arguments = parse(sys.argv[1:])
        return export(own, get_parameters(arguments), given_options(arguments))
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
    parser.add_argument(
        "--format", type=comma_list, default="safetensors,onnx", metavar="", help=f"{FORMATS.description}; default both"
    )
    parser.add_argument(
        "--maps", type=boolean, default=False, metavar="", help="attention maps as outputs of ONNX; default false"
    )
    parser.add_argument(
        "--export_path", default=EXPORT_PATH, metavar="", help=f"folder for exports; default {EXPORT_PATH}"
    )
    own, arguments = parser.parse_known_args(argv)
    if not FORMATS.check(own.format):
        raise UserError(f"--format must be {FORMATS.description}, not {own.format}")
    own.format = own.format.split(",")
    if own.maps and "onnx" not in own.format:
        raise UserError("--maps true is for --format onnx")
    for package in (package for name in own.format for package in PACKAGES[name]):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise UserError(
                f"--format {','.join(own.format)} needs {package}: pip install -r requirements-export.txt ({error})"
            ) from error
    return own, [*arguments, "--train=false"]


def export(own: argparse.Namespace, config: Config, given: set[str]) -> int:
    """Write the files and print where they are. Returns the exit code, 0.

    Raises:
        UserError: the checkpoint cannot be loaded, or its export is there already.
    """
    import torch

    from exporting.model_card import model_card
    from exporting.onnx_file import onnx_bytes
    from exporting.safetensors_file import safetensors_bytes
    from spectral import fold_spectral_norm
    from tester import Tester
    from training.resuming import load_test_checkpoint
    from utils import check_writable, eval_mode

    if config.metrics:
        raise UserError("--metrics: export.py computes none; the model card has those of main.py --train false")
    saved, config = load_test_checkpoint(config, given)
    folder = Path(os.path.expanduser(own.export_path)) / config.version / str(saved.step)
    if not config.overwrite and (found := [name for name in FILES if (folder / name).exists()]):
        raise UserError(f"{folder} already has {', '.join(found)}: move them, or replace them with --overwrite true")
    check_writable(folder)
    tester = Tester(config, None, saved)
    description = describe(tester, saved, given)
    metadata = description.metadata()
    G = fold_spectral_norm(copy.deepcopy(tester.G).to("cpu", memory_format=torch.contiguous_format)).eval()
    maps = [name for name, _ in G.named_children() if name.startswith("attn")] if own.maps else []
    contents = {}
    if "safetensors" in own.format:
        contents["generator.safetensors"] = safetensors_bytes(G, metadata)
    if "onnx" in own.format:
        contents["generator.onnx"] = onnx_bytes(G, config.z_dim, len(tester.classes), own.maps, metadata)
    metrics = read_metrics(tester.folder / "metrics.json", description)
    contents["model_card.md"] = model_card(config.version, description, own.format, maps, metrics).encode()
    with eval_mode(tester.G):
        tester.grid().save(png := io.BytesIO(), "png")
    contents["samples.png"] = png.getvalue()
    write_files(folder, contents)
    print(f"{'EMA ' * tester.uses_ema}generator, step {saved.step}, in {folder}:")
    for name, content in contents.items():
        print(f"  {name:<23}{math.ceil(len(content) / 1024):>9,} KiB")
    return 0


def describe(tester: "Tester", saved: "Checkpoint", given: set[str]) -> "Description":
    """Return what the generator is. Its data and batch size are the checkpoint's, or those on the command line."""
    from data_loader import held_out_count
    from exporting.description import Description

    config = tester.config
    trained = saved.state["config"] if saved.state else {name: getattr(config, name) for name in given}
    data = saved.state.get("data") if saved.state else None
    return Description(
        model=config.model,
        image_size=config.imsize,
        z_dim=config.z_dim,
        conv_dim=config.g_conv_dim,
        has_attention=config.attention == "full",
        classes=tester.classes,
        step=tester.step,
        is_ema=tester.uses_ema,
        dataset=trained.get("dataset"),
        num_images=data["images"] - held_out_count(data["images"], trained.get("holdout", 0)) if data else None,
        batch_size=trained.get("batch_size"),
    )


def read_metrics(path: Path, description: "Description") -> dict[str, Any] | None:
    """Return what `main.py --train false --metrics` wrote for this generator; None if there is nothing."""
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # not computed, or cut off
        return None
    dataset = description.dataset or metrics.get("dataset")  # weights alone do not tell theirs
    found = metrics["step"], metrics["ema"], metrics.get("dataset", dataset)
    return metrics if found == (description.step, description.is_ema, dataset) else None


def write_files(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write files under temporary names, then rename them, so that none is ever incomplete.

    Those of `FILES` that are not among them are removed: they are of another export.
    """
    folder.mkdir(parents=True, exist_ok=True)
    temporary = {name: folder / f"{name}.tmp" for name in contents}
    try:
        for name, content in contents.items():
            temporary[name].write_bytes(content)
        for name in FILES:
            if name in contents:
                os.replace(temporary[name], folder / name)
            else:
                (folder / name).unlink(missing_ok=True)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
