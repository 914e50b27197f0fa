import copy

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import export_metadata, generator_inputs, random_generator

from errors import UserError
from exporting import onnx_file
from spectral import fold_spectral_norm


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("network", [("sagan", 32), ("sagan", 64, 0, "none"), ("paper", 32), ("paper", 64, 3)])
def test_onnxruntime_equals_the_network_in_evaluation(network, capfd):
    """For any batch, with and without classes and attention; and nothing is printed."""
    G = random_generator(*network)
    content = onnx_file.onnx_bytes(fold_spectral_norm(copy.deepcopy(G)), export_metadata(*network), True)
    assert capfd.readouterr() == ("", "")
    session = onnxruntime.InferenceSession(content)
    layers = [name for name, _ in G.named_children() if name.startswith("attn")]
    assert [output.name for output in session.get_outputs()] == ["images", *layers]
    assert session.get_modelmeta().custom_metadata_map == export_metadata(*network, maps=" ".join(layers))
    for count in (1, 5):
        inputs = dict(zip(("z", "labels"), generator_inputs(count, *network[2:3]), strict=False))
        with torch.no_grad():
            expected = G(*inputs.values(), return_attention=True)
        found = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
        for ours, theirs in zip(expected, found, strict=True):
            np.testing.assert_allclose(theirs, ours.numpy(), rtol=0, atol=1e-4)
    # Standard operators only, no functions, no other files: nothing that a runtime could be made to run or open.
    model = onnx.load_from_string(content)
    onnx.checker.check_model(model, full_check=True)
    assert model.ir_version == onnx.helper.find_min_ir_version_for(model.opset_import) == 8  # older runtimes load it
    assert [entry.domain for entry in model.opset_import] == [""] and not model.functions
    assert not any(tensor.external_data for tensor in model.graph.initializer)
    for node in model.graph.node:
        assert node.domain == "" and not any(attribute.HasField("g") for attribute in node.attribute)
    assert str(onnx_file.__file__.rpartition("exporting")[0]).encode() not in content  # no source lines of this machine


@pytest.mark.slow
def test_a_graph_that_torch_exports_wrongly_is_no_file():
    """torch.onnx ignores this argument."""

    class Wrong(torch.nn.Module):
        def forward(self, z, labels, return_attention):
            return (torch.nn.functional.avg_pool2d(z[:, None, None], (1, 2), divisor_override=1),)

    with pytest.raises(UserError, match="onnxruntime does not return the images"):
        onnx_file.onnx_bytes(Wrong(), export_metadata(), False)
