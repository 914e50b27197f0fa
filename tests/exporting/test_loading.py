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
    G = random_generator(model, imsize, num_classes, attention)
    options = {"num_classes": num_classes, "has_attention": attention == "full"}
    return G, MODELS[model].Discriminator(imsize, 16, **options).eval()


def assert_same(ours, theirs):
    assert type(ours) is type(theirs) and not theirs.training
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert {key: value.dtype for key, value in ours.items()} == {key: value.dtype for key, value in theirs.items()}


@pytest.mark.parametrize("network", NETWORKS)
def test_weights_alone_tell_the_network(tmp_path, network):
    """Those of this program and of the reference; with the prefix of its --parallel; in half precision."""
    G, D = networks(*network)
    for part, ours, load in (("G", G, load_generator), ("D", D, load_discriminator)):
        path = tmp_path / f"5_{part}.pth"
        torch.save(ours.state_dict(), path)
        state = torch.get_rng_state()
        assert_same(ours, load(path))
        assert torch.equal(state, torch.get_rng_state())
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
    torch.save({"ema": ema.state_dict(), "step": 5, "config": {}}, path)  # of an older version
    assert_same(ema, load_generator(path))
    with pytest.raises(ValueError, match="no discriminator"):
        load_discriminator(path)
    torch.save(D.state_dict(), tmp_path / "5_D.pth")
    with pytest.raises(ValueError, match=r"no discriminator.*5_D\.pth$"):
        load_discriminator(path)
    assert_same(D, load_discriminator((tmp_path / "5_D.pth").as_uri()))


def test_an_export_is_a_generator(tmp_path):
    G = write_export(tmp_path / "g.safetensors", *NETWORKS[3])
    inputs = generator_inputs(3, 3)
    with torch.no_grad():
        torch.testing.assert_close(load_generator(tmp_path / "g.safetensors")(*inputs), G(*inputs), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="export, which has no discriminator"):
        load_discriminator(tmp_path / "g.safetensors")


@pytest.mark.parametrize("network", NETWORKS)
def test_the_other_network_is_refused(tmp_path, network):
    G, D = networks(*network)
    torch.save(G.state_dict(), tmp_path / "G.pth")
    torch.save(D.state_dict(), tmp_path / "D.pth")
    for load, name, kind in ((load_generator, "D.pth", "generator"), (load_discriminator, "G.pth", "discriminator")):
        with pytest.raises(ValueError, match=f"{name} has no {kind} of this program") as caught:
            load(tmp_path / name)
        assert "\n" not in str(caught.value) and "conv_dim" not in str(caught.value)
        assert "size mismatch" not in str(caught.value) and "loading state_dict" not in str(caught.value)


@pytest.mark.parametrize("content", [{}, {"a": 1}, {1: 2}, {"ema": []}, {"G": {"l1.0.module.weight_bar": 3}}, [1]])
def test_foreign_files_are_one_line(tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth") as caught:
        load_generator(tmp_path / "other.pth")
    assert "\n" not in str(caught.value)


def test_code_in_a_checkpoint_does_not_run(tmp_path):
    class Code:
        def __reduce__(self):
            return (tmp_path / "ran").touch, ()

    torch.save({"ema": Code()}, tmp_path / "5_state.pth")
    with pytest.raises(ValueError, match="damaged or not a checkpoint"):
        load_generator(tmp_path / "5_state.pth")
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def served(tmp_path):
    """A folder, and the URL at which it is served, with the list of requests."""
    requests, folder = [], tmp_path / "served"
    folder.mkdir()

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            requests.append(self.path)

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}", requests
        server.shutdown()


def test_a_url_is_downloaded_once(tmp_path, served, monkeypatch, capfd):
    """Exports of other runs have the same name; a hub may add a query."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    folder, url, requests = served
    G = {}
    for name, network in (("a", NETWORKS[0]), ("b", NETWORKS[3])):
        (folder / name).mkdir()
        G[name] = write_export(folder / name / "generator.safetensors", *network)
    for _ in range(2):
        for name, query, classes in (("a", "", 0), ("b", "?download=true", 3)):
            inputs = generator_inputs(2, classes)
            loaded = load_generator(f"{url}/{name}/generator.safetensors{query}")
            with torch.no_grad():
                torch.testing.assert_close(loaded(*inputs), G[name](*inputs), rtol=0, atol=1e-6)
    assert len(requests) == 2
    torch.save(G["a"].state_dict(), folder / "5_G.pth")
    assert_same(G["a"], load_generator(f"{url}/5_G.pth"))
    with pytest.raises(ValueError, match=rf"^{url}/none\.pth cannot be downloaded: .*404"):
        load_generator(f"{url}/none.pth")
