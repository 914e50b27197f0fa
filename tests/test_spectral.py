import copy

import pytest
import torch
from conftest import generator_inputs, random_generator
from torch import nn

from spectral import SpectralNorm, fold_spectral_norm
from training.models import MODELS, network_options

LAYERS = [lambda: nn.Conv2d(6, 10, 3), lambda: nn.ConvTranspose2d(6, 10, 4, 2, 1), lambda: nn.Linear(7, 5)]


def inputs_for(layer):
    return torch.randn(2, 7) if isinstance(layer, nn.Linear) else torch.randn(2, 6, 8, 8)


@pytest.mark.parametrize("make", LAYERS)
def test_sigma_converges_to_the_largest_singular_value(make):
    torch.manual_seed(0)
    layer = SpectralNorm(make())
    matrix = layer.module.weight_bar.detach().flatten(1)
    for _ in range(200):
        layer(inputs_for(layer.module))
    assert layer.sigma().item() == pytest.approx(torch.linalg.svdvals(matrix)[0].item(), rel=1e-4)


def test_values_and_gradients_agree_with_torch_s_own_spectral_norm():
    """In evaluation mode, from the same u and v: in training, torch updates them in the other order."""
    torch.manual_seed(0)
    ours, plain = SpectralNorm(nn.Conv2d(6, 10, 3)).eval(), nn.Conv2d(6, 10, 3)
    plain.load_state_dict({"weight": ours.module.weight_bar, "bias": ours.module.bias})
    theirs = nn.utils.parametrizations.spectral_norm(plain, dim=0).eval()
    theirs.parametrizations.weight[0]._u.copy_(ours.module.weight_u)
    theirs.parametrizations.weight[0]._v.copy_(ours.module.weight_v)
    x = inputs_for(ours.module)
    torch.testing.assert_close(ours(x), theirs(x))
    weights = ours.module.weight_bar, theirs.parametrizations.weight.original
    gradients = [torch.autograd.grad(layer(x).square().sum(), weight)
                 for layer, weight in zip((ours, theirs), weights, strict=True)]  # fmt: skip
    torch.testing.assert_close(*gradients)


def test_the_rows_of_a_transposed_convolution_are_its_input_channels():
    layer = SpectralNorm(nn.ConvTranspose2d(6, 10, 4))
    assert layer.module.weight_u.shape == (6,)
    assert layer.module.weight_v.shape == (10 * 4 * 4,)


@pytest.mark.parametrize("iterations", [1, 3])
def test_one_forward_is_algorithm_1_of_the_paper(iterations):
    torch.manual_seed(1)
    layer = SpectralNorm(nn.Linear(7, 5), power_iterations=iterations)
    weight, u = layer.module.weight_bar.detach().clone(), layer.module.weight_u.clone()
    for _ in range(iterations):
        v = weight.t() @ u
        v = v / (v.norm() + 1e-12)
        u = weight @ v
        u = u / (u.norm() + 1e-12)
    x = torch.randn(3, 7)
    expected = x @ (weight / (u @ weight @ v)).t() + layer.module.bias
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.module.weight_u, u)
    torch.testing.assert_close(layer.module.weight_v, v)


def test_u_and_v_do_not_change_in_evaluation_mode():
    layer = SpectralNorm(nn.Linear(7, 5))
    layer(torch.randn(3, 7))
    layer.eval()
    before = copy.deepcopy(layer.state_dict())
    first, second = layer(torch.ones(1, 7)), layer(torch.ones(1, 7))
    assert torch.equal(first, second)
    assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())


def test_two_forwards_before_one_backward_have_exact_gradients():
    """In the reference, the first forward's gradient uses the second one's vectors: 5% off."""
    torch.manual_seed(0)
    layer = SpectralNorm(nn.Linear(7, 5, bias=False))
    x, y = torch.randn(3, 7), torch.randn(3, 7)
    weight = layer.module.weight_bar.detach().clone().requires_grad_()
    total = 0
    for data in (x, y):
        state = layer.module.weight_u, layer.module.weight_v
        layer(data)  # updates u and v to what this forward uses
        u, v = (vector.clone() for vector in state)
        total = total + (data @ (weight / (u @ weight @ v)).t()).square().sum()
    (expected,) = torch.autograd.grad(total, weight)

    torch.manual_seed(0)
    layer = SpectralNorm(nn.Linear(7, 5, bias=False))
    (layer(x).square().sum() + layer(y).square().sum()).backward()
    torch.testing.assert_close(layer.module.weight_bar.grad, expected)


def test_keys_are_the_reference_s_and_u_and_v_are_buffers():
    layer = SpectralNorm(nn.Conv2d(3, 8, 4))
    assert set(layer.state_dict()) == {"module.weight_bar", "module.weight_u", "module.weight_v", "module.bias"}
    assert {name for name, _ in layer.named_parameters()} == {"module.weight_bar", "module.bias"}


def test_deepcopy_works_after_a_forward_with_gradients():
    layer = SpectralNorm(nn.Linear(7, 5))
    layer(torch.randn(3, 7))
    copy.deepcopy(layer)


def test_a_zero_weight_gives_no_nan_vectors():
    layer = SpectralNorm(nn.Linear(7, 5))
    nn.init.zeros_(layer.module.weight_bar)
    layer(torch.randn(3, 7))
    assert torch.isfinite(layer.module.weight_u).all()


def test_zero_power_iterations_are_rejected():
    with pytest.raises(ValueError, match="power_iterations"):
        SpectralNorm(nn.Linear(2, 2), power_iterations=0)


@pytest.mark.parametrize("make", [*LAYERS, lambda: nn.Embedding(5, 7)])
def test_a_folded_layer_is_the_plain_one_with_the_result_of_evaluation(make):
    torch.manual_seed(0)
    layer = SpectralNorm(make())
    x = torch.arange(5) if isinstance(layer.module, nn.Embedding) else inputs_for(layer.module)
    layer(x)  # u and v are no singular vectors yet: sigma is theirs
    expected = layer.eval()(x)
    folded = copy.deepcopy(layer).folded()
    assert folded.state_dict().keys() == make().state_dict().keys()
    assert type(folded) is type(make())
    torch.testing.assert_close(folded(x), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("model, imsize, num_classes", [("sagan", 32, 0), ("paper", 64, 0), ("paper", 64, 3)])
def test_networks_with_folded_weights_equal_those_in_evaluation(model, imsize, num_classes):
    """All outputs; also D, whose embedding is normalized too."""
    G = random_generator(model, imsize, num_classes)
    D = MODELS[model].make_D(imsize, 8, **network_options(num_classes))
    for network in (G, D):
        inputs = generator_inputs(5, num_classes)
        if network is D:
            inputs = (torch.rand(5, 3, imsize, imsize), *inputs[1:])
        network(*inputs)
        folded = fold_spectral_norm(copy.deepcopy(network.eval()))
        assert not any(isinstance(layer, SpectralNorm) for layer in folded.modules())
        with torch.no_grad():
            pairs = zip(network(*inputs, return_attention=True), folded(*inputs, return_attention=True), strict=True)
        for expected, actual in pairs:
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
