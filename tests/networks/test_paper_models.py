import copy
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import shapes_of
from recorded import assert_as_recorded, fill_as_oracle, oracle_inputs, replay
from torch import nn

from networks.losses import gradient_penalty
from networks.paper_models import (
    ConditionalBatchNorm2d,
    Discriminator,
    Generator,
    PooledAttention,
    PooledConv2d,
    UpsampledConv2d,
)
from networks.sync_batchnorm import CpuSyncBatchNorm2d
from sagan_models import gammas_and_sigmas
from spectral import SpectralNorm, replace_layers

CLASSES = 5
# A bias of a channel that the next BatchNorm subtracts again has no effect.
WITHOUT_GRADIENT = r"G_grad\w+/block(\d\.conv1|4\.conv2|4\.shortcut)\.module\.bias"


@pytest.fixture(scope="module")
def oracle():
    """Numbers recorded from StudioGAN's SAGAN at 64x64, batch 4, float32 on a CPU."""
    with np.load(Path(__file__).parents[1] / "paper_64.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def recorded_networks():
    """G and D with the weights of the oracle, for tests that do not change them."""
    return fill_as_oracle(Generator(), "paper"), fill_as_oracle(Discriminator(), "paper")


def make(size=64, conv_dim=8, num_classes=0, gamma=0.5):
    """Small networks, whose attention layers take part."""
    torch.manual_seed(0)
    G = Generator(size, 16, conv_dim, num_classes=num_classes)
    D = Discriminator(size, conv_dim, num_classes=num_classes)
    for network in (G, D):
        torch.nn.init.constant_(network.attn1.gamma, gamma)
    return G, D


def make_settled(num_classes=0):
    """Small networks in evaluation mode, after forwards in which sigma and the statistics came near their limits."""
    G, D = make(num_classes=num_classes)
    labels = [torch.arange(4) % num_classes] if num_classes else []
    with torch.no_grad():
        for _ in range(4):
            D(G(torch.randn(4, 16), *labels), *labels)
    return G.eval(), D.eval()


def relative_error(actual, expected):
    return (actual - expected).norm() / expected.norm()


def test_outputs_maps_and_statistics_agree_with_the_reference(oracle, recorded_networks):
    G, D = copy.deepcopy(recorded_networks)
    z, real = oracle_inputs("paper")
    with torch.no_grad():
        image, g_map = G(z, return_attention=True)
        real_logits, d_map = D(real, return_attention=True)
        fake_logits = D(image)
    ours = {
        "g_image": image,
        "g_attn1_sum": g_map.sum(1),
        "g_attn1_row": g_map[:, 333],
        "d_attn1_row": d_map[:, 333],
        "d_logits_real": real_logits,
        "d_logits_fake_second_forward": fake_logits,
    }
    state = {f"G_after/{key}": value for key, value in G.state_dict().items()}
    assert_as_recorded(ours | {key: state[key] for key in oracle if key in state}, oracle)


@pytest.mark.slow
def test_every_recorded_number_agrees_with_the_reference(oracle, recorded_networks):
    """In fp64: rounding in fp32 changes the sign of a few inputs of ReLUs, and with them gradients of G by up to 1%."""
    G, D = (copy.deepcopy(network).double() for network in recorded_networks)
    ours = replay(G, D, *(x.double() for x in oracle_inputs("paper")), {"g_attn1": 333, "d_attn1": 333})
    recorded = {key: ours[key] for key in oracle if not key.endswith("_keys")}
    assert len(recorded) == 220
    assert_as_recorded(recorded, oracle, WITHOUT_GRADIENT)


def count(network):
    return sum(parameter.numel() for parameter in network.parameters())


def test_keys_shapes_and_parameter_counts_are_the_reference_s(oracle, recorded_networks):
    for network, name in zip(recorded_networks, ("G_keys", "D_keys"), strict=True):
        ours = {f"{key} {tuple(value.shape)}" for key, value in network.state_dict().items()}
        assert ours == set(oracle[name])
    assert [count(network) for network in recorded_networks] == [12_241_156, 19_547_842]


def test_parameter_counts_at_128():
    assert count(Generator(128)) == 32_232_708
    assert count(Discriminator(128)) == 38_439_618


def test_shape_tables_at_64():
    G, D = make()
    assert shapes_of(G, torch.randn(2, 16)) == {
        "linear": (2, 16 * 8 * 4 * 4),
        "block1": (2, 64, 8, 8),
        "block2": (2, 32, 16, 16),
        "block3": (2, 16, 32, 32),
        "attn1": (2, 16, 32, 32),
        "block4": (2, 8, 64, 64),
        "bn": (2, 8, 64, 64),
        "last": (2, 3, 64, 64),
    }
    assert shapes_of(D, torch.randn(2, 3, 64, 64)) == {
        "block1": (2, 8, 32, 32),
        "attn1": (2, 8, 32, 32),
        "block2": (2, 16, 16, 16),
        "block3": (2, 32, 8, 8),
        "block4": (2, 64, 4, 4),
        "block5": (2, 128, 4, 4),
        "linear": (2, 1),
    }


def test_shape_tables_at_128():
    G, D = make(128)
    assert shapes_of(G, torch.randn(2, 16)) == {
        "linear": (2, 16 * 8 * 4 * 4),
        "block1": (2, 128, 8, 8),
        "block2": (2, 64, 16, 16),
        "block3": (2, 32, 32, 32),
        "attn1": (2, 32, 32, 32),
        "block4": (2, 16, 64, 64),
        "block5": (2, 8, 128, 128),
        "bn": (2, 8, 128, 128),
        "last": (2, 3, 128, 128),
    }
    assert shapes_of(D, torch.randn(2, 3, 128, 128)) == {
        "block1": (2, 8, 64, 64),
        "block2": (2, 16, 32, 32),
        "attn1": (2, 16, 32, 32),
        "block3": (2, 32, 16, 16),
        "block4": (2, 64, 8, 8),
        "block5": (2, 128, 4, 4),
        "block6": (2, 128, 4, 4),
        "linear": (2, 1),
    }


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("conv_dim", [8, 24])
@pytest.mark.parametrize("num_classes", [0, CLASSES])
def test_every_size_and_width_with_and_without_classes(size, conv_dim, num_classes):
    """Both networks are called in the same way, which is also the reference's without labels."""
    G, D = make(size, conv_dim, num_classes)
    labels = [torch.tensor([0, CLASSES - 1])] if num_classes else []
    images, g_map = G(torch.randn(2, 16), *labels, return_attention=True)
    logits, d_map = D(images, *labels, return_attention=True)
    assert images.shape == (2, 3, size, size) and images.abs().max() <= 1
    assert g_map.shape == d_map.shape == (2, 1024, 256)
    assert logits.shape == (2,)
    assert D(images[:1], *(label[:1] for label in labels)).shape == (1,)


def test_the_last_block_at_128_adds_its_input_itself():
    _, D = make(128)
    assert not any(key.startswith("block6.shortcut") for key in D.state_dict())
    block, x = D.block6.eval(), torch.randn(2, 128, 4, 4)
    torch.testing.assert_close(block(x), x + block.conv2(F.relu(block.conv1(F.relu(x)))))


@pytest.mark.parametrize("arguments", [dict(image_size=32), dict(image_size=256), dict(conv_dim=12), dict(conv_dim=0)])
def test_unsupported_sizes_and_widths_are_rejected(arguments):
    for network in (Generator, Discriminator):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            network(**arguments)


def test_weights_are_xavier_uniform_and_biases_0():
    for network in make(num_classes=CLASSES):
        for name, layer in network.named_modules():
            if isinstance(layer, SpectralNorm):
                weight = layer.module.weight_bar.detach()
                fan_sum = (weight.shape[0] + weight.shape[1]) * weight[0, 0].numel()
                bound = (6 / fan_sum) ** 0.5
                assert weight.abs().max() <= bound, name
                assert weight.numel() < 1000 or weight.std() == pytest.approx(bound / 3**0.5, rel=0.1), name
                bias = getattr(layer.module, "bias", None)
                assert bias is None or not bias.any(), name


def upsampled_conv(x, weight, bias):
    return F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=1)


