"""`--train false`: what a trained generator makes, and what its attention looks at, from a checkpoint.

    python main.py --train false --pretrained_model latest

Leaves `<sample_path>/<version>/test_{step}/` and the explorer, `<attn_path>/<version>/{step}_explorer.html`. All is a
function of the checkpoint, the options and the seed.
"""

import json
import shutil
import textwrap

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_loader import Loader, to_model_range
from metrics.evaluation import check_metrics, measure
from metrics.nearest import nearest_images
from networks.latents import sample_z, slerp
from parameter import Config
from sagan_models import Discriminator, Generator
from training import checkpoint
from training.log import read_curves
from utils import (
    SEED_INTERPOLATION,
    SEED_METRICS,
    SEED_SAMPLES,
    derive_seed,
    eval_mode,
    evenly_spaced,
    files_by_step,
    progress,
    resolve_device,
)
from visuals.attention_stats import (
    collect_attention,
    format_attention_stats,
    mean_attention_stats,
    uniform_attention_stats,
)
from visuals.curves import line_chart
from visuals.explorer import write_explorer
from visuals.figures import animation, attention_figures, nearest_figure, progress_frames, sample_grid, to_pixels

BETWEEN = 10  # images from one end of an interpolation to the other
COMPARED, NEIGHBOURS = 8, 5  # samples whose nearest training images are shown, and how many of these
SUMMARY_IMAGES = 256  # over which the reach of attention is averaged
PROGRESS_FRAMES = 40


