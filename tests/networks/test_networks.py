"""G and D of each --model: numbers of their references, shapes, sizes, attention, precision, classes."""

import copy
import re
from itertools import product

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from recorded import read_oracle, replay
from torch import nn

from networks.losses import gradient_penalty
from networks.paper_models import ConditionalBatchNorm2d, PooledAttention, PooledConv2d, UpsampledConv2d
from networks.sync_batchnorm import CpuSyncBatchNorm2d
from sagan_models import SelfAttention
from spectral import SpectralNorm, replace_layers
from training.models import MODELS
from training.previews import gammas_and_sigmas

CLASSES = 5
# A bias of a channel that the next BatchNorm subtracts again has no effect, nor has a bias of the keys.
WITHOUT_GRADIENT = {
    "sagan": r"G_grad\w+/l\d\.0\.module\.bias|\w_grad\w+/attn\d\.key_conv\.bias",
    "paper": r"G_grad\w+/block(\d\.conv1|4\.conv2|4\.shortcut)\.module\.bias",
}
SHAPES = {  # channels x side of what each layer of small networks returns
    ("sagan", 32): ("l1 32x4, l2 16x8, attn1 16x8, l3 8x16, attn2 8x16, last 3x32",
                    "l1 8x16, l2 16x8, attn1 16x8, l3 32x4, attn2 32x4, last 1x1"),
    ("sagan", 256): ("l1 256x4, l2 128x8, l3 64x16, attn1 64x16, l4 32x32, attn2 32x32, l5 16x64, l6 8x128, last 3x256",
                     "l1 8x128, l2 16x64, l3 32x32, l4 64x16, l5 128x8, attn1 128x8, l6 256x4, attn2 256x4, last 1x1"),
    ("paper", 32): ("block1 32x8, block2 32x16, attn1 32x16, block3 32x32, bn 32x32, last 3x32",
                    "block1 16x16, attn1 16x16, block2 16x8, block3 16x8, block4 16x8"),
    ("paper", 128): ("block1 128x8, block2 64x16, block3 32x32, attn1 32x32, block4 16x64, block5 8x128, bn 8x128, "
                     "last 3x128",
                     "block1 8x64, block2 16x32, attn1 16x32, block3 32x16, block4 64x8, block5 128x4, block6 128x4"),
}  # fmt: skip
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


def first(out):
    """The images, logits or feature map, with or without attention maps."""
    return out[0] if isinstance(out, tuple) else out


def relative_error(actual, expected):
    return (actual - expected).norm() / expected.norm()


# The references


@pytest.mark.parametrize(
    "model, dtype, count",
    [
        ("sagan", torch.float64, 136),
        ("paper", torch.float32, 44),
        pytest.param("paper", torch.float64, 220, marks=pytest.mark.slow),
    ],
)
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


# Shapes and sizes


