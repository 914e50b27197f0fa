"""generator.onnx: the generator as a graph of standard ONNX operators, which any runtime can run.

    session = onnxruntime.InferenceSession("generator.onnx")
    (images,) = session.run(["images"], {"z": z})       # z (B, z_dim) float32 -> (B, 3, S, S) in [-1, 1]

onnx, onnxscript and onnxruntime are optional dependencies, imported when they are used.
"""

import copy
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from errors import UserError
from networks.paper_models import UpsampledConv2d
from spectral import replace_layers

OPSET, IR_VERSION = 18, 8  # the least version of the file format that has these operators


class _Images(nn.Module):
    """A generator with or without its maps as outputs; G's own path without maps, of CPUs, cannot be exported."""

    def __init__(self, G: nn.Module, with_maps: bool):
        super().__init__()
        self.G, self.with_maps = G, with_maps

    def forward(self, z: Tensor, labels: Tensor | None = None) -> tuple[Tensor, ...]:
        images, *maps = self.G(z, labels, return_attention=True)
        return (images, *maps) if self.with_maps else (images,)


def onnx_bytes(G: nn.Module, metadata: Mapping[str, str], with_maps: bool) -> bytes:
    """Return the content of the file.

    Inputs are z (B, z_dim) float32 and, of a conditional generator, labels (B,) int64; outputs are images and, with
    maps, attn1 (B, queries, keys), ..., which it lists under "maps" in its metadata.

    Args:
        G: with spectral norm folded, on the CPU in evaluation mode.

    Raises:
        UserError: the weights are too large for one file, or the file computes something else than G.
    """
    import onnx

    # Its kernel is computed from its weight, which torch.onnx exports wrongly; and some runtimes want constant kernels.
    G = replace_layers(copy.deepcopy(G), UpsampledConv2d, UpsampledConv2d.as_conv_transpose)
    network = _Images(G, with_maps).eval()
    inputs = {"z": torch.randn(2, int(metadata["z_dim"]))}
    if num_classes := int(metadata["num_classes"]):
        inputs["labels"] = torch.tensor([0, num_classes - 1])
    with torch.no_grad():
        outputs = network(**inputs)
    maps = [f"attn{number}" for number in range(1, len(outputs))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that two axes have the same name
        program = torch.onnx.export(
            network,
            (*inputs.values(),),
            dynamo=True,
            opset_version=OPSET,
            input_names=[*inputs],
            output_names=["images", *maps],
            dynamic_shapes={name: {0: "batch"} for name in inputs},
            verbose=False,
        )
    model = program.model_proto
    for part in (*model.graph.node, *model.graph.value_info, *model.graph.input, *model.graph.output, model.graph):
        del part.metadata_props[:]  # source lines with their paths on this machine
    model.ir_version = IR_VERSION
    onnx.helper.set_model_props(model, {**metadata, "maps": " ".join(maps)})
    content = model.SerializeToString()
    _check(content, inputs, outputs)
    return content


def _check(content: bytes, inputs: Mapping[str, Tensor], outputs: Sequence[Tensor]) -> None:
    """Raise `UserError` if the file computes something else: torch.onnx has exported wrong graphs without a word."""
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    found = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    for ours, theirs in zip(outputs, found, strict=True):
        # Means: an untrained network may turn a rounding error into another color of a pixel.
        if not (torch.from_numpy(theirs) - ours).abs().mean() <= 1e-3 * ours.abs().mean():
            raise UserError(
                "onnxruntime does not return the images and maps of the network: use other versions of torch, "
                "onnxscript and onnxruntime, or --format safetensors"
            )
