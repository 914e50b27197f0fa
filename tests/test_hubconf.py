"""hubconf.py as torch.hub uses it: from another folder, in a program with modules of its own."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import write_export

from networks import paper_models
from sagan_models import Discriminator, Generator

ROOT = Path(__file__).parent.parent
OTHERS = ("utils", "datasets", "training", "networks", "spectral", "sagan_models", "exporting")
PROGRAM = """
import copy, io, sys, torch
import utils, datasets, training, networks  # of this program, not of the repository
sys.modules["PIL"] = sys.modules["torchvision"] = sys.modules["matplotlib"] = None  # as if not installed

root, export, checkpoint, others = sys.argv[1:]
G = torch.hub.load(root, "generator", source="local", checkpoint=export)
assert G(torch.randn(2, 16)).shape == (2, 3, 32, 32) and not G.training
assert torch.hub.load(root, "generator", source="local", checkpoint=checkpoint)(torch.randn(1, 16)).shape[0] == 1
D = torch.hub.load(root, "discriminator", source="local", image_size=32, conv_dim=8)
assert D(torch.rand(2, 3, 32, 32)).shape == (2,)
for network in (G, D):
    torch.save(network, file := io.BytesIO())
    file.seek(0)
    for other in (torch.load(file, weights_only=False), copy.deepcopy(network)):
        assert type(other) is type(network)
assert sys.modules.get("utils") is utils and sys.modules.get("networks") is networks
for name in others.split():  # those imported before, and those imported now
    assert __import__(name).__file__ == utils.__file__.replace("utils", name), name
torch.hub._get_cache_or_reload = lambda *_, **__: root  # instead of GitHub, which these two need
print(torch.hub.list("owner/name"), torch.hub.help("owner/name", "generator"))
"""
load = partial(torch.hub.load, str(ROOT), source="local")


def test_in_a_program_with_modules_of_the_same_names(tmp_path):
    G = write_export(tmp_path / "generator.safetensors", "sagan", 32)
    torch.save(G.state_dict(), tmp_path / "5_G.pth")
    for name in OTHERS:
        (tmp_path / f"{name}.py").touch()
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "program.py", str(ROOT), "generator.safetensors", "5_G.pth", " ".join(OTHERS)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("['discriminator', 'generator']") and "checkpoint: path or URL" in done.stdout


PAPER = {"network": "paper", "num_classes": 3}


@pytest.mark.parametrize("part, options, make", [
    ("generator", {}, Generator), ("generator", PAPER, partial(paper_models.Generator, num_classes=3)),
    ("discriminator", {}, Discriminator), ("discriminator", PAPER, partial(paper_models.Discriminator, num_classes=3)),
])  # fmt: skip
def test_random_weights_are_the_constructor_s_with_the_sigma_of_evaluation(part, options, make):
    """With a random sigma, all pixels are black or white."""
    torch.manual_seed(0)
    expected = {key: value for key, value in make().state_dict().items() if not key.endswith(("_u", "_v"))}
    torch.manual_seed(0)
    network = load(part, **options)
    assert not network.training
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in expected.items())
    for layer in (layer for layer in network.modules() if hasattr(layer, "sigma")):
        true = torch.linalg.matrix_norm(layer.module.weight_bar.flatten(1), 2)
        assert 0.9 * true < layer.sigma() < 1.001 * true


@pytest.mark.parametrize("part", ["generator", "discriminator"])
@pytest.mark.parametrize("values", [{"network": "other"}, {"image_size": 48}, {"num_classes": 3}, {"conv_dim": 7}])
def test_values_that_are_not_allowed(part, values):
    with pytest.raises(ValueError, match="must be"):
        load(part, **values)
