"""docs/models.md is true: its drawings, and the numbers of its table; and the code of docs/checkpoints.md works."""

import copy
import re

import pytest
import torch
from conftest import ROOT
from draw_models import count_parameters, draw, trace
from floor import step_work
from torch.optim.swa_utils import update_bn

from exporting.loading import load_generator
from training.models import MODELS

DOCS = ROOT / "docs"
NAMES = pytest.mark.parametrize("name", MODELS)


def cell(name: str, row: str) -> str:
    """The cell of docs/models.md in this row and the model's column."""
    text = (DOCS / "models.md").read_text(encoding="utf-8")
    (cells,) = re.findall(rf"^\| {re.escape(row)} \| (.*) \| (.*) \|$", text, flags=re.MULTILINE)
    return cells[list(MODELS).index(name)]


@NAMES
def test_drawings_and_table_of_sizes_parameters_and_attention_layers(name):
    assert (DOCS / f"model_{name}.svg").read_text(encoding="utf-8") == draw(name), "run: python docs/draw_models.py"
    sizes = MODELS[name].IMAGE_SIZES if name == "sagan" else MODELS[name].LAYOUTS
    assert cell(name, "sizes") == ", ".join(map(str, sizes))
    for size in sizes:
        with torch.device("meta"):
            G, D = MODELS[name].Generator(size), MODELS[name].Discriminator(size)
        assert cell(name, f"parameters, size {size}") == f"G {count_parameters(G):,}, D {count_parameters(D):,}"

    maps, channels = [], []  # of the attention layers
    for part, x in (("Generator", torch.zeros(1, 128)), ("Discriminator", torch.zeros(1, 3, 64, 64))):
        network = getattr(MODELS[name], part)(conv_dim=8)  # an eighth of the default; the maps do not depend on it
        _, *attention = network(x, return_attention=True)
        maps.append(f"{part[0]}: " + ", ".join("×".join(map(str, tensor.shape[1:])) for tensor in attention))
        boxes = [box for box in trace(network, x) if box.kind == "self-attention"]
        channels.append(f"{part[0]}: " + ", ".join(str(8 * box.shape[0]) for box in boxes))
    assert cell(name, "attention maps, queries × keys, at size 64") == "; ".join(maps)
    assert cell(name, "channels C of these feature maps, at size 64") == "; ".join(channels)


@pytest.mark.slow
@NAMES
def test_work_of_a_step_of_the_table(name, make_trainer):
    """It is proportional to the batch size."""
    trainer = make_trainer(model=name, imsize=64, z_dim=128, g_conv_dim=64, d_conv_dim=64, batch_size=2)
    flop = step_work(trainer.train_step).flop * 64 / 2
    assert cell(name, "work of a step, 64 images of size 64") == f"{flop / 1e12:.2f} TFLOP"


@NAMES
def test_the_average_of_checkpoints(name, train, tmp_path, monkeypatch):
    """As docs/checkpoints.md computes it: the mean of the weights, BatchNorm's statistics those of its own features."""
    (block,) = re.findall(r"```python\n(.*?)```", (DOCS / "checkpoints.md").read_text(encoding="utf-8"), re.S)
    trainer = train(model=name, total_step=3, min_save_step=1, model_save_step=1e-3, keep_checkpoints=0)
    folder = trainer.config.model_folder
    monkeypatch.chdir(tmp_path)
    exec(block.replace("models/cats", str(folder)).replace("(20000, 25000, 30000)", "(1, 2, 3)"), {})
    one, two, three = (torch.load(folder / f"{step}_state.pth")["ema"] for step in (1, 2, 3))
    G = load_generator("mean_state.pth")
    for key, value in G.named_parameters():
        torch.testing.assert_close(value.data, (one[key] + two[key] + three[key]) / 3)
    update_bn(torch.randn(32, 64, trainer.config.z_dim), again := copy.deepcopy(G))  # other z, spectral norm further on
    for key, value in G.named_buffers():
        if key.endswith("running_var"):
            torch.testing.assert_close(value, again.get_buffer(key), rtol=0.1, atol=1e-6)
