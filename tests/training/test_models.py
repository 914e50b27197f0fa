import pytest
import torch

from training.models import MODELS, build_empty, checksum, recognize


def build(name, imsize, **options):
    networks = MODELS[name].Generator(imsize, 16, 24, **options), MODELS[name].Discriminator(imsize, 8, **options)
    return dict(zip(("generator", "discriminator"), networks, strict=True))


@pytest.mark.parametrize("has_attention", [True, False])
@pytest.mark.parametrize("name, imsize, num_classes", [
    ("sagan", 64, 0), ("sagan", 128, 0), ("paper", 32, 3), ("paper", 64, 0), ("paper", 128, 3),
])  # fmt: skip
def test_weights_tell_the_network_that_they_load_into(name, imsize, num_classes, has_attention):
    options = {"num_classes": num_classes, "has_attention": has_attention}
    own = {"generator": {"z_dim": 16, "conv_dim": 24}, "discriminator": {"conv_dim": 8}}
    networks = build(name, imsize, **options)
    for (kind, network), other in zip(networks.items(), reversed(networks.values()), strict=True):
        weights = network.state_dict()
        assert recognize(kind, weights) == (name, {"image_size": imsize, **options, **own[kind]})
        empty = build_empty(kind, *recognize(kind, weights))
        assert all(parameter.is_meta for parameter in empty.parameters())
        empty.load_state_dict(weights, assign=True)
        assert checksum(empty.state_dict()) == checksum(weights) != checksum(other.state_dict())


@pytest.mark.parametrize("name", MODELS)
def test_networks_without_attention_are_the_others_without_these_layers(name):
    inputs = {"generator": torch.randn(2, 16), "discriminator": torch.rand(2, 3, 64, 64)}
    full, none = build(name, 64), build(name, 64, has_attention=False)
    for kind, x in inputs.items():
        weights = full[kind].state_dict()
        none[kind].load_state_dict({key: weights[key] for key in weights if not key.startswith("attn")})
        with torch.no_grad():
            (out,) = none[kind].eval()(x, return_attention=True)
            torch.testing.assert_close(out, full[kind].eval()(x))  # gamma is 0
