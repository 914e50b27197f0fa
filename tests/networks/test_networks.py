"""G and D of each --model: numbers of their references, shapes, sizes, attention, precision, classes."""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from recorded import read_oracle, replay
from torch import nn

from networks.losses import gradient_penalty
from networks.paper_models import ConditionalBatchNorm2d, PooledAttention, UpsampledConv2d
from sagan_models import SelfAttention
from spectral import SpectralNorm
from training.models import MODELS
from training.previews import gammas_and_sigmas

CLASSES = 5
# A bias of a channel that the next BatchNorm subtracts again has no effect, nor has a bias of the keys.
WITHOUT_GRADIENT = {
    "sagan": r"G_grad\w+/l\d\.0\.module\.bias|\w_grad\w+/attn\d\.key_conv\.bias",
    "paper": r"G_grad\w+/block(\d\.conv1|4\.conv2|4\.shortcut)\.module\.bias",
}
EACH = pytest.mark.parametrize("model, num_classes", [("sagan", 0), ("paper", 0), ("paper", CLASSES)])


def make(model, num_classes=0, size=32, gamma=0.5):
    """Small networks, whose attention layers take part."""
    torch.manual_seed(0)
    G = MODELS[model].Generator(size, 16, 8, num_classes=num_classes)
    D = MODELS[model].Discriminator(size, 8, num_classes=num_classes)
    for layer in (*G.modules(), *D.modules()):
        if hasattr(layer, "gamma"):
            nn.init.constant_(layer.gamma, gamma)
    return G, D


def inputs(model, num_classes, count=2):
    """z, images and labels."""
    labels = torch.arange(1, count + 1) % num_classes if num_classes else None
    return torch.randn(count, 16), torch.randn(count, 3, 32, 32), labels


def make_settled(model, num_classes=0):
    """Small networks in evaluation mode, after forwards in which sigma and the statistics came near their limits."""
    G, D = make(model, num_classes)
    with torch.no_grad():
        for _ in range(4):
            z, _, labels = inputs(model, num_classes, 4)
            D(G(z, labels), labels)
    return G.eval(), D.eval()


@pytest.mark.parametrize("model, dtype, count", [
    ("sagan", torch.float64, 136), ("paper", torch.float32, 44),
    pytest.param("paper", torch.float64, 220, marks=pytest.mark.slow),
])  # fmt: skip
def test_every_recorded_number_agrees_with_the_reference(model, dtype, count):
    """To 1e-4 of each tensor's largest value."""
    oracle, ours = read_oracle(model), replay(model, dtype)
    names = oracle.keys() & ours.keys()
    assert len(names) == count
    for name in names:
        expected = oracle[name].astype(float)
        if re.fullmatch(WITHOUT_GRADIENT[model], name):  # rounding errors were recorded
            assert np.abs(ours[name]).max() < 1e-6, name
        else:
            assert np.abs(ours[name] - expected).max() <= 1e-4 * np.abs(expected).max(), name


@pytest.mark.parametrize("model", MODELS)
def test_keys_and_shapes_are_the_reference_s(model):
    with torch.device("meta"):
        networks = {"G_keys": MODELS[model].Generator(), "D_keys": MODELS[model].Discriminator()}
    for name, network in networks.items():
        ours = {f"{key} {tuple(value.shape)}" for key, value in network.state_dict().items()}
        assert ours == set(read_oracle(model)[name])


def test_weights_of_the_paper_s_networks_are_xavier_uniform_and_biases_0():
    for network in make("paper", CLASSES):
        for name, layer in network.named_modules():
            if isinstance(layer, SpectralNorm):
                weight = layer.module.weight_bar.detach()
                bound = (6 / ((weight.shape[0] + weight.shape[1]) * weight[0, 0].numel())) ** 0.5
                assert weight.abs().max() <= bound, name
                assert weight.numel() < 1000 or weight.std() == pytest.approx(bound / 3**0.5, rel=0.1), name
                bias = getattr(layer.module, "bias", None)
                assert bias is None or not bias.any(), name


