"""Networks of files: which network, by whatever file, and what a wrong one is told."""

import copy
import struct
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from conftest import generator_inputs, random_generator, write_export

from exporting.loading import load_discriminator, load_generator
from spectral import SUFFIXES
from training.models import MODELS, checksum

NETWORKS = [("sagan", 32, 0, "full"), ("sagan", 64, 0, "none"), ("paper", 64, 0, "full"), ("paper", 64, 3, "full"),
            ("paper", 32, 3, "none"), ("paper", 128, 0, "full")]  # fmt: skip


def assert_same(ours, theirs):
    assert type(ours) is type(theirs) and not theirs.training
    torch.testing.assert_close(theirs.state_dict(), ours.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("network", NETWORKS)
def test_weights_alone_tell_the_network(tmp_path, network):
    """Of this program and of the reference; with the prefix of its --parallel; in half precision; in a state file."""
    model, imsize, num_classes, attention = network
    G = random_generator(*network)
    D = MODELS[model].Discriminator(imsize, 16, num_classes=num_classes, has_attention=attention == "full").eval()
    path = tmp_path / "5_G.pth"
    assert checksum(G.state_dict()) != checksum(D.state_dict())
    for ours, load, other in ((G, load_generator, load_discriminator), (D, load_discriminator, load_generator)):
        torch.save(ours.state_dict(), path)
        assert_same(ours, load(path))
        with pytest.raises(ValueError, match=r"^.*5_G\.pth has no (generator|discriminator) of this program[^\n]*$"):
            other(path)
        torch.save({f"module.{key}": value for key, value in ours.state_dict().items()}, path)
        assert_same(ours, load(str(path)))
        torch.save({"G": {}, "D": D.state_dict(), "ema": G.state_dict(), "step": 5, "config": {}}, path)
        assert_same(ours, load(path))
        torch.save(copy.deepcopy(ours).half().state_dict(), path)
        assert_same(copy.deepcopy(ours).half().float(), load(path))


@pytest.mark.parametrize("network", NETWORKS)
def test_an_export_alone_gives_the_generator(tmp_path, network):
    """Whatever sizes its metadata has, without random numbers, and though the file is damaged while G is in use."""
    path = tmp_path / "G.safetensors"
    G = write_export(path, *network, image_size="48", conv_dim="8000000")
    state = torch.get_rng_state()
    read = load_generator(path)
    assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(ValueError, match="has no discriminator"):
        load_discriminator(path)
    content = path.read_bytes()
    for damaged in (content[:-10], content[:100], b"", struct.pack("<Q", 2**60)):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"^.*damaged or not an export.*$"):
            load_generator(path)
    assert not read.training and not any(key.endswith(SUFFIXES) for key in read.state_dict())
    inputs = generator_inputs(5, network[2])
    outputs = (network(*inputs, return_attention=True) for network in (read, G))
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("content", [{}, {"a": 1}, {1: 2}, {"ema": []}, {"ema": 3}, {"l1.0.module.weight_bar": 3}, [1]])
def test_foreign_files_are_one_line(tmp_path, content):
    for name in ("other.pth", "other.safetensors"):
        torch.save(content, tmp_path / name)
        with pytest.raises(ValueError, match=rf"^[^\n]*{name}[^\n]*$"):
            load_generator(tmp_path / name)


@pytest.mark.parametrize("changes", [{"content": "other"}, {"content_version": "2"}])
def test_other_content_is_one_line(tmp_path, changes):
    write_export(tmp_path / "G.safetensors", "sagan", 32, **changes)
    with pytest.raises(ValueError, match=r"^[^\n]*G\.safetensors is damaged or not an export of this program[^\n]*$"):
        load_generator(tmp_path / "G.safetensors")


def test_a_url_is_downloaded_once(tmp_path, monkeypatch):
    """Exports of other runs have the same name; a hub may add a query."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        for network in (NETWORKS[0], NETWORKS[3]):
            (tmp_path / network[0]).mkdir()
            write_export(path := tmp_path / network[0] / "generator.safetensors", *network)
            expected = load_generator(path)
            for _ in range(2):
                assert_same(expected, load_generator(f"{url}/{network[0]}/{path.name}?download=true"))
                path.unlink(missing_ok=True)
        with pytest.raises(ValueError, match=rf"^{url}/none\.pth cannot be downloaded: .*404"):
            load_generator(f"{url}/none.pth")
        server.shutdown()
