"""What an exported generator is and where it comes from: the metadata of its files, and model_card.md."""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from errors import warn
from parameter import Config
from training.checkpoint import EXPORT_CONTENT, EXPORT_VERSION, Checkpoint
from training.models import checksum
from training.resuming import TestNetworks

UNKNOWN = "license: unknown"
DATASETS = {  # what the images are called, what is known of their license, and a generator's license for model hubs
    "celeb": ("CelebA",
              "CelebA may be used for non-commercial research only (mmlab.ie.cuhk.edu.hk/projects/CelebA.html).",
              "license: other\nlicense_name: celeba\nlicense_link: https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html\n"
              "datasets:\n- flwrlabs/celeba"),
    "cifar10": ("CIFAR-10",
                "The authors of CIFAR-10 state no license (www.cs.toronto.edu/~kriz/cifar.html).",
                f"{UNKNOWN}\ndatasets:\n- uoft-cs/cifar10"),
    "lsun": ("the churches of LSUN",
             "The authors of LSUN state no license for the images (github.com/fyu/lsun).", UNKNOWN),
    "toy": ("faces drawn by the training program",
            "They are drawn by a program under the MIT license.", "license: mit"),
    "folder": ("images of the author of this export",
               "Not stated yet. State the license of the images before you publish this.", UNKNOWN),
    "": ("unknown images",
         "Not known. Find out which images these weights were trained on before you publish.", UNKNOWN),
}  # fmt: skip
NETWORKS = {
    "sagan": "the network of [heykeetae's repository](https://github.com/heykeetae/Self-Attention-GAN)",
    "paper": "the ResNet of the paper",
}
CARD = """---
{front_matter}
library_name: pytorch
tags:
- gan
- sagan
---

# {title}

![samples](samples.png)

A GAN ([arXiv 1805.08318](https://arxiv.org/abs/1805.08318)) that generates RGB images of {image_size}×{image_size}
pixels from z of {z_dim} normal numbers{class_names}: {network}, width {conv_dim}, {with} attention layers, after
{step} steps, {weights}.

## Data and license

Trained on {data}{count}. {data_license} The generator shows what it learned from these images: their
terms may bind it too. It has their biases, and single images may resemble training images.

## Metrics

{metrics}

## How to load it
"""
ONNX = """
Without the program that trained it, by `pip install onnxruntime numpy pillow`:

```python
import numpy as np
import onnxruntime
from PIL import Image

session = onnxruntime.InferenceSession("generator.onnx")
z = np.random.default_rng(0).standard_normal((16, {z_dim}), dtype=np.float32)
inputs = {{"z": z{numpy_labels}}}
(images,) = session.run(["images"], inputs)  # (16, 3, {image_size}, {image_size}) in [-1, 1]
pixels = ((images + 1) * 127.5).round().astype(np.uint8).transpose(0, 2, 3, 1)
Image.fromarray(np.concatenate(pixels, axis=1)).save("images.png")  # side by side
```
{maps}"""
TORCH = """
In torch, by `pip install torch numpy tqdm safetensors`; OWNER/REPOSITORY is that of the program on GitHub:

```python
import torch

G = torch.hub.load("OWNER/REPOSITORY", "generator", source="github", checkpoint="generator.safetensors")
with torch.no_grad():
    images = G(torch.randn(16, {z_dim}){torch_labels})  # (16, 3, {image_size}, {image_size}) in [-1, 1]
```
"""
WEIGHTS = """
G.safetensors and D.safetensors are the generator and its discriminator with spectral norm, matrices in float16, to
train from. In a clone of the program:

    python main.py --train false --pretrained_model PATH/G.safetensors     # samples and attention maps
    python main.py --init_from PATH --version mine --dataset folder --image_path YOUR_IMAGES

with --model, --imsize and other sizes as here if they are not the defaults (an error names them), or
`torch.hub.load("OWNER/REPOSITORY", "generator", checkpoint="PATH/G.safetensors")`, and `"discriminator"` of
PATH/D.safetensors. Their SHA-256:

{digests}
"""


