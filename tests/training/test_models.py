import pytest

from training.models import MODELS, checksum, recognize


@pytest.mark.parametrize("has_attention", [True, False])
@pytest.mark.parametrize("name, imsize, num_classes", [
    ("sagan", 64, 0), ("paper", 32, 3), ("paper", 64, 0), ("paper", 128, 3),
])  # fmt: skip
def test_weights_tell_the_network_that_they_load_into(name, imsize, num_classes, has_attention):
    options, sums = {"image_size": imsize, "num_classes": num_classes, "has_attention": has_attention}, set()
    for kind, own in (("generator", {"z_dim": 16, "conv_dim": 24}), ("discriminator", {"conv_dim": 8})):
        weights = getattr(MODELS[name], kind.capitalize())(**options, **own).state_dict()
        assert recognize(kind, weights) == (name, options | own)
        sums.add(checksum(weights))
    assert len(sums) == 2
