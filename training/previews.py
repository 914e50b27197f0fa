"""What is computed of a run's networks to be shown: samples, attention maps, scalars. None of it changes training."""

from collections.abc import Iterable, Sequence
from unicodedata import normalize

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from data_loader import Loader
from datasets.labels import as_text, join_names
from errors import UserError
from networks.augmentation import RANDOM_NUMBERS, augment
from networks.latents import class_columns, class_rows, classes_in_turn, sample_z
from parameter import Config
from spectral import SpectralNorm
from training.resuming import TrainingState
from utils import SEED_AUGMENTED, SEED_SAMPLES, autocast, derive_seed, eval_mode
from visuals.attention_stats import AttentionSample
from visuals.figures import CLASS_ROWS, sample_grid, shorten


class Previews:
    """Compute what is shown of networks in training, which are in evaluation mode meanwhile.

    Args:
        loader: opened.
        precision: fp32, tf32 or bf16.
    """

    def __init__(self, config: Config, loader: Loader, state: TrainingState, precision: str):
        self.config, self.loader, self.precision = config, loader, precision
        self.G, self.ema, self.D, self.fixed_z = state.G, state.ema, state.D, state.fixed_z
        self.shown_classes = range(len(loader.classes))[:CLASS_ROWS]  # those with a row in the grids

    def samples(self) -> dict[str, Tensor]:
        """Return images of the fixed z by G and by its EMA; with classes, row by row."""
        z, labels = class_rows(self.fixed_z, self.shown_classes) if self.shown_classes else (self.fixed_z, None)
        with eval_mode(self.G, self.ema):
            return {"fake": self.G(z, labels), "ema": self.ema(z, labels)}

    def real_images(self) -> Tensor:
        """Return the first batch of real images; with classes, rows as in `samples`, filled up with black."""
        if not self.shown_classes:
            return self.loader.batch(0)[0]
        columns = class_columns(len(self.shown_classes), len(self.fixed_z))
        images = [self.loader.images_of_class(label, columns) for label in self.shown_classes]
        return pad_sequence(images, batch_first=True, padding_value=-1).flatten(0, 1)

    def augmented_images(self) -> Tensor:
        """Return the real images as D may see them under `--augment`."""
        images, rng = self.real_images(), torch.Generator().manual_seed(derive_seed(self.config.seed, SEED_AUGMENTED))
        noise = torch.rand(len(images), RANDOM_NUMBERS, generator=rng).to(images.device)
        return augment(images, noise, self.config.augment.split(","))

    def attention(self) -> list[AttentionSample]:
        """Return the maps of the EMA generator on the first fixed z, of D on its images and on the first real ones."""
        z, classes, labels = self.fixed_z[: self.config.g_num], self.loader.classes, None
        if classes:
            labels = classes_in_turn(range(len(classes)), len(z)).to(z.device)
        real, real_labels = self.loader.batch(0, slice(self.config.g_num))
        with eval_mode(self.ema, self.D):
            return collect_attention(self.ema, self.D, z, labels, real, real_labels, classes)

    def scalars(self, step: int) -> dict[str, Tensor]:
        """Return gammas and spectral norms, and under `--holdout` D's mean logits on training and held-out images.

        The gap between the logits is overfitting. They are of the next training images, and of other held-out ones in
        turn at each `log_step`.
        """
        scalars = gammas_and_sigmas("G", self.G) | gammas_and_sigmas("D", self.D)
        if self.config.holdout:
            batches = {
                "d_train": self.loader.batch(step * self.config.n_critic),
                "d_holdout": self.loader.held_out(step // self.config.log_step, self.config.batch_size),
            }
            with eval_mode(self.D), autocast(self.fixed_z.device, self.precision):
                scalars |= {name: self.D(*batch).float().mean() for name, batch in batches.items()}
        return scalars


def collect_attention(
    G: nn.Module,
    D: nn.Module | None,
    z: Tensor,
    labels: Tensor | None = None,
    real: Tensor | None = None,
    real_labels: Tensor | None = None,
    classes: Sequence[str] = (),
) -> list[AttentionSample]:
    """Return the maps of G and D on generated images and, if given, those of D on real images.

    Args:
        G, D: in evaluation mode, because a forward in training mode changes their buffers; D may be missing.
        z, labels: latents (B, z_dim), and classes (B,) for conditional networks.
        real, real_labels: images (B', 3, S, S) in [-1, 1], and their classes (B',).
        classes: the names of the classes.
    """
    fake, *g_maps = G(z, labels, return_attention=True)
    batches = [("generated", fake, labels, _name_layers("G", g_maps))]
    if real is not None and D is not None:
        batches.append(("real", real, real_labels, {}))
    samples = []
    for name, images, numbers, maps in batches:
        if D is not None:
            maps |= _name_layers("D", D(images, numbers, return_attention=True)[1:])
        names = [] if numbers is None else [classes[number] for number in numbers.tolist()]
        samples.append(AttentionSample(name, images, maps, names))
    return samples


def draw_z(config: Config, count: int, device: torch.device, stream: int = SEED_SAMPLES) -> Tensor:
    """Return z (count, z_dim), a function of `--seed` and the stream."""
    return sample_z(derive_seed(config.seed, stream), count, config.z_dim, device)


@torch.no_grad()
def samples_grid(G: nn.Module, config: Config, classes: Sequence[str]) -> Image.Image:
    """Return a grid of G's first samples, at most `--batch_size`, or with a row for each class of `--class_name`."""
    device, rows = next(G.parameters()).device, select_classes(config.class_name, classes)[:CLASS_ROWS]
    z = draw_z(config, config.num_samples, device)
    z, labels = class_rows(z, rows) if rows else (z[: config.batch_size], None)
    return sample_grid(G(z, labels), row_names=[shorten(classes[number]) for number in rows])


def select_classes(class_name: str | None, classes: Sequence[str]) -> list[int]:
    """Return the indices of the classes that `--class_name` lists; of all classes for None.

    Raises:
        UserError: there is no such class.
    """
    if class_name is None:
        return [*range(len(classes))]
    if not classes:
        raise UserError("--class_name: the networks of this checkpoint have no classes")
    numbers = {normalize("NFC", name): number for number, name in enumerate(classes)}  # macOS decomposes letters
    class_name = normalize("NFC", as_text(class_name))
    names = [class_name] if class_name in numbers else class_name.split(",")  # a name may have commas
    names = [name if name in numbers else name.strip() for name in names]
    if unknown := [name for name in names if name not in numbers]:
        raise UserError(f"--class_name {unknown[0]}: the checkpoint's classes are {join_names(classes)}")
    return [numbers[name] for name in names]


@torch.no_grad()
def gammas_and_sigmas(prefix: str, network: nn.Module) -> dict[str, Tensor]:
    """Return gamma of each attention layer and sigma of each spectral norm of a network, for its log: 0-d, detached.

    Names are such as "gamma/G_attn1", "sigma/G_l1" and "sigma/G_block1.conv1", with `prefix` in place of "G".
    """
    values = {}
    for name, layer in network.named_modules():
        if hasattr(layer, "gamma"):  # an attention layer of any model
            values[f"gamma/{prefix}_{name}"] = layer.gamma.detach()[0]
        elif isinstance(layer, SpectralNorm):
            values[f"sigma/{prefix}_{name.removesuffix('.0')}"] = layer.sigma()
    return values


def _name_layers(network: str, maps: Iterable[Tensor]) -> dict[str, Tensor]:
    return {f"{network} attn{index}": attention for index, attention in enumerate(maps, start=1)}