def describe(config: Config, saved: Checkpoint, networks: TestNetworks, given: Collection[str]) -> dict[str, str]:
    """Return the metadata of the exported files.

    Args:
        given: names of the options on the command line, which say of which images weights without their state are.
    """
    dataset = config.dataset if "dataset" in given else (saved.metadata or {"dataset": ""})["dataset"]
    dataset = saved.state["config"]["dataset"] if saved.state else dataset
    data, terms, _ = DATASETS.get(dataset, (dataset, *DATASETS["folder"][1:]))
    return {
        "content": EXPORT_CONTENT,
        "content_version": EXPORT_VERSION,
        "model": config.model,
        "image_size": str(config.imsize),
        "z_dim": str(config.z_dim),
        "conv_dim": str(config.g_conv_dim),
        "num_classes": str(len(networks.classes)),
        "attention": config.attention,
        "classes": json.dumps(networks.classes),
        "step": str(saved.step),
        "ema": str(networks.is_ema).lower(),
        "checksum": saved.metadata["checksum"] if saved.metadata else str(checksum(networks.G.state_dict())),
        "images": "(B, 3, image_size, image_size), RGB, from -1 to 1",
        "dataset": dataset,
        "data": data,
        "data_license": terms,
    }


def read_metrics(path: Path, metadata: Mapping[str, str], saved: Checkpoint) -> dict[str, Any] | None:
    """Return a metrics.json of `--train false`; None, with a warning, if it is not of this generator and its images."""
    if not path.exists():
        return None
    with suppress(ValueError, KeyError, TypeError):
        metrics = json.loads(path.read_text(encoding="utf-8"))
        is_of_these_weights = str(metrics["checksum"]) == metadata["checksum"] and metrics["images"]
        if is_of_these_weights and saved.state and metrics["data"]["checksum"] == saved.state["data"]["checksum"]:
            return metrics
    warn(f"{path} is not used: it is damaged, or not known to be of these weights and of their training images")
    return None


def model_card(
    title: str,
    metadata: Mapping[str, str],
    num_images: int | None,
    metrics: Mapping[str, Any] | None,
    formats: Collection[str],
    maps: Sequence[str],
    digests: Mapping[str, str],
) -> str:
    """Return the card in Markdown.

    Args:
        title: the `--version` of the run.
        metadata: from `describe`.
        num_images: of the training; None if it is not known.
        metrics: from `read_metrics`.
        formats: of the files beside the card: "safetensors", "onnx", "weights".
        maps: names of the attention maps that generator.onnx returns.
        digests: SHA-256 of the files of "weights", by name.
    """
    classes = [f"{number}: {_escape(name)}" for number, name in enumerate(json.loads(metadata["classes"]))]
    _, _, front_matter = DATASETS.get(metadata["dataset"], DATASETS["folder"])
    values = metadata | {
        "title": _escape(title),
        "front_matter": front_matter + ("" if classes else "\npipeline_tag: unconditional-image-generation"),
        "class_names": f" and a class ({', '.join(classes)})" if classes else "",
        "network": NETWORKS[metadata["model"]],
        "with": "without" if metadata["attention"] == "none" else "with its",
        "step": f"{int(metadata['step']):,}",
        "weights": "EMA weights" if metadata["ema"] == "true" else "the trained weights, no EMA",
        "count": f" ({num_images:,} images)" if num_images else "",
        "metrics": _metrics_table(metrics) if metrics else "Not computed.",
        "numpy_labels": f', "labels": np.arange(16, dtype=np.int64) % {len(classes)}' if classes else "",
        "torch_labels": f", torch.arange(16) % {len(classes)}" if classes else "",
        "maps": f"\nAttention maps are outputs too: {', '.join(maps)} (B, queries, keys).\n" if maps else "",
        "digests": "\n".join(f"    {digest}  {name}" for name, digest in digests.items()),
    }
    texts = {"onnx": ONNX, "safetensors": TORCH, "weights": WEIGHTS}
    return "".join([CARD, *(text for name, text in texts.items() if name in formats)]).format_map(values)


def _escape(text: str) -> str:
    """Escape text for Markdown and HTML, in one line."""
    return re.sub(r"([\\`*_{}\[\]<>|#!])", r"\\\1", " ".join(text.split())).replace("&", "&amp;")


def _metrics_table(metrics: Mapping[str, Any]) -> str:
    rows = [f"| {name} | {value:.4g} |" for name, value in metrics.items() if isinstance(value, float)]  # the scores
    how = f"Of {metrics['images']:,} images; docs/metrics.md of the program's repository says how."
    return "\n".join(["| metric | value |", "|---|---|", *rows, "", how])
