"""Draw both pairs of networks at 64x64 from their modules: docs/model_sagan.svg and docs/model_paper.svg.

    python docs/draw_models.py

A forward is traced. A box with a name is a direct child of the network, with the operations that ran in it; other boxes
are what ran between two children. Next to an arrow is the shape of what is passed on, without the batch.
"""

import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import sagan_models
from networks import paper_models
from spectral import SpectralNorm

# By their names in torch; others are not drawn.
OPERATIONS = dict(avg_pool2d="average pool 2×2", batch_norm="BatchNorm", leaky_relu="LeakyReLU", linear="linear layer",
                  relu="ReLU", sum="sum over positions", tanh="tanh", unflatten="reshape")  # fmt: skip

# What these layers compute as a single convolution, which would be drawn otherwise.
COMBINED = {
    paper_models.UpsampledConv2d: "upsample ×2, conv 3×3",
    paper_models.PooledConv2d: "conv 3×3, average pool 2×2",
}

# In pixels: the drawing's width, that of a box, room for labels beside it, an arrow's length, a line, a letter.
WIDTH, BOX, SIDE, ARROW, LINE, LETTER = 900, 396, 24, 26, 16, 6.8
BLUE, AMBER = 'fill="#eaf2fc" stroke="#5b8cc9"', 'fill="#fff0cc" stroke="#d9920a"'
GRAY, PURPLE = 'fill="#f4f4f4" stroke="#b5b5b5"', "#7a3fb0"  # purple: what has to do with labels
BOLD, MIDDLE, END = 'font-weight="bold"', 'text-anchor="middle"', 'text-anchor="end"'


class Box(NamedTuple):
    """A layer; or operations, which have no name."""

    name: str
    text: str
    shape: tuple[int, ...] = ()  # of the result
    kind: str = ""  # "residual block" or "self-attention"
    parameters: str = ""
    has_spectral_norm: bool = False
    labels: str = ""  # what is done with labels

    def lines(self) -> list[tuple[str, str]]:
        """Return the lines below the name, each with its color."""
        paragraphs = [(text, "#222") for text in self.text.split("\n")] + [(self.labels, PURPLE)]
        return [(line, color) for text, color in paragraphs for line in textwrap.wrap(text, int(BOX / LETTER))]