def pooled_conv(x, weight, bias):
    return F.avg_pool2d(F.conv2d(x, weight, bias, padding=1), 2)


def test_an_upsampled_convolution_as_a_transposed_one():
    layer, x = UpsampledConv2d(5, 7, 3, padding=1), torch.randn(2, 5, 6, 8)
    assert type(layer.as_conv_transpose()) is torch.nn.ConvTranspose2d
    torch.testing.assert_close(layer.as_conv_transpose()(x), layer(x))


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


# Attention


def formula(layer, x):
    """The layer's result and map, written out; with the weights that evaluation mode uses."""
    query, key, value, last = (
        (convolution.module.weight_bar / convolution.sigma())[:, :, 0, 0]
        for convolution in (layer.query_conv, layer.key_conv, layer.value_conv, layer.out_conv)
    )
    batch, _, height, width = x.shape
    projected = [torch.einsum("oc,bchw->bohw", weight, x) for weight in (query, key, value)]
    pooled = [p.reshape(batch, -1, height // 2, 2, width // 2, 2).amax((3, 5)).flatten(2) for p in projected[1:]]
    attention = torch.softmax(torch.einsum("bci,bcj->bij", projected[0].flatten(2), pooled[0]), dim=2)
    out = torch.einsum("oc,bcj,bij->boi", last, pooled[1], attention).reshape(x.shape)
    return layer.gamma * out + x, attention


def make_attention():
    torch.manual_seed(0)
    layer, x = PooledAttention(16), torch.randn(2, 16, 4, 6)
    torch.nn.init.constant_(layer.gamma, 0.3)
    for _ in range(20):  # until sigma converges
        layer(x)
    return layer.eval(), x


def test_attention_equals_the_paper_s_formula():
    layer, x = make_attention()
    expected, expected_map = formula(layer, x)
    out, attention = layer(x, return_attention=True)
    torch.testing.assert_close(attention, expected_map)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(layer(x)[0], expected)


def test_attention_starts_as_the_identity():
    x = torch.randn(2, 16, 4, 4)
    assert torch.equal(PooledAttention(16)(x)[0], x)


def test_a_double_backward_through_the_map_equals_the_formula_s():
    layer, x = make_attention()
    mix = torch.rand(2, 1, 1, 1)
    results = []
    for function in (lambda x: formula(layer, x)[0], lambda x: layer(x, return_attention=True)[0]):
        penalty = gradient_penalty(lambda x, f=function: f(x).square().sum((1, 2, 3)), x, -x, mix)
        results.append(torch.autograd.grad(penalty, [*layer.parameters()]))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_gradient_penalty_of_the_discriminator():
    """Through the map; the fast path says that it has no double backward."""
    _, D = make()
    real, fake, mix = torch.randn(2, 3, 64, 64), torch.randn(2, 3, 64, 64), torch.rand(2, 1, 1, 1)
    gradient_penalty(lambda x: D(x, return_attention=True)[0], real, fake, mix).backward()
    assert all(parameter.grad.isfinite().all() for name, parameter in D.named_parameters() if "bias" not in name)
    assert D.attn1.query_conv.module.weight_bar.grad.any()
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient_penalty(D, real, fake, mix).backward()


@pytest.mark.parametrize("index", [0, 1])
def test_the_fast_path_equals_the_explicit_one_in_values_and_gradients(index):
    network = make()[index].double()
    x = torch.randn(2, 16) if index == 0 else torch.randn(2, 3, 64, 64)
    before = copy.deepcopy(network.state_dict())
    results = []
    for return_attention in (True, False):
        network.load_state_dict(before)
        network.zero_grad()
        out = network(x.double(), return_attention=return_attention)
        out = out[0] if return_attention else out
        (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
        results.append([out.detach(), *(parameter.grad for parameter in network.parameters())])
    for expected, actual in zip(*results, strict=True):
        assert (actual - expected).abs().max() <= 1e-6 + 1e-5 * expected.abs().max()


def test_logged_scalars_name_the_attention_layer_and_every_spectral_norm():
    G, _ = make(gamma=0.25)
    G(torch.randn(2, 16))
    values = gammas_and_sigmas("G", G)
    normed = {name for name, layer in G.named_modules() if isinstance(layer, SpectralNorm)}
    assert set(values) == {"gamma/G_attn1"} | {f"sigma/G_{name}" for name in normed}
    assert {"linear", "block1.conv1", "block4.shortcut", "attn1.out_conv", "last"} < normed
    assert values["gamma/G_attn1"].item() == 0.25
    assert values["sigma/G_block2.conv1"].item() == pytest.approx(G.block2.conv1.sigma().item())


# Precision, memory format, modes


def test_bf16_stays_near_fp32():
    G, D = make_settled()
    z = torch.randn(4, 16)
    images = G(z)
    logits = D(images)
    # Some 40 roundings one after the other, whose errors, each up to the unit roundoff, add up like random numbers.
    limit = 40**0.5 * 2**-8
    with torch.autocast("cpu", torch.bfloat16):
        again = G(z).float()
        assert relative_error(again, images) < limit and relative_error(D(images).float(), logits) < limit
    scale = (again * images).sum() / images.square().sum()
    assert scale.item() == pytest.approx(1, abs=2**-7)  # roundings have no bias


def test_feature_maps_stay_in_bf16():
    """Parameters in fp32 that are not of a convolution, such as gamma, would make them fp32."""
    types = {}
    G, D = make(num_classes=CLASSES)
    for layer in (*G.modules(), *D.modules()):
        if isinstance(layer, (ConditionalBatchNorm2d, PooledAttention)):
            layer.register_forward_hook(
                lambda layer, _, out: types.update({layer: (out[0] if isinstance(out, tuple) else out).dtype})
            )
    labels = torch.tensor([0, 1])
    with torch.autocast("cpu", torch.bfloat16):
        D(G(torch.randn(2, 16), labels), labels)
    assert len(types) == 4 * 2 + 2
    assert set(types.values()) == {torch.bfloat16}


def test_channels_last_changes_nothing_but_the_memory_format():
    G, D = make_settled()
    z = torch.randn(2, 16)
    images = G(z)
    logits = D(images)
    for network in (G, D):
        network.to(memory_format=torch.channels_last)
    again = G(z)
    assert again.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(again, images, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(D(again), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_classes", [0, CLASSES])
def test_evaluation_changes_no_buffer_and_training_changes_all(num_classes):
    labels = [torch.tensor([1, 2])] if num_classes else []
    networks = make(num_classes=num_classes)
    for network, x in zip(networks, (torch.randn(2, 16), torch.randn(2, 3, 64, 64)), strict=True):
        before = copy.deepcopy(dict(network.named_buffers()))
        network.eval()(x, *labels)
        assert all(torch.equal(before[name], buffer) for name, buffer in network.named_buffers())
        network.train()(x, *labels)
        same = {name for name, buffer in network.named_buffers() if torch.equal(before[name], buffer)}
        assert all(before[name].numel() == 1 for name in same)  # u of a single row is 1 or -1


# Classes


def test_a_conditional_generator_starts_as_the_unconditional_one():
    """Gain 1 and shift 0 for every class: the same images, whatever the labels."""
    plain, _ = make_settled()
    conditional, _ = make(num_classes=CLASSES)
    state = {re.sub(r"(bn[12])\.([rn])", r"\1.norm.\2", key): value for key, value in plain.state_dict().items()}
    missing, unexpected = conditional.load_state_dict(state, strict=False)
    assert {re.sub(r".*\.bn[12]\.", "", key) for key in missing} == {"gain.weight", "shift.weight"}
    assert {re.sub(r".*\.bn[12]\.", "", key) for key in unexpected} == {"weight", "bias"}
    z, labels = torch.randn(3, 16), torch.tensor([0, 4, 2])
    for mode in (False, True):
        torch.testing.assert_close(conditional.train(mode)(z, labels), plain.train(mode)(z))


def test_gain_and_shift_of_a_class_scale_and_shift_its_images():
    layer = ConditionalBatchNorm2d(6, CLASSES)
    torch.nn.init.normal_(layer.gain.weight)
    torch.nn.init.normal_(layer.shift.weight)
    x, labels = torch.randn(4, 6, 5, 5), torch.tensor([3, 0, 0, 1])
    normalized = F.batch_norm(x, None, None, training=True)
    for index, label in enumerate(labels):
        expected = (
            layer.gain.weight[label, :, None, None] * normalized[index] + layer.shift.weight[label, :, None, None]
        )
        torch.testing.assert_close(layer(x, labels)[index], expected)


def test_weights_of_classes_average_their_scales_and_shifts():
    """One-hot weights are labels."""
    layer = ConditionalBatchNorm2d(6, 5).eval()
    for table in (layer.gain, layer.shift):
        torch.nn.init.normal_(table.weight)
    x, labels = torch.randn(4, 6, 5, 5), torch.tensor([3, 0, 0, 1])
    one_hot = F.one_hot(labels, 5).float()
    torch.testing.assert_close(layer(x, one_hot), layer(x, labels))
    between = (one_hot + one_hot.flip(0)) / 2
    torch.testing.assert_close(layer(x, between), (layer(x, labels) + layer(x, labels.flip(0))) / 2)


def test_labels_change_images_and_logits():
    G, D = make_settled(CLASSES)
    for name, parameter in G.named_parameters():
        if ".gain." in name:
            torch.nn.init.normal_(parameter)
    z, labels = torch.randn(2, 16), torch.tensor([0, 1])
    images = G(z, labels)
    other = G(z, torch.tensor([0, 2]))
    torch.testing.assert_close(other[0], images[0])
    assert relative_error(other[1], images[1]) > 0.01
    logits, other = D(images, labels), D(images, torch.tensor([0, 2]))
    torch.testing.assert_close(other[0], logits[0])
    assert not torch.isclose(other[1], logits[1])


def test_every_embedding_learns_of_the_given_classes_alone():
    G, D = make(num_classes=CLASSES)
    labels = torch.tensor([3, 1])
    D(G(torch.randn(2, 16), labels), labels).sum().backward()
    tables = [layer.weight for layer in G.modules() if isinstance(layer, torch.nn.Embedding)]
    assert len(tables) == 2 * 2 * G.num_blocks
    for table in tables:
        assert table.grad.abs().sum(1).nonzero().flatten().tolist() == [1, 3]


def test_the_projection_is_the_inner_product_of_features_and_the_class_s_embedding():
    _, D = make_settled(CLASSES)
    features = []
    D.linear.register_forward_hook(lambda _, inputs, out: features.extend((inputs[0], out[:, 0])))
    labels = torch.tensor([4, 0, 4])
    logits = D(torch.randn(3, 3, 64, 64), labels)
    h, unconditional = features
    embedding = D.embedding.module.weight_bar / D.embedding.sigma()
    torch.testing.assert_close(logits, unconditional + (embedding[labels] * h).sum(1))


def test_labels_are_needed_by_conditional_networks_only():
    z, images, labels = torch.randn(2, 16), torch.randn(2, 3, 64, 64), torch.tensor([0, 1])
    for network, x in zip(make(), (z, images), strict=True):
        with pytest.raises(ValueError, match="labels"):
            network(x, labels)
    for network, x in zip(make(num_classes=CLASSES), (z, images), strict=True):
        with pytest.raises(ValueError, match="labels"):
            network(x)


def test_batch_norm_over_ranks_keeps_conditional_layers(monkeypatch):
    """Of one rank here: the result is that of the layers which were replaced."""
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: None)
    G, _ = make(num_classes=CLASSES)
    synced = replace_layers(copy.deepcopy(G), nn.BatchNorm2d, CpuSyncBatchNorm2d.copy_of)
    assert synced.state_dict().keys() == G.state_dict().keys()
    assert isinstance(synced.block1.bn1.norm, CpuSyncBatchNorm2d) and isinstance(synced.bn, CpuSyncBatchNorm2d)
    z, labels = torch.randn(3, 16), torch.tensor([0, 4, 2])
    torch.testing.assert_close(synced(z, labels), G(z, labels), rtol=1e-4, atol=1e-5)
    for key, value in G.state_dict().items():
        torch.testing.assert_close(synced.state_dict()[key], value, rtol=1e-4, atol=1e-5)