@pytest.mark.parametrize("model, size", SHAPES)
def test_shapes(model, size):
    networks, xs = make(model, size=size), (torch.randn(2, 16), torch.randn(2, 3, size, size))
    for network, x, expected in zip(networks, xs, SHAPES[model, size], strict=True):
        shapes = []
        for name, layer in network.named_children():
            hook = lambda _, __, out, name=name, shapes=shapes: shapes.append((name, first(out).shape))  # noqa: E731
            layer.register_forward_hook(hook)
        out, *maps = network(x, return_attention=True)
        assert ", ".join(f"{name} {s[1]}x{s[2]}" for name, s in shapes if len(s) == 4) == expected
        queries = [int(side) ** 2 for side in re.findall(r"attn\d \d+x(\d+)", expected)]
        assert [m.shape for m in maps] == [(2, n, n // 4 if model == "paper" else n) for n in queries]
        assert out.shape == ((2, 3, size, size) if network is networks[0] else (2,))
        assert network.eval()(x[:1]).shape == (1, *out.shape[1:])


@pytest.mark.parametrize("has_attention", [True, False])
@pytest.mark.parametrize("conv_dim", [8, 24])
@pytest.mark.parametrize(
    "model, size, num_classes",
    [("sagan", 32, 0), ("sagan", 256, 0), ("paper", 32, CLASSES), ("paper", 64, 0), ("paper", 128, CLASSES)],
)
def test_state_dicts_tell_the_sizes(model, size, num_classes, conv_dim, has_attention):
    module, (other,) = MODELS[model], MODELS.keys() - {model}
    sizes = dict(image_size=size, conv_dim=conv_dim, num_classes=num_classes, has_attention=has_attention)
    with torch.device("meta"):
        G, D = module.Generator(**sizes, z_dim=16).state_dict(), module.Discriminator(**sizes).state_dict()
    assert module.generator_sizes(G) == {**sizes, "z_dim": 16}
    assert module.discriminator_sizes(D) == sizes
    for read, weights in ((MODELS[other].generator_sizes, G), (MODELS[other].discriminator_sizes, D)):
        with pytest.raises(KeyError):
            read(weights)


@pytest.mark.parametrize(
    "model, arguments",
    [
        *product(MODELS, [dict(image_size=48), dict(image_size=512), dict(conv_dim=12), dict(conv_dim=0)]),
        ("sagan", dict(num_classes=3)),
    ],
)
def test_arguments_that_no_network_has_are_rejected(model, arguments):
    for network in (MODELS[model].Generator, MODELS[model].Discriminator):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            network(**arguments)


# Layers


@pytest.mark.parametrize("size, names", [(32, ["block3", "block4"]), (128, ["block6"])])
def test_blocks_of_d_that_keep_size_and_width_add_their_input_itself(size, names):
    _, D = make("paper", size=size)
    blocks = {name: block for name, block in D.named_children() if name.startswith("block")}
    assert [name for name, block in blocks.items() if not [*block.shortcut.parameters()]] == names
    block = blocks[names[-1]].eval()
    x = torch.randn(2, block.conv1.module.in_channels, 4, 4)
    torch.testing.assert_close(block(x), x + block.conv2(F.relu(block.conv1(F.relu(x)))))


def upsampled_conv(x, weight, bias):
    return F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=1)


def pooled_conv(x, weight, bias):
    return F.avg_pool2d(F.conv2d(x, weight, bias, padding=1), 2)


@pytest.mark.parametrize("layer, expected", [(UpsampledConv2d, upsampled_conv), (PooledConv2d, pooled_conv)])
@pytest.mark.parametrize("height, width", [(4, 6), (2, 2)])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_one_convolution_equals_two_steps_in_values_and_gradients(layer, expected, height, width, memory_format):
    torch.manual_seed(0)
    layer = layer(3, 5, 3, padding=1).double().to(memory_format=memory_format)
    x = torch.randn(2, 3, height, width, dtype=torch.double).contiguous(memory_format=memory_format).requires_grad_()
    outputs = [layer(x), expected(x, layer.weight, layer.bias)]
    weights = torch.randn(outputs[0].shape, dtype=torch.double)
    gradients = [torch.autograd.grad((out * weights).sum(), (x, layer.weight, layer.bias)) for out in outputs]
    torch.testing.assert_close(outputs[0], outputs[1])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_an_upsampled_convolution_as_a_transposed_one():
    layer, x = UpsampledConv2d(5, 7, 3, padding=1), torch.randn(2, 5, 6, 8)
    assert type(layer.as_conv_transpose()) is nn.ConvTranspose2d
    torch.testing.assert_close(layer.as_conv_transpose()(x), layer(x))


# Attention


def reference_formula(layer, x):
    """The result and the map of the reference's layer, written out."""
    query, key, value = (conv(x).flatten(2) for conv in (layer.query_conv, layer.key_conv, layer.value_conv))
    attention = torch.softmax(torch.einsum("bci,bcj->bij", query, key), dim=2)
    return layer.gamma * torch.einsum("bcj,bij->bci", value, attention).reshape(x.shape) + x, attention


def paper_formula(layer, x):
    """The result and the map of the paper's layer, written out; with the weights that evaluation mode uses."""
    query, key, value, last = (
        (conv.module.weight_bar / conv.sigma())[:, :, 0, 0]
        for conv in (layer.query_conv, layer.key_conv, layer.value_conv, layer.out_conv)
    )
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
def test_the_path_without_maps_equals_the_other_in_values_and_gradients(model, num_classes):
    *xs, labels = inputs(model, num_classes)
    for network, x in zip(make(model, num_classes), xs, strict=True):
        results = []
        for return_attention in (True, False):
            twin = copy.deepcopy(network).double()  # a forward changes its buffers
            out = first(twin(x.double(), labels, return_attention))
            (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
            results.append([out, *(parameter.grad for parameter in twin.parameters())])
        for expected, actual in zip(*results, strict=True):
            assert (actual - expected).abs().max() <= 1e-6 + 1e-5 * expected.abs().max()


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
    values = gammas_and_sigmas("G", G)
    sigmas = {name.removesuffix(".0"): layer for name, layer in G.named_modules() if isinstance(layer, SpectralNorm)}
    gammas = {"sagan": {"attn1", "attn2"}, "paper": {"attn1"}}[model]
    assert values.keys() == {f"gamma/G_{name}" for name in gammas} | {f"sigma/G_{name}" for name in sigmas}
    assert values["gamma/G_attn1"] == 0.5
    assert all(values[f"sigma/G_{name}"] == layer.sigma() for name, layer in sigmas.items())
    assert all(value.ndim == 0 and not value.requires_grad for value in values.values())


# Precision, memory format, modes


@EACH
def test_bf16_stays_near_fp32(model, num_classes):
    (G, D), (z, _, labels) = make_settled(model, num_classes), inputs(model, num_classes, 4)
    images = G(z, labels)
    logits = D(images, labels)
    # Some 40 roundings one after the other, whose errors, each up to the unit roundoff, add up like random numbers.
    limit = 40**0.5 * 2**-8
    with torch.autocast("cpu", torch.bfloat16):
        again = G(z, labels).float()
        assert relative_error(again, images) < limit
        assert relative_error(D(images, labels).float(), logits) < limit
    scale = (again * images).sum() / images.square().sum()
    assert scale.item() == pytest.approx(1, abs=2**-7)  # roundings have no bias


@EACH
def test_feature_maps_stay_in_bf16(model, num_classes):
    """Parameters in fp32 that are not of a convolution, such as gamma, would make them fp32."""
    (G, D), (z, _, labels), types = make(model, num_classes), inputs(model, num_classes), []
    for layer in (*G.modules(), *D.modules()):
        if isinstance(layer, (ConditionalBatchNorm2d, PooledAttention, SelfAttention)):
            layer.register_forward_hook(lambda _, __, out: types.append(first(out).dtype))
    with torch.autocast("cpu", torch.bfloat16):
        D(G(z, labels), labels)
    assert types == [torch.bfloat16] * ({"sagan": 4, "paper": 2}[model] + (6 if num_classes else 0))


@EACH
def test_channels_last_changes_nothing_but_the_memory_format(model, num_classes):
    (G, D), (z, _, labels) = make_settled(model, num_classes), inputs(model, num_classes)
    images = G(z, labels)
    logits = D(images, labels)
    for network in (G, D):
        network.to(memory_format=torch.channels_last)
    again = G(z, labels)
    assert again.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(again, images, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(D(again, labels), logits, rtol=1e-4, atol=1e-5)


@EACH
def test_evaluation_changes_no_buffer_and_training_changes_all(model, num_classes):
    *xs, labels = inputs(model, num_classes)
    for network, x in zip(make(model, num_classes), xs, strict=True):
        before = copy.deepcopy(dict(network.named_buffers()))
        network.eval()(x, labels)
        assert all(torch.equal(before[name], buffer) for name, buffer in network.named_buffers())
        network.train()(x, labels)
        same = {name for name, buffer in network.named_buffers() if torch.equal(before[name], buffer)}
        assert all(before[name].numel() == 1 for name in same)  # u of a single row is 1 or -1


# Classes


@EACH
def test_labels_are_needed_by_networks_with_classes_only(model, num_classes):
    *xs, _ = inputs(model, num_classes)
    for network, x in zip(make(model, num_classes), xs, strict=True):
        with pytest.raises(ValueError, match="labels"):
            network(x, None if num_classes else torch.tensor([0, 1]))


def test_a_conditional_generator_starts_as_the_unconditional_one():
    """Gain 1 and shift 0 for every class: the same images, whatever the labels."""
    (plain, _), (conditional, _) = make_settled("paper"), make("paper", CLASSES)
    state = {re.sub(r"(bn[12])\.([rn])", r"\1.norm.\2", key): value for key, value in plain.state_dict().items()}
    missing, _ = conditional.load_state_dict(state, strict=False)
    assert all(key.endswith(("gain.weight", "shift.weight")) for key in missing)
    z, _, labels = inputs("paper", CLASSES, 3)
    for mode in (False, True):
        torch.testing.assert_close(conditional.train(mode)(z, labels), plain.train(mode)(z))


def test_gain_and_shift_are_those_of_each_image_s_class_or_of_a_mix_of_classes():
    layer = ConditionalBatchNorm2d(6, CLASSES)
    for table in (layer.gain, layer.shift):
        nn.init.normal_(table.weight)
    x, labels = torch.randn(4, 6, 5, 5), torch.tensor([3, 0, 0, 1])
    normalized = F.batch_norm(x, None, None, training=True)
    gain, shift = (table.weight[labels, :, None, None] for table in (layer.gain, layer.shift))
    torch.testing.assert_close(layer(x, labels), gain * normalized + shift)
    one_hot = F.one_hot(labels, CLASSES).float()
    torch.testing.assert_close(layer(x, one_hot), layer(x, labels))
    between = (one_hot + one_hot.flip(0)) / 2
    torch.testing.assert_close(layer(x, between), (layer(x, labels) + layer(x, labels.flip(0))) / 2)


def test_every_embedding_of_g_learns_of_each_image_s_class_alone():
    G, _ = make_settled("paper", CLASSES)
    G(torch.randn(2, 16), torch.tensor([3, 1]))[0].sum().backward()
    tables = [layer.weight for layer in G.modules() if isinstance(layer, nn.Embedding)]
    assert len(tables) == 2 * 2 * 3  # gain and shift, two in each block
    for table in tables:
        assert table.grad.abs().sum(1).nonzero().flatten().tolist() == [3]


def test_the_projection_is_the_inner_product_of_features_and_the_class_s_embedding():
    (_, D), features = make_settled("paper", CLASSES), []
    D.linear.register_forward_hook(lambda _, inputs, out: features.extend((inputs[0], out[:, 0])))
    labels = torch.tensor([4, 0, 4])
    logits = D(torch.randn(3, 3, 32, 32), labels)
    h, unconditional = features
    embedding = D.embedding.module.weight_bar / D.embedding.sigma()
    torch.testing.assert_close(logits, unconditional + (embedding[labels] * h).sum(1))


def test_batch_norm_over_ranks_keeps_conditional_layers():
    """Of one rank here: the result is that of the layers which were replaced."""
    (G, _), (z, _, labels) = make("paper", CLASSES), inputs("paper", CLASSES, 3)
    synced = replace_layers(copy.deepcopy(G), nn.BatchNorm2d, CpuSyncBatchNorm2d.copy_of)
    assert isinstance(synced.block1.bn1.norm, CpuSyncBatchNorm2d) and isinstance(synced.bn, CpuSyncBatchNorm2d)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        torch.testing.assert_close(synced(z, labels), G(z, labels), rtol=1e-4, atol=1e-5)
    finally:
        dist.destroy_process_group()
    assert synced.state_dict().keys() == G.state_dict().keys()
    for key, value in G.state_dict().items():
        torch.testing.assert_close(synced.state_dict()[key], value, rtol=1e-4, atol=1e-5)
