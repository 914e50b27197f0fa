from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import shapes_of
from recorded import assert_as_recorded, fill_as_oracle, oracle_inputs, replay

from sagan_models import Discriminator, Generator, SelfAttention, gammas_and_sigmas

# A bias before BatchNorm and a bias of the keys have no effect.
WITHOUT_GRADIENT = r"G_grad\w+/l\d\.0\.module\.bias|\w_grad\w+/attn\d\.key_conv\.bias"
ROWS = {"g_attn1": 17, "g_attn2": 333, "d_attn1": 5, "d_attn2": 3}  # of the recorded maps


@pytest.fixture(scope="session")
def oracle() -> dict[str, np.ndarray]:
    """Numbers recorded from the reference implementation at imsize 64, batch 4, float32 on a CPU."""
    with np.load(Path(__file__).parent / "reference_64.npz") as file:
        return dict(file)


def test_every_recorded_number_agrees_with_the_reference(oracle):
    """In fp64, as those of the paper's networks, so that the result is the same on every processor."""
    G, D = (fill_as_oracle(network(), "public").double() for network in (Generator, Discriminator))
    ours = replay(G, D, *(x.double() for x in oracle_inputs("public")), ROWS)
    recorded = {key: ours[key] for key in oracle if not key.endswith("_keys")}
    assert len(recorded) == 136
    assert_as_recorded(recorded, oracle, WITHOUT_GRADIENT)


@pytest.mark.parametrize("network, prefix, parameters", [(Generator, "G", 3_832_885), (Discriminator, "D", 3_175_299)])
def test_keys_shapes_and_parameter_counts_are_the_reference_s(oracle, network, prefix, parameters):
    network = network()
    ours = {f"{key} {tuple(value.shape)}" for key, value in network.state_dict().items()}
    assert ours == set(oracle[f"{prefix}_keys"])
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters


def test_checkpoints_without_batch_norm_counters_load():
    """The reference was trained with torch 0.3, whose BatchNorm had no `num_batches_tracked`."""
    G = Generator(32, 16, 8)
    saved = {key: value + 1 for key, value in G.state_dict().items() if "num_batches_tracked" not in key}
    G.load_state_dict(saved)
    assert all(torch.equal(G.state_dict()[key], value) for key, value in saved.items())


def test_shape_table_of_the_generator():
    assert shapes_of(Generator(), torch.randn(2, 128)) == {
        "l1": (2, 512, 4, 4),
        "l2": (2, 256, 8, 8),
        "l3": (2, 128, 16, 16),
        "attn1": (2, 128, 16, 16),
        "l4": (2, 64, 32, 32),
        "attn2": (2, 64, 32, 32),
        "last": (2, 3, 64, 64),
    }


def test_shape_table_of_the_discriminator():
    assert shapes_of(Discriminator(), torch.randn(2, 3, 64, 64)) == {
        "l1": (2, 64, 32, 32),
        "l2": (2, 128, 16, 16),
        "l3": (2, 256, 8, 8),
        "attn1": (2, 256, 8, 8),
        "l4": (2, 512, 4, 4),
        "attn2": (2, 512, 4, 4),
        "last": (2, 1, 1, 1),
    }


@pytest.mark.parametrize("size", [32, 64, 128, 256])
@pytest.mark.parametrize("conv_dim", [8, 24])
def test_every_size_and_width(size, conv_dim):
    G, D = Generator(size, 16, conv_dim), Discriminator(size, conv_dim)
    images, g1, g2 = G(torch.randn(2, 16), return_attention=True)
    logits, d1, d2 = D(images, return_attention=True)
    assert images.shape == (2, 3, size, size)
    assert logits.shape == (2,)
    assert [g1.shape[1], g2.shape[1]] == ([64, 256] if size == 32 else [256, 1024])
    assert [d1.shape[1], d2.shape[1]] == [64, 16]
    assert D(images[:1]).shape == (1,)


def test_maps_are_distributions_and_returning_them_does_not_change_the_images():
    torch.manual_seed(0)
    G = Generator(32, 16, 8).eval()
    torch.nn.init.constant_(G.attn1.gamma, 0.7)
    torch.nn.init.constant_(G.attn2.gamma, -0.7)
    z = torch.randn(3, 16)
    images, *maps = G(z, return_attention=True)
    torch.testing.assert_close(images, G(z))
    for attention in maps:
        assert (attention >= 0).all()
        torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:2]))


def test_attention_equals_the_paper_s_formula():
    torch.manual_seed(0)
    layer = SelfAttention(16)
    torch.nn.init.constant_(layer.gamma, 0.3)
    x = torch.randn(2, 16, 4, 5)
    query, key, value = (
        convolution(x).flatten(2) for convolution in (layer.query_conv, layer.key_conv, layer.value_conv)
    )
    attention = torch.softmax(torch.einsum("bci,bcj->bij", query, key), dim=2)
    expected = 0.3 * torch.einsum("bcj,bij->bci", value, attention).reshape(x.shape) + x
    out, given = layer(x, return_attention=True)
    torch.testing.assert_close(given, attention)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(layer(x)[0], expected)


def test_attention_starts_as_the_identity():
    x = torch.randn(2, 16, 4, 4)
    assert torch.equal(SelfAttention(16)(x)[0], x)


@pytest.mark.parametrize("arguments", [dict(image_size=48), dict(conv_dim=12), dict(conv_dim=0)])
def test_unsupported_sizes_and_widths_are_rejected(arguments):
    for network in (Generator, Discriminator):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            network(**arguments)


def test_two_forwards_of_d_use_a_sigma_each():
    """D(real) and D(fake) advance u and v once each, and the gradient of the first uses its own."""
    D = Discriminator(32, 8)
    before = D.l1[0].module.weight_u.clone()
    D(torch.randn(2, 3, 32, 32))
    middle = D.l1[0].module.weight_u.clone()
    D(torch.randn(2, 3, 32, 32))
    assert not torch.equal(before, middle) and not torch.equal(middle, D.l1[0].module.weight_u)


def test_logged_scalars_name_every_attention_layer_and_spectral_norm():
    G = Generator(32, 16, 8)
    torch.nn.init.constant_(G.attn2.gamma, 0.25)
    values = gammas_and_sigmas("G", G)
    assert set(values) == {"gamma/G_attn1", "gamma/G_attn2", "sigma/G_l1", "sigma/G_l2", "sigma/G_l3"}
    assert values["gamma/G_attn2"].item() == 0.25
    assert values["sigma/G_l2"].item() == pytest.approx(G.l2[0].sigma().item())
    assert all(value.ndim == 0 and not value.requires_grad for value in values.values())
