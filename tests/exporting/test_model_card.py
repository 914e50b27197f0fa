import re
import shlex

import pytest
from conftest import describe

from exporting.model_card import METRICS, metrics_command, model_card
from parameter import Config, get_parameters

BOTH = ("safetensors", "onnx")
SCORES = {"step": 7, "images": 2000, "ema": True, "fid": 12.345678, "kid": 0.01, "kid_std": 0.002}


def card(metrics=None, formats=BOTH, maps=(), title="cats", **changes):
    return model_card(title, describe(**changes), metrics, "python main.py", formats, maps)


@pytest.mark.parametrize("dataset, license, hub_names", [
    ("celeb", "other", ["flwrlabs/celeba"]), ("cifar10", "unknown", ["uoft-cs/cifar10"]), ("toy", "mit", []),
    ("folder", "unknown", []), (None, "unknown", []),
])  # fmt: skip
def test_the_front_matter_that_model_hubs_read(dataset, license, hub_names):
    """A block of YAML at the start: plain words, and lists of them."""
    start, front, _ = card(dataset=dataset).split("---\n", 2)
    assert start == ""
    keys = dict(re.findall(r"^(\w+):(?: (\S+))?$", front, re.M))
    assert (keys["license"], keys["library_name"]) == (license, "pytorch")
    assert keys["pipeline_tag"] == "unconditional-image-generation"
    assert {"license_name", "license_link"} & {*keys} == (
        {"license_name", "license_link"} if license == "other" else set()
    )
    assert "pipeline_tag" not in card(model="paper", num_classes=2)  # hubs have none
    assert re.findall(r"datasets:\n((?:- \S+\n)+)", front) == ["".join(f"- {name}\n" for name in hub_names)] * bool(
        hub_names
    )
    assert all(re.fullmatch(r"\w+:( \S+)?|- \S+", line) for line in front.splitlines())


def test_what_it_is():
    text = card(step=12345, batch_size=64, dataset="celeb", num_images=10000)
    assert "32×32 pixels" in text and "12,345 steps at batch size 64, EMA weights" in text
    assert "Trained on CelebA (10,000 images)" in text and "non-commercial research only" in text
    text = card(is_ema=False, batch_size=None, dataset=None, num_images=None)
    assert "after 7 steps, the trained weights, no EMA" in text and "Trained on unknown images." in text
    text = card(model="paper", num_classes=2)
    assert "and a class (0: class 0, 1: class 1)" in text and "the ResNet of the paper" in text
    assert "class 99" in card(num_classes=200) and "class 100" not in card(num_classes=200)


def test_metrics_have_their_protocol():
    text = card(SCORES)
    assert "| FID | 12.35 |" in text and "2,000 generated images" in text and "z not truncated" in text
    assert "z truncated at 0.5" in card(SCORES | {"truncation": 0.5})


def test_every_metric_has_a_name():
    """Those that `compute_scores` documents."""
    from metrics.scores import compute_scores

    names = re.search(r"Those of ([\w, \n]+) that", compute_scores.__doc__)[1]
    assert re.findall(r"\w+", names) == [*METRICS]


@pytest.mark.parametrize("wanted, found", [("latest", "7"), ("a b/3_state.pth", "a b/3_state.pth")])
@pytest.mark.parametrize("is_ema", [True, False])
def test_the_command_that_computes_metrics_is_one_of_main_py(wanted, found, is_ema):
    config = Config(version="cats", pretrained_model=wanted, model_save_path="else where")
    python, main, *words = shlex.split(metrics_command(config, 7, is_ema))
    config = get_parameters(words)
    assert (python, main, config.train, config.version) == ("python", "main.py", False, "cats")
    assert (config.pretrained_model, config.use_ema, config.model_save_path) == (found, is_ema, "else where")
    assert "--model_save_path" not in metrics_command(Config(), 7, is_ema)


def test_names_are_text():
    hostile = "</script><img src=x onerror=alert(1)>\n# `*_|&amp;"
    text = card(title=hostile, classes=(hostile, "b"), model="paper")
    assert "<img" not in text.replace("\\<img", "") and "\n# `" not in text
    assert "&amp;amp;" in text and text.count("\\`\\*\\_\\|") == 2
    assert "a class (2 classes)" in card(classes=("0", "1"), model="paper")


def test_only_the_files_that_there_are_are_loaded():
    assert "onnxruntime" not in card(formats=["safetensors"]) and "torch.hub" in card(formats=["safetensors"])
    assert "onnxruntime" in card(formats=["onnx"]) and "torch.hub" not in card(formats=["onnx"])
    assert "attn1, attn2 (B, queries, keys)" in card(maps=("attn1", "attn2"))
    assert "There are no attention maps" in card(attention="none")
    assert "- self-attention\n" in card() and "self-attention" not in card(attention="none")
