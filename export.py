"""Export a trained generator: files that need neither this program nor a checkpoint, or weights to train from.

python export.py --pretrained_model latest                         # of --version sagan_celeb, to ./exports
python export.py --pretrained_model 20000 --version cats --format onnx --maps true

Writes <export_path>/<version>/<step>/:
  generator.safetensors   weights, spectral norm folded in, and what it takes to build the network again
  generator.onnx          z, and labels of a conditional generator, to images, in standard ONNX operators
  G.safetensors, D.safetensors   of --format weights: generator and discriminator, to train from
  model_card.md           what it is, data and license, metrics, how to load it, as model hubs read it
  samples.png             the grid of --train false

Options of main.py (python main.py --help), but for --metrics and --project, mean what they mean with --train false,
such as --version, --model_save_path, --use_ema, --num_samples, --class_name and --seed. --overwrite true replaces
an earlier export, with all its formats.
"""

import argparse
import os
import signal
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # which PYTHONSAFEPATH and python -I leave out

from errors import UserError, exit_code, handle_signals, import_optional, make_output_robust
from parameter import EXPORT_PATH, Parser, boolean, comma_list, get_parameters, given_options, subset_of

FORMATS = subset_of("safetensors", "onnx", "weights")
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def main() -> int:
    """Run the command line. Returns the exit code."""
    make_output_robust()
    interrupts = []

    def interrupt(number: int, _: object) -> None:
        interrupts.append(number)
        raise KeyboardInterrupt

    with handle_signals(interrupt, [signal.SIGINT]):
        try:
            own, arguments = parse(sys.argv[1:])
            config, given = get_parameters(arguments, "export.py"), given_options(arguments)
            from exporting.files import export  # not above: it imports torch, which takes seconds

            return export(config, given, own.export_path, own.format, own.maps)
        except (Exception, KeyboardInterrupt) as error:
            return exit_code(KeyboardInterrupt() if interrupts else error)  # torch.onnx turns it into other errors


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the options format, maps and export_path, and the arguments for main.py's parser.

    Raises:
        UserError: a value is not allowed, or a package is missing.
    """
    parser = Parser("export.py", __doc__)
    add = partial(parser.add_argument, metavar="")
    add("--format", type=comma_list, default="safetensors,onnx", help=f"{FORMATS.description}; default the first two")
    add("--maps", type=boolean, default=False, help="attention maps as outputs of ONNX; default false")
    add("--export_path", default=EXPORT_PATH, help=f"folder for exports; default {EXPORT_PATH}")
    own, arguments = parser.parse_known_args(argv)
    if not FORMATS.check(own.format):
        raise UserError(f"--format must be {FORMATS.description}, not {own.format}")
    own.format = own.format.split(",")
    if own.maps and "onnx" not in own.format:
        raise UserError("--maps true is for --format onnx")
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # onnxruntime would report to Microsoft
    for package in ONNX_PACKAGES if "onnx" in own.format else ():
        import_optional(package, f"--format onnx needs {package}: pip install -r requirements-export.txt")
    return own, [*arguments, "--train=false"]


if __name__ == "__main__":
    sys.exit(main())
