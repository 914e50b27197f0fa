import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import generator_inputs, random_generator
from torch import nn

from spectral import SUFFIXES, SpectralNorm, fold_spectral_norm
from training.models import MODELS


@pytest.mark.parametrize("layer, shape", [
    (nn.Conv2d(6, 10, 3), (2, 6, 8, 8)), (nn.ConvTranspose2d(6, 10, 4, 2, 1), (2, 6, 8, 8)), (nn.Linear(7, 5), (2, 7)),
])  # fmt: skip
def test_sigma_converges_to_the_largest_singular_value(layer, shape):
    """And keys are the reference's, u and v buffers."""
    torch.manual_seed(0)
    layer = SpectralNorm(layer)
    matrix = layer.module.weight_bar.detach().flatten(1)
    for _ in range(200):
        layer(torch.randn(shape))
    assert layer.sigma().item() == pytest.approx(torch.linalg.svdvals(matrix)[0].item(), rel=1e-4)
    assert {*layer.state_dict()} == {"module.weight_bar", "module.weight_u", "module.weight_v", "module.bias"}
    assert {name for name, _ in layer.named_parameters()} == {"module.weight_bar", "module.bias"}


@pytest.mark.parametrize("iterations", [1, 3])
def test_each_forward_is_algorithm_1_of_the_paper_with_exact_gradients(iterations):
    """Of two forwards before one backward: in the reference, the first one's gradient uses the second one's vectors."""
    torch.manual_seed(1)
    layer = SpectralNorm(nn.Linear(7, 5), power_iterations=iterations)
    weight, u = layer.module.weight_bar.detach().clone().requires_grad_(), layer.module.weight_u.clone()
    outputs, expected = [], []
    for x in torch.randn(2, 3, 7):
        with torch.no_grad():
            for _ in range(iterations):
                v = F.normalize(weight.t() @ u, dim=0, eps=1e-12)
                u = F.normalize(weight @ v, dim=0, eps=1e-12)
        expected.append(x @ (weight / (u @ weight @ v)).t() + layer.module.bias)
        outputs.append(layer(x))
        torch.testing.assert_close((layer.module.weight_u, layer.module.weight_v), (u, v))
    torch.testing.assert_close(outputs, expected)
    for out, parameter in ((outputs, layer.module.weight_bar), (expected, weight)):
        torch.cat(out).square().sum().backward(inputs=parameter)
    torch.testing.assert_close(layer.module.weight_bar.grad, weight.grad)


def test_a_zero_weight_gives_no_nan_and_no_iterations_are_refused():
    layer = SpectralNorm(nn.Linear(7, 5))
    nn.init.zeros_(layer.module.weight_bar)
    layer(torch.randn(3, 7))
    assert torch.isfinite(layer.module.weight_u).all()
    with pytest.raises(ValueError, match="power_iterations"):
        SpectralNorm(nn.Linear(2, 2), power_iterations=0)


@pytest.mark.parametrize("model, imsize, num_classes", [("sagan", 32, 0), ("paper", 64, 0), ("paper", 64, 3)])
def test_networks_with_folded_weights_equal_those_in_evaluation(model, imsize, num_classes):
    """All outputs, of every kind of layer that is normalized: convolutions, linear layers and D's embedding."""
    G = random_generator(model, imsize, num_classes)
    D = MODELS[model].Discriminator(imsize, 8, num_classes=num_classes)
    z, *labels = generator_inputs(5, num_classes)
    for network, x in ((G, z), (D, torch.rand(5, 3, imsize, imsize))):
        network(x, *labels)  # D in training mode: one power iteration
        folded = fold_spectral_norm(copy.deepcopy(network.eval()))
        assert not any(key.endswith(SUFFIXES) for key in folded.state_dict())
        with torch.no_grad():
            pairs = zip(*(net(x, *labels, return_attention=True) for net in (network, folded)), strict=True)
        for expected, actual in pairs:
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
