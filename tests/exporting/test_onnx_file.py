import copy

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import export_metadata, generator_inputs, random_generator

from errors import UserError
from exporting import onnx_file
from exporting.onnx_file import onnx_bytes
from spectral import fold_spectral_norm


def export(G, *network):
    return onnx_bytes(fold_spectral_norm(copy.deepcopy(G)), export_metadata(*network), True)


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("network", [("sagan", 32), ("sagan", 64, 0, "none"), ("paper", 32), ("paper", 64, 3)])
def test_onnxruntime_equals_the_network_in_evaluation(network, capfd):
    """For any batch, with and without classes and attention; and nothing is printed."""
    G = random_generator(*network)
    content = export(G, *network)
    assert capfd.readouterr() == ("", "")
    session = onnxruntime.InferenceSession(content)
    layers = [name for name, _ in G.named_children() if name.startswith("attn")]
    assert [output.name for output in session.get_outputs()] == ["images", *layers]
    for count in (1, 5):
        inputs = generator_inputs(count, *network[2:3])
        with torch.no_grad():
            expected = G(*inputs, return_attention=True)
        names = [tensor.name for tensor in session.get_inputs()]
        assert names == ["z", "labels"][: len(inputs)]
        found = session.run(None, {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)})
        for ours, theirs in zip(expected, found, strict=True):
            np.testing.assert_allclose(theirs, ours.numpy(), rtol=0, atol=1e-4)
    assert_harmless(onnx.load_from_string(content))
    assert str(onnx_file.__file__.rpartition("exporting")[0]).encode() not in content  # no source lines of this machine
    assert session.get_modelmeta().custom_metadata_map == export_metadata(*network, maps=" ".join(layers))


def assert_harmless(model):
    """Standard operators only, no functions, no other files: nothing that a runtime could be made to run or open."""
    onnx.checker.check_model(model, full_check=True)
    assert model.ir_version == onnx.helper.find_min_ir_version_for(model.opset_import) == 8  # older runtimes load it
    assert [entry.domain for entry in model.opset_import] == [""] and not model.functions
    assert all(node.domain == "" for node in model.graph.node)
    assert not any(tensor.external_data for tensor in model.graph.initializer)
    assert not any(attribute.HasField("g") for node in model.graph.node for attribute in node.attribute)


@pytest.mark.slow
def test_a_graph_that_torch_exports_wrongly_is_no_file():
    """torch.onnx ignores this argument."""

    class Wrong(torch.nn.Module):
        def forward(self, z, labels, return_attention):
            return (torch.nn.functional.avg_pool2d(z[:, None, None], (1, 2), divisor_override=1),)

    with pytest.raises(UserError, match="onnxruntime does not return the images"):
        onnx_bytes(Wrong(), export_metadata(), False)


def test_weights_too_large_for_a_file(monkeypatch):
    monkeypatch.setattr(onnx_file, "MAX_BYTES", 1000)
    with pytest.raises(UserError, match="--format safetensors"):
        export(random_generator("sagan", 32), "sagan", 32)
