"""Measure whether a conditional generator draws the classes that it is asked for.

    python benchmarks/class_accuracy.py --version animals --pretrained_model latest

Options are those of main.py. A small convolutional network is trained to name the class of the real images, a tenth of
which is held out. Reported is how often it names the right class of the held-out images, and of `--num_samples`
generated images of each class. Chance is the share of the largest class.
"""

import sys
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_loader import Loader, to_model_range
from errors import UserError, exit_code, make_output_robust
from main import make_loader
from parameter import Parser, get_parameters, given_options
from tester import Tester
from training.previews import draw_z
from training.resuming import check_classes, load_test_checkpoint
from utils import progress, setup_device

PROGRAM = "benchmarks/class_accuracy.py"
STEPS, BATCH = 400, 64
WIDTHS = (3, 16, 32, 64, 64)


def train_classifier(images: Tensor, labels: Tensor, num_classes: int) -> nn.Module:
    """Train a network that names the classes of images (N, S, S, 3) uint8, with labels (N,); from a fixed seed."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Conv2d(inputs, outputs, 3, 2, 1), nn.BatchNorm2d(outputs), nn.ReLU())
              for inputs, outputs in pairwise(WIDTHS)]  # fmt: skip
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * WIDTHS[-1], num_classes))
    network.to(labels.device)
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    for _ in progress(range(STEPS), "training the classifier", "step"):
        rows = torch.randint(len(labels), (BATCH,))
        batch = to_model_range(images[rows.to(images.device)].to(labels.device))
        optimizer.zero_grad()
        F.cross_entropy(network(batch), labels[rows.to(labels.device)]).backward()
        optimizer.step()
    return network.eval()


@torch.no_grad()
def accuracy(classifier: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of images (N, 3, S, S) in [-1, 1] of which the classifier names the class."""
    correct = [classifier(batch).argmax(1) == label
               for batch, label in zip(images.split(BATCH), labels.split(BATCH), strict=True)]  # fmt: skip
    return torch.cat(correct).float().mean().item()


def measure(loader: Loader, tester: Tester) -> None:
    """Print the table for an opened loader and the tester of a checkpoint of its classes."""
    images, labels = loader.images, loader.labels
    held_out = torch.arange(len(labels), device=labels.device) % 10 == 9
    classifier = train_classifier(images[~held_out.to(images.device)], labels[~held_out], len(loader.classes))
    images = images[held_out.to(images.device)].to(labels.device)
    real = accuracy(classifier, to_model_range(images), labels[held_out])
    z = draw_z(tester.config, tester.config.num_samples, tester.device)
    rows = []
    for number, name in enumerate(loader.classes):
        labels = torch.full((len(z),), number, device=z.device)
        with torch.no_grad():
            images = torch.cat([tester.G(*inputs) for inputs in zip(z.split(BATCH), labels.split(BATCH), strict=True)])
        rows.append((name, accuracy(classifier, images, labels)))
    chance = loader.labels.bincount().max().item() / len(loader.labels)
    print(f"step {tester.step}, {len(z)} images of each class; chance {chance:.1%}")
    print(f"held-out real images   {real:.1%}")
    for name, value in [*rows, ("all generated", sum(value for _, value in rows) / len(rows))]:
        print(f"{name:<22} {value:.1%}")


def main() -> int:
    """Run the command line. Returns the exit code."""
    make_output_robust()
    _, arguments = Parser(PROGRAM, __doc__).parse_known_args()
    saved, config = load_test_checkpoint(get_parameters(arguments, PROGRAM), given_options(arguments))
    if not config.conditional:
        raise UserError("the networks of this checkpoint have no classes")
    device = setup_device(config.device)
    loader = make_loader(config, device, saved=saved).open()
    check_classes(saved, loader.classes)
    measure(loader, Tester(config, loader, saved, device))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (Exception, KeyboardInterrupt) as error:
        sys.exit(exit_code(error))
