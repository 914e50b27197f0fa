import pytest
import torch

from training import checkpoint
from training.checkpoint import Checkpoint
from training.models import MODELS, network_options
from visuals.attention_stats import collect_attention

SIZES = dict(imsize=64, z_dim=16, g_conv_dim=16, d_conv_dim=8, conditional=False, attention="full")


@pytest.mark.parametrize("imsize", [64, 128])
@pytest.mark.parametrize("name", MODELS)
def test_weights_tell_model_and_sizes(name, imsize):
    G, D = MODELS[name].make_G(imsize, 16, 16), MODELS[name].make_D(imsize, 8)
    saved = Checkpoint(5, G.state_dict(), D.state_dict(), None)
    expected = {"model": name, **SIZES, "imsize": imsize}
    assert checkpoint.saved_architecture(saved) == expected
    alone = Checkpoint(5, G.state_dict(), None, None)
    assert checkpoint.saved_architecture(alone) == {key: expected[key] for key in expected if key != "d_conv_dim"}


@pytest.mark.parametrize("name", MODELS)
def test_both_models_are_called_in_the_same_way(name):
    G, D = MODELS[name].make_G(64, 16, 8).eval(), MODELS[name].make_D(64, 8).eval()
    z = torch.randn(2, 16)
    with torch.no_grad():
        generated, real = collect_attention(G, D, (z,), (torch.rand(3, 3, 64, 64),))
        assert G(z).shape == (2, 3, 64, 64) and D(G(z)).shape == (2,)
    for maps in (*generated.maps.values(), *real.maps.values()):
        torch.testing.assert_close(maps.sum(-1), torch.ones(maps.shape[:2]))


@pytest.mark.parametrize("name", MODELS)
def test_networks_without_attention_are_the_others_without_these_layers(name):
    makers = ((MODELS[name].make_G, (64, 16, 8), torch.randn(2, 16)),
              (MODELS[name].make_D, (64, 8), torch.rand(2, 3, 64, 64)))  # fmt: skip
    states = []
    for make, sizes, x in makers:
        full, none = make(*sizes).eval(), make(*sizes, has_attention=False).eval()
        rest = {key: value for key, value in full.state_dict().items() if not key.startswith("attn")}
        assert len(rest) < len(full.state_dict())
        none.load_state_dict(rest)  # no other keys
        with torch.no_grad():
            (out,) = none(x, return_attention=True)
            torch.testing.assert_close(out, full(x))  # gamma is 0
        states.append(none.state_dict())
    saved = checkpoint.saved_architecture(Checkpoint(5, *states, None))
    assert saved == SIZES | {"model": name, "attention": "none", "g_conv_dim": 8}


@pytest.mark.parametrize("num_classes", [0, 3])
def test_weights_of_each_network_alone_tell_its_sizes(num_classes):
    for name in MODELS if not num_classes else ["paper"]:
        for imsize in (64, 128):
            options = network_options(num_classes)
            G, D = MODELS[name].make_G(imsize, 16, 24, **options), MODELS[name].make_D(imsize, 8, **options)
            sizes = {"imsize": imsize, "num_classes": num_classes, "has_attention": True}
            assert MODELS[name].G_sizes(G.state_dict()) == sizes | {"z_dim": 16, "g_conv_dim": 24}
            assert MODELS[name].D_sizes(D.state_dict()) == sizes | {"d_conv_dim": 8}
