import struct

import pytest
import torch
from conftest import generator_inputs, write_export

from exporting.safetensors_file import read_generator
from spectral import SpectralNorm

NETWORKS = [("sagan", 32, 0, "full"), ("sagan", 64, 0, "none"), ("paper", 64, 0, "full"), ("paper", 64, 3, "full")]


@pytest.mark.parametrize("network", NETWORKS)
def test_the_file_alone_gives_the_generator(tmp_path, network):
    """Once and for all: without random numbers, and though the file is replaced while the generator is in use."""
    path = tmp_path / "G.safetensors"
    G = write_export(path, *network)
    state = torch.get_rng_state()
    read = read_generator(str(path))
    path.write_bytes(b"")
    assert torch.equal(state, torch.get_rng_state())
    assert not read.training and not any(isinstance(layer, SpectralNorm) for layer in read.modules())
    inputs = generator_inputs(5, network[2])
    with torch.no_grad():
        outputs = zip(G(*inputs, return_attention=True), read(*inputs, return_attention=True), strict=True)
    for expected, actual in outputs:
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("changes", [
    {"content": "other"}, {"content_version": "2"}, {"model": "other"}, {"image_size": "48"}, {"image_size": "64"},
    {"conv_dim": "x"}, {"num_classes": "3"}, {"attention": "none"}, {"conv_dim": "8000000"},
])  # fmt: skip
def test_metadata_that_does_not_fit_is_one_line(tmp_path, changes):
    write_export(tmp_path / "G.safetensors", "sagan", 32, **changes)
    with pytest.raises(ValueError, match=r"^.*G\.safetensors is .* not an export of this program: .*$"):
        read_generator(tmp_path / "G.safetensors")


def test_damaged_and_foreign_files_are_one_line(tmp_path):
    path = tmp_path / "G.safetensors"
    write_export(path, "sagan", 32)
    content = path.read_bytes()
    torch.save({"a": torch.zeros(2)}, tmp_path / "pickle")
    for damaged in (content[:-10], content[:100], b"", struct.pack("<Q", 2**60), (tmp_path / "pickle").read_bytes()):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"^.*damaged or not an export.*$"):
            read_generator(path)
    with pytest.raises(ValueError, match="No such file"):
        read_generator(tmp_path / "none.safetensors")
