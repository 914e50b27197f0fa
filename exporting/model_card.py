"""model_card.md: front matter that model hubs read, what the generator is, its data, metrics, and how to load it."""

import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from exporting.description import Description
from parameter import Config

NETWORKS = {
    "sagan": "the network of [heykeetae's repository](https://github.com/heykeetae/Self-Attention-GAN)",
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
ONNX = """
Without the program that trained it, by `pip install onnxruntime numpy pillow`:

```python
import numpy as np
import onnxruntime
from PIL import Image

session = onnxruntime.InferenceSession("generator.onnx")
z = np.random.default_rng(0).standard_normal((16, {z_dim}), dtype=np.float32)
inputs = {{"z": z{labels}}}
(images,) = session.run(["images"], inputs)  # (16, 3, {size}, {size}) in [-1, 1]
pixels = ((images + 1) * 127.5).round().astype(np.uint8).transpose(0, 2, 3, 1)
Image.fromarray(np.concatenate(pixels, axis=1)).save("images.png")  # side by side
```
"""
TORCH = """
In torch, by `pip install torch safetensors`; OWNER/REPOSITORY is that of the program on GitHub:

```python
import torch

G = torch.hub.load("OWNER/REPOSITORY", "generator", source="github", checkpoint="generator.safetensors")
with torch.no_grad():
    images = G(torch.randn(16, {z_dim}){labels})  # (16, 3, {size}, {size}) in [-1, 1]
```
"""


def model_card(
    title: str,
    description: Description,
    metrics: dict | None,
    command: str,
    formats: Collection[str],
    maps: Sequence[str] = (),
) -> str:
    """Return the card in Markdown.

    Args:
        title: the `--version` of the run.
        metrics: content of `metrics.json` of `--train false` for this generator and its training images, if any.
        command: from `metrics_command`; "" for weights whose training images are not known.
        formats: of the files beside the card: "safetensors", "onnx" or both.
        maps: names of the attention maps that generator.onnx returns.
    """
    this, data, count = description, description.data, len(description.classes)
    front = [f"license: {data.license}", "library_name: pytorch", "tags:", "- gan", "- sagan"]
    front += ["- self-attention"] if this.has_attention else []
    front += ["datasets:", f"- {data.hub_name}"] if data.hub_name else []
    front += [f"license_name: {data.title.lower()}", f"license_link: {data.license_link}"] if data.license_link else []
    front += [] if count else ["pipeline_tag: unconditional-image-generation"]  # hubs have none for images of a class
    classes = ", ".join(f"{number}: {_escape(name)}" for number, name in enumerate(this.classes[:100]))
    classes += ", ..." * (count > 100)
    if this.classes == tuple(map(str, range(count))):  # weights alone have no names
        classes = f"{count} classes"
    outputs = f" generator.onnx returns them: {', '.join(maps)} (B, queries, keys)." if maps else ""
    sizes = {"z_dim": this.z_dim, "size": this.image_size}
    numpy_labels = f', "labels": np.arange(16, dtype=np.int64) % {count}' if count else ""
    torch_labels = f", torch.arange(16) % {count}" if count else ""
    return "\n".join([
        "---", *front, "---", "", f"# {_escape(title)}", "", "![samples](samples.png)", "",
        f"A {'self-attention ' * this.has_attention}GAN ([arXiv 1805.08318](https://arxiv.org/abs/1805.08318)) that "
        f"generates RGB images of {this.image_size}×{this.image_size} pixels from z of {this.z_dim} normal numbers"
        f"{f' and a class ({classes})' if count else ''}: {NETWORKS[this.model]}, width {this.conv_dim}, "
        f"{'with its' if this.has_attention else 'without'} attention layers, after {this.step:,} steps"
        f"{f' at batch size {this.batch_size}' if this.batch_size else ''}, "
        f"{'EMA weights' if this.is_ema else 'the trained weights, no EMA'}.",
        "", "## Data and license", "",
        f"Trained on {data.title}{f' ({this.num_images:,} images)' if this.num_images else ''}. {data.terms} The "
        "generator shows what it learned from these images: their terms may bind it too.",
        "", "## Metrics", "",
        _metrics_section(metrics) if metrics
        else f"Not computed. Before the export, with the training images:\n\n    {command}" if command
        else "Not known: these weights come without their training state, which tells the training images.",
        "", "## Limitations", "",
        "The images have the biases of the training images and often visible artifacts; single ones may resemble "
        "training images. " + (
            "Attention maps show which positions a layer reads, not why an image looks as it does." + outputs
            if this.has_attention else "There are no attention maps."
        ),
        "", "## How to load it",
        ("onnx" in formats) * ONNX.format(**sizes, labels=numpy_labels)
        + ("safetensors" in formats) * TORCH.format(**sizes, labels=torch_labels),
    ])  # fmt: skip


def metrics_command(config: Config, step: int, is_ema: bool) -> str:
    """Return the command that computes metrics for the next export of a checkpoint."""
    wanted = config.pretrained_model if config.pretrained_file else f"{step}"
    words = ["python", "main.py", "--train", "false", "--version", config.version, "--pretrained_model", wanted]
    if config.model_save_path != Config.model_save_path:
        words += ["--model_save_path", config.model_save_path]
    words += [*([] if is_ema else ["--use_ema", "false"]), "--metrics", "fid,kid,isc,prc"]
    return shlex.join(words)


def _escape(text: str) -> str:
    """Escape text for Markdown and HTML, in one line."""
    return re.sub(r"([\\`*_{}\[\]<>|#!])", r"\\\1", " ".join(text.split())).replace("&", "&amp;")


def _metrics_section(metrics: Mapping[str, Any]) -> str:
    """Return the metrics with their protocol."""
    rows = [f"| {label} | {metrics[name]:.4g} |" for name, label in METRICS.items() if name in metrics]
    z = f"z truncated at {metrics['truncation']}" if metrics.get("truncation") else "z not truncated"
    protocol = (
        f"Protocol: {metrics['images']:,} generated images, {z}, against as many of the training images, or all if "
        "there are fewer, cropped and resized as in training (docs/metrics.md of the program's repository)."
    )
    return "\n".join(["| metric | value |", "|---|---|", *rows, "", protocol])
