"""Networks of files: which network, by whatever file, and what a wrong one is told."""

import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from conftest import generator_inputs, random_generator, write_export

from exporting.loading import load_discriminator, load_generator
from training.models import MODELS

NETWORKS = [("sagan", 32, 0, "full"), ("sagan", 64, 0, "none"), ("paper", 64, 0, "full"), ("paper", 64, 3, "full")]


def networks(model, imsize, num_classes, attention):
    options = {"num_classes": num_classes, "has_attention": attention == "full"}
    D = MODELS[model].Discriminator(imsize, 16, **options).eval()
    return random_generator(model, imsize, num_classes, attention), D


def assert_same(ours, theirs):
    assert type(ours) is type(theirs) and not theirs.training
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert {key: value.dtype for key, value in ours.items()} == {key: value.dtype for key, value in theirs.items()}


@pytest.mark.parametrize("network", NETWORKS)
def test_weights_alone_tell_the_network(tmp_path, network):
    """Those of this program and of the reference; with the prefix of its --parallel; in half precision."""
    G, D = networks(*network)
    path = tmp_path / "5_G.pth"
    for ours, load, other in ((G, load_generator, load_discriminator), (D, load_discriminator, load_generator)):
        torch.save(ours.state_dict(), path)
        state = torch.get_rng_state()
        assert_same(ours, load(path))
        assert torch.equal(state, torch.get_rng_state())
        with pytest.raises(ValueError, match=r"^.*5_G\.pth has no (generator|discriminator) of this program[^\n]*$"):
            other(path)
        torch.save({f"module.{key}": value for key, value in ours.state_dict().items()}, path)
        assert_same(ours, load(str(path)))
        torch.save(ours.half().state_dict(), path)
        assert_same(ours.float(), load(path))


def test_a_state_file_has_the_ema_generator_and_the_discriminator(tmp_path):
    G, D = networks(*NETWORKS[0])
    ema = random_generator("sagan", 32)
    torch.nn.init.normal_(ema.last[0].weight)
    path = tmp_path / "5_state.pth"
    torch.save({"G": G.state_dict(), "D": D.state_dict(), "ema": ema.state_dict(), "step": 5, "config": {}}, path)
    assert_same(ema, load_generator(path))
    assert_same(D, load_discriminator(path))


def test_an_export_has_no_discriminator(tmp_path):
    write_export(tmp_path / "g.safetensors", *NETWORKS[0])
    with pytest.raises(ValueError, match="has no discriminator"):
        load_discriminator(tmp_path / "g.safetensors")


class Code:
    def __reduce__(self):
        return pytest.fail, ("code in a file was run",)


@pytest.mark.parametrize("content", [{}, {"a": 1}, {1: 2}, {"ema": []}, {"ema": 3}, {"l1.0.module.weight_bar": 3}, [1],
                                     {"ema": Code()}])  # fmt: skip
def test_foreign_files_are_one_line(tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"^[^\n]*other\.pth[^\n]*$"):
        load_generator(tmp_path / "other.pth")


def test_a_url_is_downloaded_once(tmp_path, monkeypatch, capfd):
    """Exports of other runs have the same name; a hub may add a query."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    requests, networks = [], {"a": NETWORKS[0], "b": NETWORKS[3]}
    for name in networks:
        (tmp_path / name).mkdir()
    exported = {name: write_export(tmp_path / name / "generator.safetensors", *networks[name]) for name in networks}

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            requests.append(self.path)

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=tmp_path)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        for name, query in [("a", ""), ("b", "?download=true")] * 2:
            inputs = generator_inputs(2, networks[name][2])
            loaded = load_generator(f"{url}/{name}/generator.safetensors{query}")
            with torch.no_grad():
                torch.testing.assert_close(loaded(*inputs), exported[name](*inputs), rtol=0, atol=1e-6)
        assert len(requests) == 2
        with pytest.raises(ValueError, match=rf"^{url}/none\.pth cannot be downloaded: .*404"):
            load_generator(f"{url}/none.pth")
        server.shutdown()
