"""What the metadata and the card say of a generator."""

import json
import re

import pytest
from conftest import ROOT, export_metadata

from exporting.model_card import DATASETS, model_card
from parameter import DATASET


def card(metrics=None, formats=("safetensors", "onnx"), maps=(), title="cats", num_images=20, **changes):
    return model_card(title, export_metadata(**changes), num_images, metrics, formats, maps, {})


@pytest.mark.parametrize("dataset, license, hub_name, terms", [
    ("celeb", "other", "flwrlabs/celeba", "non-commercial research only"), ("toy", "mit", None, "MIT license"),
    ("cifar10", "unknown", "uoft-cs/cifar10", "state no license"), ("lsun", "unknown", None, "state no license"),
    ("folder", "unknown", None, "before you publish"), ("", "unknown", None, "before you publish"),
])  # fmt: skip
def test_the_license_as_people_and_model_hubs_read_it(dataset, license, hub_name, terms):
    """Front matter is a block of YAML at the start: here plain words, and lists of them."""
    start, front, _ = card(dataset=dataset).split("---\n", 2)
    keys = dict(re.findall(r"^(\w+):(?: (\S+))?$", front, re.M))
    assert start == "" and all(re.fullmatch(r"\w+:( \S+)?|- \S+", line) for line in front.splitlines())
    assert (keys["license"], keys["library_name"]) == (license, "pytorch")
    assert ("license_name" in keys) == ("license_link" in keys) == (license == "other")
    assert re.findall(r"datasets:\n- (\S+)\n", front) == [hub_name] * bool(hub_name)
    assert terms in DATASETS[dataset][1] and {*DATASETS} - {""} == {*DATASET.description[7:].split(", ")}


def test_what_the_card_says_of_the_network():
    metrics = {"images": 2000, "fid": 12.345678}
    plain = card(metrics, ["safetensors"], step="12345", num_images=10000).replace("\n", " ")
    other = card(None, ["onnx"], model="paper", num_classes=9, attention="none", ema="false", num_images=None)
    found = [(word in plain, word in other.replace("\n", " ")) for word in (
        "12,345 steps, EMA weights", "(10,000 images)", "with its attention", "pipeline_tag: unconditional-image-",
        "| fid | 12.35 |", "Of 2,000 images;", "torch.hub",
        "onnxruntime", "no EMA", "faces drawn by the training program. They", "without attention",
        "7: class 7, 8: class 8)", "the ResNet of the paper", "Not computed.",
    )]  # fmt: skip
    assert found == [(True, False)] * 7 + [(False, True)] * 7


def test_the_keys_that_docs_export_md_lists():
    text = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+) \|", text.partition("| key |")[2].partition("\n\n")[0], re.M)
    assert re.findall(r"`(\w+)`", " ".join(rows)) == [*export_metadata()]


def test_names_are_text_and_the_first_way_needs_three_packages():
    hostile = "</script><img src=x onerror=alert(1)>\n# `*_|&amp;{z_dim}"
    text = card(title=hostile, classes=json.dumps([hostile, "b"]), model="paper")
    assert "<img" not in text.replace("\\<img", "") and "\n# `" not in text
    assert "&amp;amp;" in text and text.count("\\`\\*\\_\\|") == text.count("z\\_dim") == 2
    (block, _) = re.findall(r"```python\n(.*?)```", text, re.S)
    assert {*re.findall(r"^(?:import|from) (\w+)", block, re.M)} == {"numpy", "onnxruntime", "PIL"}