class Trace(TorchFunctionMode):
    """Note in `operations`, a text, what a tensor has gone through since the attribute was set to ""."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        before = [arg.operations for arg in args if hasattr(arg, "operations")]
        if before and isinstance(out, Tensor):
            is_residual = function.__name__ == "add"
            now = f"shortcut: {before[1]}" if is_residual else operation_text(function.__name__, args, out)
            out.operations = ("\n" if is_residual else ", ").join(text for text in (before[0], now) if text)
        return out


def operation_text(function: str, args: tuple, out: Tensor) -> str:
    if function in ("conv2d", "conv_transpose2d"):
        height, width = args[1].shape[2:]
        stride = f" stride {args[3][0]}" if args[3:] and args[3][0] > 1 else ""
        return f"{'transposed ' if function == 'conv_transpose2d' else ''}conv {height}×{width}{stride}"
    if function == "interpolate":
        return f"upsample ×{out.shape[2] // args[0].shape[2]}"
    return OPERATIONS.get(function, "")


def attention_text(layer: nn.Module, out: Tensor, attention: Tensor) -> str:
    side, key_side = out.shape[2], int(attention.shape[2] ** 0.5)
    query, value = (next(conv.parameters()).shape[0] for conv in (layer.query_conv, layer.value_conv))
    text = f"{side}×{side} queries over {key_side}×{key_side} keys\nchannels: queries and keys {query}, values {value}"
    return text + (f"\nkeys and values max-pooled {side // key_side}×{side // key_side}" if key_side < side else "")


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@torch.no_grad()
def trace(network: nn.Module, x: Tensor) -> list[Box]:
    """Run a network on x. Returns its boxes in the order in which they ran."""
    boxes = []

    def add_operations(x: Tensor) -> None:
        if getattr(x, "operations", ""):
            boxes.append(Box("", x.operations, x.shape[1:]))
        x.operations = ""

    def add_layer(name: str, layer: nn.Module, outputs: Tensor | tuple[Tensor, Tensor]) -> None:
        out, *maps = outputs if isinstance(outputs, tuple) else (outputs,)
        text = attention_text(layer, out, *maps) if maps else out.operations
        kind = "self-attention" if maps else "residual block" if "shortcut" in text else ""
        weights = [key for key, parameter in layer.named_parameters() if parameter.dim() > 1]
        is_normed = bool(weights) and all(key.endswith("_bar") for key in weights)
        boxes.append(Box(name, text, out.shape[1:], kind, f"{count_parameters(layer):,}", is_normed))
        out.operations = ""

    def name_both(layer: nn.Module, inputs: tuple[Tensor], out: Tensor) -> None:
        out.operations = ", ".join(text for text in (inputs[0].operations, COMBINED[type(layer)]) if text)

    for layer in network.modules():
        if type(layer) in COMBINED:
            layer.register_forward_hook(name_both)
    for name, layer in network.named_children():
        layer.register_forward_pre_hook(lambda _, inputs: add_operations(inputs[0]))
        layer.register_forward_hook(lambda layer, _, outputs, name=name: add_layer(name, layer, outputs))
    with Trace():
        out, *_ = network.eval()(x, return_attention=True)
    add_operations(out)
    return boxes


def add_labels(boxes: list[Box], conditional: nn.Module) -> list[Box]:
    """Add to the boxes of an unconditional network what its conditional form, of one class, does with labels."""
    notes = {}
    for name, layer in conditional.named_children():
        if name not in {box.name for box in boxes}:  # D's embedding
            norm = ", with spectral norm" if isinstance(layer, SpectralNorm) else ""
            what = f"{name}(label), {count_parameters(layer):,} parameters per class{norm}"
            notes[boxes[-1].name] = f"with classes: plus inner product of its input and {what}"
        elif any(isinstance(module, nn.Embedding) for module in layer.modules()):
            notes[name] = "with classes: gain and shift of BatchNorm by label"
    return [box._replace(labels=notes.get(box.name, "")) for box in boxes]


def write(x: float, y: int, text: str, style: str = "") -> str:
    return f'<text x="{x:g}" y="{y}" {style}>{text}</text>'


def arrow(path: str, style: str) -> str:
    return f'<path d="{path}" fill="none" {style} marker-end="url(#tip)"/>'


def draw_box(box: Box, x: int, y: int) -> tuple[list[str], int]:
    """Return the elements of a box and its height."""
    height = 10 + LINE * (len(box.lines()) + bool(box.name))
    style = AMBER if box.kind == "self-attention" else BLUE if box.name else GRAY
    parts = [f'<rect x="{x}" y="{y}" width="{BOX}" height="{height}" rx="5" {style}/>']
    start, anchor = x + BOX / 2, MIDDLE
    if box.name:
        start, anchor, y, end = x + 10, "", y + LINE, x + 20 + 8.5 * len(box.name)
        parts.append(write(start, y, box.name, f'font-family="monospace" font-size="14" {BOLD}'))
        parts += [f'<use href="#norm" x="{end}" y="{y}"/>'] if box.has_spectral_norm else []
        parts.append(write(end + 36 * box.has_spectral_norm, y, box.kind, 'font-style="italic"'))
        parts.append(write(x + BOX - 10, y, box.parameters, END))
    for number, (line, color) in enumerate(box.lines(), 1):
        parts.append(write(start, y + number * LINE, line, f'fill="{color}" {anchor}'))
    return parts, height


def draw_network(x: int, title: str, boxes: list[Box], total: str) -> tuple[list[str], int]:
    """Return the elements of a network whose column starts at x, and where they end."""
    center, top = x + SIDE + BOX / 2, 96
    parts = [write(center, top - 32, title, f'font-size="16" {BOLD} {MIDDLE}')]
    parts.append(write(x + SIDE + BOX - 10, top - 7, "parameters", f'fill="#666" {END}'))
    if any(box.labels for box in boxes):
        parts.append(write(x, top - 7, "labels", f'fill="{PURPLE}"'))
    y = top
    for box in boxes:
        elements, height = draw_box(box, x + SIDE, y)
        parts += elements
        if box.labels:
            path = f"M{x + 8} {top}V{y + height // 2}h{SIDE - 10}"
            parts.append(arrow(path, f'stroke="{PURPLE}" stroke-dasharray="4 3"'))
        y += height
        if box is not boxes[-1]:
            parts.append(arrow(f"M{center:g} {y}v{ARROW - 2}", 'stroke="#555"'))
            parts.append(write(center + 8, y + LINE, " × ".join(map(str, box.shape)), 'fill="#666"'))
            y += ARROW
    return [*parts, write(center, y + 28, total, f'font-size="14" {BOLD} {MIDDLE}')], y + 28


def draw(name: str) -> str:
    """Return the drawing of `--model name`, an SVG."""
    models, has_classes = {"sagan": (sagan_models, False), "paper": (paper_models, True)}[name]
    parts, bottom = [], 0
    for x, title, make, source, inputs, result in (
        (20, "Generator", models.Generator, "z", torch.zeros(1, 128), "image"),
        (460, "Discriminator", models.Discriminator, "image", torch.zeros(1, 3, 64, 64), "logit"),
    ):
        network = make()
        boxes = trace(network, inputs)
        boxes = add_labels(boxes, make(num_classes=1)) if has_classes else boxes
        boxes = [Box("", source, inputs.shape[1:]), *boxes, Box("", result)]
        total = f"{count_parameters(network):,} parameters{' without classes' if has_classes else ''}"
        elements, end = draw_network(x, title, boxes, total)
        parts, bottom = parts + elements, max(bottom, end)
    size = f'width="{WIDTH}" height="{bottom + 60}"'
    return f"""<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {WIDTH} {bottom + 60}"
    font-family="sans-serif" font-size="12" fill="#222" role="img">
<title>The networks of --model {name} at 64×64</title>
<defs>
<marker id="tip" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="7" markerHeight="7" orient="auto">
<path d="M0 0L8 4L0 8z" fill="#555"/></marker>
<g id="norm"><rect y="-12" width="26" height="15" rx="7" fill="#2f6b4f"/>
<text x="13" y="-1" font-size="10" fill="#fff" {BOLD} {MIDDLE}>SN</text></g>
</defs>
<rect {size} rx="8" fill="#fff"/>
<text x="44" y="30" font-size="18" {BOLD}>--model {name}, 64×64</text>
<use href="#norm" x="44" y="{bottom + 40}"/>
<text x="80" y="{bottom + 40}">spectral norm on all weights of the layer</text>
""" + "\n".join([*parts, "</svg>\n"])


if __name__ == "__main__":
    for name in ("sagan", "paper"):
        (Path(__file__).parent / f"model_{name}.svg").write_text(draw(name), encoding="utf-8")
