import re

import pytest
from conftest import describe

from exporting.model_card import METRICS, model_card
from parameter import get_parameters

BOTH = ("safetensors", "onnx")
SCORES = {"step": 7, "images": 2000, "ema": True, "fid": 12.345678, "kid": 0.01, "kid_std": 0.002}


def card(metrics=None, formats=BOTH, maps=(), **changes):
    return model_card("cats", describe(**changes), metrics, formats, maps)


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
    assert "not comparable" not in text
    text = card(SCORES | {"truncation": 0.5, "feature_extractor": "mine.pt"})
    assert "z truncated at 0.5" in text and "not comparable" in text


def test_every_metric_has_a_name():
    """Those that `compute_scores` documents."""
    from metrics.scores import compute_scores

    names = re.search(r"Those of ([\w, \n]+) that", compute_scores.__doc__)[1]
    assert re.findall(r"\w+", names) == [*METRICS]


def test_the_command_that_computes_metrics_is_one_of_main_py():
    for is_ema in (True, False):
        (words,) = re.findall(r"^    python main\.py (.*)$", card(is_ema=is_ema), re.M)
        config = get_parameters(words.split())
        assert (config.train, config.version, config.pretrained_model) == (False, "cats", "7")
        assert config.use_ema == is_ema


def test_only_the_files_that_there_are_are_loaded():
    assert "onnxruntime" not in card(formats=["safetensors"]) and "torch.hub" in card(formats=["safetensors"])
    assert "onnxruntime" in card(formats=["onnx"]) and "torch.hub" not in card(formats=["onnx"])
    assert "attn1, attn2 (B, queries, keys)" in card(maps=("attn1", "attn2"))
    assert "There are no attention maps" in card(attention="none")
    assert "- self-attention\n" in card() and "self-attention" not in card(attention="none")