@pytest.mark.parametrize("model, size, weights, sides, kept", [  # sides of maps; blocks of D that keep the size
    ("sagan", 32, (19_419, 12_855), ((8, 16), (8, 4)), 0), ("sagan", 256, (772_325, 806_235), ((16, 32), (8, 4)), 0),
    ("paper", 32, (69_956, 17_362), ((16,), (16,)), 2), ("paper", 128, (507_364, 601_818), ((32,), (32,)), 1),
])  # fmt: skip
def test_sizes(model, size, weights, sides, kept):
    xs, shapes = (torch.randn(2, 16), torch.randn(2, 3, size, size)), ((3, size, size), ())
    for network, x, shape, count, attending in zip(make(model, size=size), xs, shapes, weights, sides, strict=True):
        assert sum(parameter.numel() for parameter in network.parameters()) == count
        out, *maps = network(x, return_attention=True)
        assert out.shape == (2, *shape) and network.eval()(x[:1]).shape == (1, *shape)
        assert [m.shape for m in maps] == [(2, n**2, n**2 // (4 if model == "paper" else 1)) for n in attending]
    assert sum(getattr(layer, "keeps_size", False) for layer in network.children()) == kept


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name, value", [("image_size", 48), ("image_size", 512), ("conv_dim", 12), ("conv_dim", 0)])
def test_arguments_that_no_network_has_are_rejected(model, name, value):
    for network in (MODELS[model].Generator, MODELS[model].Discriminator):
        with pytest.raises(ValueError, match=name):
            network(**{name: value})


def test_an_upsampled_convolution_as_a_transposed_one():
    layer, x = UpsampledConv2d(5, 7, 3, padding=1), torch.randn(2, 5, 6, 8)
    assert type(layer.as_conv_transpose()) is nn.ConvTranspose2d
    torch.testing.assert_close(layer.as_conv_transpose()(x), layer(x))


def reference_formula(layer, x):
    """The result and the map of the reference's layer, written out."""
    query, key, value = (conv(x).flatten(2) for conv in (layer.query_conv, layer.key_conv, layer.value_conv))
    attention = torch.softmax(torch.einsum("bci,bcj->bij", query, key), dim=2)
    return layer.gamma * torch.einsum("bcj,bij->bci", value, attention).reshape(x.shape) + x, attention


def paper_formula(layer, x):
    """The result and the map of the paper's layer, written out; with the weights that evaluation mode uses."""
    convs = layer.query_conv, layer.key_conv, layer.value_conv, layer.out_conv
    query, key, value, last = ((conv.module.weight_bar / conv.sigma())[:, :, 0, 0] for conv in convs)
    batch, _, height, width = x.shape
    projected = [torch.einsum("oc,bchw->bohw", weight, x) for weight in (query, key, value)]
    pooled = [p.reshape(batch, -1, height // 2, 2, width // 2, 2).amax((3, 5)).flatten(2) for p in projected[1:]]
    attention = torch.softmax(torch.einsum("bci,bcj->bij", projected[0].flatten(2), pooled[0]), dim=2)
    out = torch.einsum("oc,bcj,bij->boi", last, pooled[1], attention).reshape(x.shape)
    return layer.gamma * out + x, attention


@pytest.mark.parametrize("kind, formula", [(SelfAttention, reference_formula), (PooledAttention, paper_formula)])
def test_attention_equals_the_paper_s_formula_in_values_and_second_derivatives(kind, formula):
    torch.manual_seed(0)
    layer, x = kind(16), torch.randn(2, 16, 4, 6)
    assert torch.equal(layer(x)[0], x)  # gamma is 0 at first
    nn.init.constant_(layer.gamma, 0.3)
    for _ in range(20):  # until sigma converges
        layer(x)
    layer.eval()
    expected, expected_map = formula(layer, x)
    out, attention = layer(x, return_attention=True)
    torch.testing.assert_close(attention, expected_map)
    torch.testing.assert_close(attention.sum(-1), torch.ones(2, 24))
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(layer(x)[0], expected)

    alpha, results = torch.rand(2, 1, 1, 1), []
    for function in (lambda x: formula(layer, x)[0], lambda x: layer(x, return_attention=True)[0]):
        penalty = gradient_penalty(lambda x, f=function: f(x).square().sum((1, 2, 3)), x, -x, alpha)
        results.append(torch.autograd.grad(penalty, [*layer.parameters()]))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@EACH
def test_the_gradient_penalty_reaches_every_weight_through_the_maps(model, num_classes):
    """The fast path has no second derivative, and says so."""
    (_, D), (_, real, labels) = make(model, num_classes), inputs(model, num_classes)
    fake, alpha = torch.randn_like(real), torch.rand(2, 1, 1, 1)
    gradient_penalty(lambda x: D(x, labels, return_attention=True)[0], real, fake, alpha).backward()
    for name, parameter in D.named_parameters():
        if not name.endswith("bias"):
            assert parameter.grad.isfinite().all() and parameter.grad.any(), name
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient_penalty(lambda x: D(x, labels), real, fake, alpha).backward()


@EACH
def test_networks_without_attention_are_the_others_without_these_layers(model, num_classes):
    *xs, labels = inputs(model, num_classes)
    options = dict(num_classes=num_classes, has_attention=False)
    others = (MODELS[model].Generator(32, 16, 8, **options), MODELS[model].Discriminator(32, 8, **options))
    for network, other, x in zip(make(model, num_classes, gamma=0), others, xs, strict=True):
        rest = {key: value for key, value in network.state_dict().items() if not key.startswith("attn")}
        other.load_state_dict(rest)  # no other keys
        (out,) = other.eval()(x, labels, return_attention=True)
        torch.testing.assert_close(out, network.eval()(x, labels))


@pytest.mark.parametrize("model", MODELS)
def test_logged_scalars_are_of_every_attention_layer_and_spectral_norm(model):
    G, _ = make(model)
    layers = dict(G.named_modules())
    expected = {f"gamma/G_{name}": layer.gamma[0] for name, layer in layers.items() if hasattr(layer, "gamma")}
    expected |= {f"sigma/G_{name.removesuffix('.0')}": layer.sigma() for name, layer in layers.items()
                 if isinstance(layer, SpectralNorm)}  # fmt: skip
    torch.testing.assert_close(gammas_and_sigmas("G", G), expected)


@EACH
def test_bf16_and_channels_last_stay_near_fp32(model, num_classes):
    """Feature maps stay in bf16: parameters in fp32 that are not of a convolution would make them fp32."""
    (G, D), (z, _, labels), types = make_settled(model, num_classes), inputs(model, num_classes, 4), []
    images = G(z, labels)
    logits = D(images, labels)
    for network in (G, D):
        network.to(memory_format=torch.channels_last)
    again = G(z, labels)
    assert again.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(again, images, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(D(again, labels), logits, rtol=1e-4, atol=1e-5)
    for layer in (*G.modules(), *D.modules()):
        if isinstance(layer, (ConditionalBatchNorm2d, PooledAttention, SelfAttention)):
            layer.register_forward_hook(
                lambda _, __, out: types.append((out[0] if isinstance(out, tuple) else out).dtype)
            )
    # Some 40 roundings one after the other, whose errors, each up to the unit roundoff, add up like random numbers.
    limit = 40**0.5 * 2**-8
    with torch.autocast("cpu", torch.bfloat16):
        again = G(z, labels).float()
        assert (again - images).norm() < limit * images.norm()
        assert (D(images, labels).float() - logits).norm() < limit * logits.norm()
    assert types == [torch.bfloat16] * ({"sagan": 4, "paper": 2}[model] + (6 if num_classes else 0))
    scale = (again * images).sum() / images.square().sum()
    assert scale.item() == pytest.approx(1, abs=2**-7)  # roundings have no bias


@EACH
def test_labels_are_needed_by_networks_with_classes_only(model, num_classes):
    *xs, _ = inputs(model, num_classes)
    for network, x in zip(make(model, num_classes), xs, strict=True):
        with pytest.raises(ValueError, match="labels"):
            network(x, None if num_classes else torch.tensor([0, 1]))


def test_gain_and_shift_are_those_of_each_image_s_class_or_of_a_mix_of_classes():
    layer, x, labels = ConditionalBatchNorm2d(6, CLASSES), torch.randn(4, 6, 5, 5), torch.tensor([3, 0, 0, 1])
    normalized = F.batch_norm(x, None, None, training=True)
    torch.testing.assert_close(layer(x, labels), normalized)  # at first
    for table in (layer.gain, layer.shift):
        nn.init.normal_(table.weight)
    gain, shift = (table.weight[labels, :, None, None] for table in (layer.gain, layer.shift))
    torch.testing.assert_close(layer(x, labels), gain * normalized + shift)
    one_hot = F.one_hot(labels, CLASSES).float()
    torch.testing.assert_close(layer(x, one_hot), layer(x, labels))
    between = (one_hot + one_hot.flip(0)) / 2
    torch.testing.assert_close(layer(x, between), (layer(x, labels) + layer(x, labels.flip(0))) / 2)


def test_every_embedding_of_g_and_the_projection_of_d_are_of_each_image_s_class_alone():
    """The projection: the inner product of D's features and the embedding."""
    (G, D), features = make_settled("paper", CLASSES), []
    G(torch.randn(2, 16), torch.tensor([3, 1]))[0].sum().backward()
    tables = [layer.weight for layer in G.modules() if isinstance(layer, nn.Embedding)]
    assert len(tables) == 2 * 2 * 3  # gain and shift, two in each block
    for table in tables:
        assert table.grad.abs().sum(1).nonzero().flatten().tolist() == [3]
    D.linear.register_forward_hook(lambda _, inputs, out: features.extend((inputs[0], out[:, 0])))
    labels = torch.tensor([4, 0, 4])
    logits = D(torch.randn(3, 3, 32, 32), labels)
    h, unconditional = features
    embedding = D.embedding.module.weight_bar / D.embedding.sigma()
    torch.testing.assert_close(logits, unconditional + (embedding[labels] * h).sum(1))
