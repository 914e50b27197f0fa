"""What a run shows of itself while it trains: samples, attention maps, D's logits on held-out images.

None of it changes the training.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from data_loader import Loader
from networks.augmentation import RANDOM_NUMBERS, augment
from networks.latents import class_columns, class_rows, classes_in_turn
from parameter import Config
from utils import SEED_AUGMENTED, autocast, conv_memory_format, derive_seed, eval_mode
from visuals.attention_stats import AttentionSample, collect_attention
from visuals.figures import CLASS_ROWS


class Monitor:
    """Compute what is shown of a run's networks, which are in evaluation mode meanwhile.

    Args:
        loader: opened before the first call of a method.
        G, ema, D: the networks; `ema` is the EMA generator.
        fixed_z: latents (B, z_dim) of the sample grids.
        precision: of the training, fp32, tf32 or bf16.
    """

    def __init__(
        self,
        config: Config,
        loader: Loader,
        G: nn.Module,
        ema: nn.Module,
        D: nn.Module,
        fixed_z: Tensor,
        precision: str,
    ):
        self.config, self.loader = config, loader
        self.G, self.ema, self.D, self.fixed_z = G, ema, D, fixed_z
        self.device, self.precision = fixed_z.device, precision
        self.memory_format = conv_memory_format(self.device, precision)

    @property
    def shown_classes(self) -> range:
        """The classes that have a row in the grids."""
        return range(len(self.loader.classes))[:CLASS_ROWS]

    def samples(self) -> dict[str, Tensor]:
        """Return images of the fixed z by G and by its EMA; with classes, row by row."""
        inputs = class_rows(self.fixed_z, self.shown_classes) if self.shown_classes else (self.fixed_z,)
        with eval_mode(self.G, self.ema):
            return {"fake": self.G(*inputs), "ema": self.ema(*inputs)}

    def real_images(self) -> Tensor:
        """Return the first batch of real images; with classes, rows as in `samples`, filled up with black."""
        if not self.shown_classes:
            return self.loader.batch(0)
        columns = class_columns(len(self.shown_classes), len(self.fixed_z))
        images = [self.loader.images_of_class(label, columns) for label in self.shown_classes]
        return pad_sequence(images, batch_first=True, padding_value=-1).flatten(0, 1)

    def augmented_images(self, policy: Sequence[str]) -> Tensor:
        """Return the real images as D may see them; `policy` as in `augment`."""
        images, rng = self.real_images(), torch.Generator().manual_seed(derive_seed(self.config.seed, SEED_AUGMENTED))
        return augment(images, torch.rand(len(images), RANDOM_NUMBERS, generator=rng).to(self.device), policy)

    def attention(self) -> list[AttentionSample]:
        """Return the maps of the EMA generator on the first fixed z, of D on its images and on the first real ones."""
        rows, classes = slice(self.config.g_num), self.loader.classes
        latents = (self.fixed_z[rows],)
        if classes:
            latents += (classes_in_turn(range(len(classes)), len(latents[0])).to(self.device),)
        with eval_mode(self.ema, self.D):
            return collect_attention(
                self.ema, self.D, latents, self._formatted(*self.loader.labelled_batch(0, rows)), classes
            )

    def holdout_logits(self, step: int) -> dict[str, Tensor]:
        """Return D's mean logits on the next training images and on held-out ones: the gap is overfitting."""
        position, index = step * self.config.n_critic, step // self.config.log_step
        batches = {
            "d_train": self.loader.labelled_batch(position),
            "d_holdout": self.loader.held_out(index, self.config.batch_size),
        }
        with eval_mode(self.D), autocast(self.device, self.precision):
            return {name: self.D(*self._formatted(*batch)).float().mean() for name, batch in batches.items()}

    def _formatted(self, images: Tensor, *labels: Tensor) -> tuple[Tensor, ...]:
        """Return D's arguments, with the images in the memory format of the networks."""
        return images.contiguous(memory_format=self.memory_format), *labels
