"""hubconf.py as torch.hub uses it: from another folder, in a program with modules of its own."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT, write_export

from training.models import MODELS

OTHERS = ("utils", "datasets", "training", "networks", "spectral", "sagan_models", "exporting")
PROGRAM = """
import functools, io, sys, torch
import utils, datasets, training, networks  # of this program, not of the repository
sys.modules["PIL"] = sys.modules["torchvision"] = sys.modules["matplotlib"] = None  # as if not installed

root, others = sys.argv[1:]
load = functools.partial(torch.hub.load, root, source="local")
G = load("generator", checkpoint="generator.safetensors")
assert G(torch.randn(2, 16)).shape == (2, 3, 32, 32)
D = load("discriminator", image_size=32, conv_dim=8)
assert D(torch.rand(2, 3, 32, 32)).shape == (2,)
for network in (G, D):
    torch.save(network, file := io.BytesIO())
    file.seek(0)
    assert type(torch.load(file, weights_only=False)) is type(network)
for name in others.split():  # those imported before, and those imported now
    assert __import__(name).__file__ == utils.__file__.replace("utils", name), name
"""


def test_in_a_program_with_modules_of_the_same_names(tmp_path):
    write_export(tmp_path / "generator.safetensors", "sagan", 32)
    for name in OTHERS:
        (tmp_path / f"{name}.py").touch()
    command = [sys.executable, "-c", PROGRAM, str(ROOT), " ".join(OTHERS)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("part", ["generator", "discriminator"])
@pytest.mark.parametrize("network, options", [("sagan", {}), ("paper", dict(conv_dim=16, num_classes=3))])
def test_random_weights_are_the_constructor_s_with_the_sigma_of_evaluation(part, network, options):
    torch.manual_seed(0)
    expected = getattr(MODELS[network], part.capitalize())(**options).state_dict()
    torch.manual_seed(0)
    loaded = torch.hub.load(str(ROOT), part, source="local", network=network, **options)
    assert not loaded.training
    assert all(torch.equal(loaded.state_dict()[key], expected[key]) for key in expected if key[-2:] not in ("_u", "_v"))
    for layer in (layer for layer in loaded.modules() if hasattr(layer, "sigma")):
        true = torch.linalg.matrix_norm(layer.module.weight_bar.flatten(1), 2)
        assert 0.9 * true < layer.sigma() < 1.001 * true
    with pytest.raises(ValueError, match="must be one of sagan, paper, got other"):
        torch.hub.load(str(ROOT), part, source="local", network="other")