class Tester:
    """Evaluates the checkpoint that `config.pretrained_model` names, by default the latest.

    The averaged generator is used under `--use_ema` where the checkpoint has one (the reference's have none).

    Args:
        config: the options.
        loader: the training images; None leaves out what needs them.

    Raises:
        UserError: the device or the checkpoint asked for is not there, or does not fit.
    """

    def __init__(self, config: Config, loader: Loader | None):
        self.config, self.loader = config, loader
        self.device = resolve_device(config.device)
        check_metrics(config, self.device)
        wanted = "latest" if config.pretrained_model in (None, "auto") else config.pretrained_model
        saved = checkpoint.load(config.model_folder, wanted, config.architecture)
        self.step = saved.step
        self.is_averaged = config.use_ema and saved.state is not None
        self.G = Generator(config.imsize, config.z_dim, config.g_conv_dim)
        self.D = Discriminator(config.imsize, config.d_conv_dim)
        with checkpoint.complete(saved.step):
            self.G.load_state_dict(saved.state["ema"] if self.is_averaged else saved.G)
            self.D.load_state_dict(saved.D)
        for network in (self.G, self.D):
            network.to(self.device, memory_format=torch.channels_last)
        self.folder = config.sample_folder / f"test_{self.step}"

    def test(self) -> int:
        """Writes everything and says where it is. Returns the exit code, 0."""
        config = self.config
        shutil.rmtree(self.folder, ignore_errors=True)  # what an earlier test of this step left
        self.folder.mkdir(parents=True)
        config.attn_folder.mkdir(parents=True, exist_ok=True)
        average = "the averaged generator" if self.is_averaged else "the generator"
        print(f"{average} after step {self.step}, on {self.device}")
        with eval_mode(self.G, self.D):
            self._samples()
            self._interpolations()
            self._progress()
            self._attention()
            self._reach()
            if self.loader:
                self._nearest()
            if config.metrics:
                self._metrics()
        print(f"written to {self.folder}:")
        print("  " + "  ".join(sorted(path.name + "/" * path.is_dir() for path in self.folder.iterdir())))
        return 0

    def _noise(self, count: int, stream: int = SEED_SAMPLES) -> Tensor:
        """Noise (count, z_dim), other numbers for each stream."""
        seed = derive_seed(self.config.seed, stream)
        return sample_z(seed, count, self.config.z_dim, self.device, self.config.truncation)

    def _samples(self) -> None:
        """Single images, and the first batch of them as a grid."""
        (self.folder / "samples").mkdir()
        z = self._noise(self.config.num_samples).split(self.config.batch_size)
        for index, batch in enumerate(progress(z, "samples", "batch")):
            images = self.G(batch)
            for number, pixels in enumerate(to_pixels(images), start=index * self.config.batch_size):
                Image.fromarray(pixels).save(self.folder / "samples" / f"{number:05}.png")
            if index == 0:
                sample_grid(images).save(self.folder / "grid.png")

    def _interpolations(self) -> None:
        """From one z to another, `g_num` times: as rows of a picture, and moving there and back."""
        start, end = self._noise(2 * self.config.g_num, stream=SEED_INTERPOLATION).chunk(2)
        columns = [self.G(z) for z in slerp(start, end, BETWEEN).unbind(1)]  # BETWEEN of (g_num, 3, S, S)
        sample_grid(torch.stack(columns, 1).flatten(0, 1), columns=BETWEEN).save(self.folder / "interpolation.png")
        frames = [sample_grid(column, columns=len(start)) for column in columns]
        animation(self.folder / "interpolation.gif", [*frames, *frames[-2:0:-1]], seconds=0.15)

    def _progress(self) -> None:
        """The fixed z through training."""
        grids = files_by_step(self.config.sample_folder, "ema.png" if self.is_averaged else "fake.png")
        grids = {
            step: grids[step] for step in evenly_spaced([step for step in grids if step <= self.step], PROGRESS_FRAMES)
        }
        if frames := progress_frames(grids):
            animation(self.folder / "progress.gif", frames, seconds=0.25)

    def _attention(self) -> None:
        """A figure for each layer, and the explorer."""
        real = self.loader.batch(0)[: self.config.g_num] if self.loader else None
        shown = collect_attention(self.G, self.D, self._noise(self.config.g_num), real)
        for name, figure in attention_figures(shown, self.step).items():
            figure.save(self.folder / f"{name}.png")
        path = write_explorer(self.config.attn_folder, self.config.version, self.step, shown)
        print(f"point at a pixel, see what it looks at: {path}")
        curves = read_curves(self.config.log_folder, self.step)
        if gammas := {name.removeprefix("gamma/"): curves[name] for name in curves if name.startswith("gamma/")}:
            chart = line_chart("Gamma of the attention layers", gammas)
            (self.folder / "gamma.svg").write_text(chart, encoding="utf-8")

    def _reach(self) -> None:
        """How far each layer looks, over many generated images."""
        batches = progress(self._noise(SUMMARY_IMAGES).split(32), "how far attention looks", "batch")
        layers = mean_attention_stats(collect_attention(self.G, self.D, z, None)[0] for z in batches)
        print(f"how far attention looks, over {SUMMARY_IMAGES} images, beside looking evenly everywhere:")
        print(textwrap.indent(format_attention_stats(layers), "  "))
        numbers = {
            layer: {"side": side, **mine._asdict(), "even": uniform_attention_stats(side)._asdict()}
            for layer, (side, mine) in layers.items()
        }
        (self.folder / "attention.json").write_text(json.dumps(numbers, indent=2), encoding="utf-8")

    def _nearest(self) -> None:
        """The training images nearest to some samples, and how near training images are to each other."""
        images = self.loader.images
        samples = self.G(self._noise(COMPARED))
        found = nearest_images(samples, images, NEIGHBOURS)
        neighbours = to_model_range(images[found.indices.flatten().to(images.device)]).unflatten(0, found.indices.shape)
        chosen = torch.from_numpy(np.random.default_rng(self.config.seed).permutation(len(images))[:64])
        some = to_model_range(images[chosen.to(images.device)])
        apart = nearest_images(some, images, 2).distances[:, 1]  # the first is itself
        footer = (
            "Below each its distance: the root mean square of the pixels' differences, which are from -1 to 1.\n"
            f"Samples: {found.distances[:, 0].mean():.3f} from their nearest training image on average; "
            f"training images: {apart.mean():.3f} from theirs."
        )
        nearest_figure(samples, neighbours, found.distances, footer).save(self.folder / "nearest.png")

    def _metrics(self) -> None:
        """What `--metrics` asks for, also as a file."""
        z = self._noise(self.config.metric_num, stream=SEED_METRICS)
        found = measure(self.config, self.G, z, self.loader)
        print(f"metrics of {len(z)} images: " + ", ".join(f"{name} {value:.4g}" for name, value in found.items()))
        numbers = {"step": self.step, "images": len(z), "averaged": self.is_averaged, **found}
        (self.folder / "metrics.json").write_text(json.dumps(numbers, indent=2), encoding="utf-8")
