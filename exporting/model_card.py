"""model_card.md: front matter that model hubs read, what the generator is, its data, metrics, and how to load it."""

import shlex
from collections.abc import Mapping, Sequence
from string import Template
from typing import Any

from exporting.description import Description

NETWORKS = {
    "sagan": "the network of [heykeetae/Self-Attention-GAN](https://github.com/heykeetae/Self-Attention-GAN)",
    "paper": "the ResNet of the paper",
}
METRICS = {
    "fid": "FID",
    "kid": "KID",
    "kid_std": "KID, standard deviation over subsets",
    "isc": "Inception score",
    "isc_std": "Inception score, standard deviation over splits",
    "precision": "precision",
    "recall": "recall",
    "f_score": "F-score of precision and recall",
    "faces": "face rate: images in which OpenCV's detector finds a face",
    "faces_real": "face rate of the real images",
    "hog": "Fréchet distance of HOG features",
    "hog_real": "Fréchet distance of HOG features between two halves of the real images",
}
CARD = Template("""\
---
license: $license
library_name: pytorch
pipeline_tag: unconditional-image-generation
tags:
- gan
- sagan
- self-attention
$datasets---

# $title

![samples](samples.png)

A self-attention GAN ([arXiv 1805.08318](https://arxiv.org/abs/1805.08318)) that generates RGB images of \
$size×$size pixels from z of $z_dim normal numbers$classes: $network, width $conv_dim, $attention, after $step \
steps$batch_size, $weights. Spectral norm is folded into plain weights.

## Data and license

Trained on $data$num_images. $terms The generator shows what it learned from these images: their terms may bind it too.

## Metrics

$metrics

## Limitations

The images repeat what is frequent in the training images, with their biases, and many have visible artifacts; single \
ones may resemble training images.
$maps_note

## How to load it

$loading""")
ONNX = Template("""\
Without this program, by `pip install onnxruntime numpy pillow`:

```python
import numpy as np
import onnxruntime
from PIL import Image

session = onnxruntime.InferenceSession("generator.onnx")
z = np.random.default_rng(0).standard_normal((16, $z_dim), dtype=np.float32)
inputs = {"z": z$numpy_labels}
(images,) = session.run(["images"], inputs)  # (16, 3, $size, $size) in [-1, 1]
pixels = ((images + 1) * 127.5).round().astype(np.uint8).transpose(0, 2, 3, 1)
Image.fromarray(np.concatenate(pixels, axis=1)).save("images.png")  # side by side
```

The file has standard ONNX operators only: loading it cannot run other code.
""")
TORCH = Template("""\
In torch, by `pip install torch safetensors`, in a clone of the program's repository:

```python
import torch
from exporting.safetensors_file import read_generator

G = read_generator("generator.safetensors")
with torch.no_grad():
    images = G(torch.randn(16, $z_dim)$torch_labels)  # (16, 3, $size, $size) in [-1, 1]
```

or without a clone, with the repository's name on GitHub:

```python
import torch

G = torch.hub.load("OWNER/REPOSITORY", "generator", source="github", checkpoint="generator.safetensors")
with torch.no_grad():
    images = G(torch.randn(16, $z_dim)$torch_labels)
```

The file has numbers and text only: loading it cannot run code.
""")


def model_card(
    title: str,
    description: Description,
    formats: Sequence[str],
    maps: Sequence[str],
    metrics: Mapping[str, Any] | None,
) -> str:
    """Return the card in Markdown.

    Args:
        title: the `--version` of the run.
        formats: of the files beside the card: "safetensors", "onnx" or both.
        maps: names of the attention maps that generator.onnx returns.
        metrics: content of `metrics.json` of `--train false` for this generator; None if there is none.
    """
    data, classes = description.data, description.classes
    loading = [text for name, text in (("onnx", ONNX), ("safetensors", TORCH)) if name in formats]
    values = {
        "title": title,
        "license": data.license,
        "datasets": f"datasets:\n- {data.hub_name}\n" if data.hub_name else "",
        "size": description.image_size,
        "z_dim": description.z_dim,
        "conv_dim": description.conv_dim,
        "classes": f" and a class ({_class_list(classes)})" if classes else "",
        "network": NETWORKS[description.model],
        "attention": "with self-attention" if description.has_attention else "without its attention layers",
        "step": f"{description.step:,}",
        "batch_size": f" at batch size {description.batch_size}" if description.batch_size else "",
        "weights": "EMA weights" if description.is_ema else "the trained weights, no EMA",
        "data": data.title,
        "num_images": f" ({description.num_images:,} images)" if description.num_images else "",
        "terms": data.terms,
        "metrics": _metrics_section(metrics) if metrics else _no_metrics(title, description),
        "maps_note": _maps_note(description.has_attention, maps),
        "numpy_labels": f', "labels": np.arange(16) % {len(classes)}' if classes else "",
        "torch_labels": f", torch.arange(16) % {len(classes)}" if classes else "",
    }
    values["loading"] = "\n".join(text.substitute(values) for text in loading)
    return CARD.substitute(values)


def _class_list(classes: Sequence[str]) -> str:
    shown = [f"{number}: {name}" for number, name in enumerate(classes[:100])]
    return ", ".join(shown) + (", ..." if len(classes) > 100 else "")


def _no_metrics(version: str, description: Description) -> str:
    """Return the command that computes metrics for the next export."""
    words = ["python", "main.py", "--train", "false", "--version", version, "--pretrained_model", f"{description.step}"]
    words += [*([] if description.is_ema else ["--use_ema", "false"]), "--metrics", "fid,kid,isc,prc"]
    return f"Not computed. Before the export, with the training images:\n\n    {shlex.join(words)}"


def _metrics_section(metrics: Mapping[str, Any]) -> str:
    """Return the metrics with their protocol."""
    rows = [f"| {label} | {metrics[name]:.4g} |" for name, label in METRICS.items() if name in metrics]
    z = f"z truncated at {metrics['truncation']}" if metrics.get("truncation") else "z not truncated"
    notes = [
        f"Protocol: {metrics['images']:,} generated images, {z}, against as many real images of the training data, or "
        "all if there are fewer, cropped and resized as in training (docs/metrics.md of the program's repository)."
    ]
    if metrics.get("feature_extractor"):
        notes.append("Features of a network of the author's own instead of Inception and VGG16: not comparable.")
    return "\n".join(["| metric | value |", "|---|---|", *rows, "", *notes])


def _maps_note(has_attention: bool, maps: Sequence[str]) -> str:
    """Return what the attention maps are worth, and where they are."""
    if not has_attention:
        return "There are no attention maps."
    outputs = f" generator.onnx returns them: {', '.join(maps)} (B, queries, keys)." if maps else ""
    return "Attention maps show which positions a layer reads, not why an image looks as it does." + outputs
