"""hubconf.py as torch.hub uses it: from another folder, in a program with modules of its own."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import write_export

import hubconf
from networks import paper_models
from sagan_models import Discriminator, Generator

ROOT = Path(__file__).parent.parent
PROGRAM = """
import sys, torch
import utils, errors, parameter, trainer  # of this program, not of the repository

root, export, checkpoint = sys.argv[1:]
G = torch.hub.load(root, "generator", source="local", checkpoint=export)
assert G(torch.randn(2, 16)).shape == (2, 3, 32, 32) and not G.training
assert torch.hub.load(root, "generator", source="local", checkpoint=checkpoint)(torch.randn(1, 16)).shape[0] == 1
D = torch.hub.load(root, "discriminator", source="local", image_size=32, conv_dim=8)
assert D(torch.rand(2, 3, 32, 32)).shape == (2,)
assert {utils.__file__, errors.__file__} == {utils.__file__.replace("utils", name) for name in ("utils", "errors")}
torch.hub._get_cache_or_reload = lambda *_, **__: root  # instead of GitHub, which these two need
print(torch.hub.list("owner/name"), torch.hub.help("owner/name", "generator"))
"""


def test_from_another_program(tmp_path):
    G = write_export(tmp_path / "generator.safetensors", "sagan", 32)
    torch.save(G.state_dict(), tmp_path / "5_G.pth")
    for name in ("utils", "errors", "parameter", "trainer"):
        (tmp_path / f"{name}.py").touch()
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "program.py", str(ROOT), "generator.safetensors", "5_G.pth"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("['discriminator', 'generator']")
    assert "checkpoint: path or http(s) URL" in done.stdout


def test_random_weights_are_those_of_the_constructors():
    for ours, theirs in ((hubconf.generator, Generator), (hubconf.discriminator, Discriminator)):
        torch.manual_seed(0)
        expected = theirs().state_dict()
        torch.manual_seed(0)
        network = ours()
        assert not network.training
        assert all(torch.equal(expected[key], value) for key, value in network.state_dict().items())
    G = hubconf.generator(model="paper", image_size=128, z_dim=16, conv_dim=8, num_classes=3)
    assert isinstance(G, paper_models.Generator) and G.num_classes == 3
    D = hubconf.discriminator(model="paper", conv_dim=8, num_classes=3)
    assert D(torch.rand(2, 3, 64, 64), torch.tensor([0, 2])).shape == (2,)


def test_values_that_are_not_allowed():
    for entry in (hubconf.generator, hubconf.discriminator):
        for values in ({"model": "other"}, {"image_size": 48}, {"num_classes": 3}, {"model": "paper", "conv_dim": 7}):
            with pytest.raises(ValueError, match="must be"):
                entry(**values)


def test_the_entry_points_and_their_needs():
    names = {name for name in vars(hubconf) if callable(getattr(hubconf, name)) and name[0] != "_"}
    assert names == {"generator", "discriminator"}
    assert hubconf.dependencies == ["torch"]
