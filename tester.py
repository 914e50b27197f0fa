"""`--train false`: samples, interpolations, attention maps and metrics of a checkpoint.

    python main.py --train false --pretrained_model latest

Writes `<sample_path>/<version>/test_{step}/` and the attention explorer, `<attn_path>/<version>/{step}_explorer.html`.
The results depend only on the checkpoint, the options, the seed and the training images.
"""

import json
import textwrap
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_loader import Loader, to_model_range
from metrics.evaluation import check_metrics, compute_metrics
from metrics.nearest import nearest_images
from networks.latents import sample_z, slerp
from parameter import Config
from training.checkpoint import Checkpoint, reraise_load_errors
from training.models import MODELS
from training.resuming import warn_of_other_images
from training.run_folders import remove_test_results
from utils import (
    SEED_INTERPOLATION,
    SEED_METRICS,
    SEED_SAMPLES,
    conv_memory_format,
    derive_seed,
    eval_mode,
    evenly_spaced,
    files_by_step,
    make_deterministic,
    progress,
    resolve_device,
    resolve_precision,
)
from visuals.attention_stats import (
    collect_attention,
    format_attention_stats,
    mean_attention_stats,
    uniform_attention_stats,
)
from visuals.curves import line_chart, read_curves
from visuals.explorer import write_explorer
from visuals.figures import attention_figures, nearest_figure, progress_frames, sample_grid, save_animation, to_pixels

INTERPOLATION_STEPS = 10  # images per interpolation, both ends included
NEAREST_SAMPLES, NEAREST_NEIGHBORS = 8, 5  # rows and training images per row of nearest.png
SUMMARY_IMAGES = 256  # generated images over which attention statistics are averaged
PROGRESS_FRAMES = 40  # at most, of progress.gif


class Tester:
    """Evaluate a checkpoint, in float32.

    With `--use_ema` it is the EMA generator, if the checkpoint has one (the reference's have none).

    Args:
        config: the options, from `load_test_checkpoint`.
        loader: the opened training images, which `--metrics` needs; without them, nearest.png and the maps of D on
            real images are skipped.
        saved: the checkpoint; without D, D's maps are skipped.

    Raises:
        UserError: the device is not available, or the checkpoint is incomplete.
    """

    def __init__(self, config: Config, loader: Loader | None, saved: Checkpoint):
        self.config, self.loader = config, loader
        self.device = resolve_device(config.device)
        resolve_precision("fp32", self.device)  # on recent GPUs, convolutions run in TF32 by default
        if config.deterministic:
            make_deterministic()
        check_metrics(config, self.device)
        if loader is not None and saved.state is not None:
            warn_of_other_images(saved.state.get("data"), loader.identity)
        self.step = saved.step
        self.uses_ema = config.use_ema and saved.state is not None
        model = MODELS[config.model]
        self.G = model.make_G(config.imsize, config.z_dim, config.g_conv_dim)
        self.D = model.make_D(config.imsize, config.d_conv_dim) if saved.D is not None else None
        with reraise_load_errors(saved.step):
            self.G.load_state_dict(saved.state["ema"] if self.uses_ema else saved.G)
            if self.D is not None:
                self.D.load_state_dict(saved.D)
        self.memory_format = conv_memory_format(self.device, "fp32")
        self.networks = [network for network in (self.G, self.D) if network is not None]
        for network in self.networks:
            network.to(self.device, memory_format=self.memory_format)
        self.folder = config.sample_folder / f"test_{self.step}"

    def test(self) -> int:
        """Write all results and print where they are. Returns the exit code, 0."""
        remove_test_results(self.folder)  # of an earlier test of this step
        self.folder.mkdir(parents=True, exist_ok=True)
        self.config.attn_folder.mkdir(parents=True, exist_ok=True)
        print(f"{'EMA ' * self.uses_ema}generator, step {self.step}, on {self.device}")
        with eval_mode(*self.networks):
            self._write_samples()
            self._write_interpolations()
            self._write_progress()
            explorer = self._write_attention()
            self._write_attention_stats()
            self._write_gamma()
            if self.loader is not None:
                self._write_nearest()
            if self.config.metrics:
                self._write_metrics()
        print(f"results in {self.folder}: " + ", ".join(sorted(path.name for path in self.folder.iterdir())))
        print("Open first:")
        for path in (explorer, self.folder / "grid.png"):
            print(f"  {path}")
        return 0

    def _write_samples(self) -> None:
        """Write each sample as an image, and the first batch as a grid."""
        (self.folder / "samples").mkdir(exist_ok=True)
        batches = self._sample_z(self.config.num_samples).split(self.config.batch_size)
        for index, z in enumerate(progress(batches, "samples", "batch")):
            images = self.G(z)
            for number, pixels in enumerate(to_pixels(images), start=index * self.config.batch_size):
                Image.fromarray(pixels).save(self.folder / "samples" / f"{number:05}.png")
            if index == 0:
                sample_grid(images).save(self.folder / "grid.png")

    def _write_interpolations(self) -> None:
        """Write `g_num` interpolations between two z, as rows of an image and as an animation back and forth."""
        start, end = self._sample_z(2 * self.config.g_num, SEED_INTERPOLATION).chunk(2)
        columns = [self.G(z) for z in slerp(start, end, INTERPOLATION_STEPS).unbind(1)]  # each (g_num, 3, S, S)
        rows = torch.stack(columns, 1).flatten(0, 1)
        sample_grid(rows, columns=INTERPOLATION_STEPS).save(self.folder / "interpolation.png")
        frames = [sample_grid(column, columns=len(start)) for column in columns]
        save_animation(self.folder / "interpolation.gif", [*frames, *frames[-2:0:-1]], seconds=0.15)

    def _write_progress(self) -> None:
        """Write an animation of the sample grids that training saved up to this step, all of the same z."""
        grids = files_by_step(self.config.sample_folder, "ema.png" if self.uses_ema else "fake.png")
        steps = evenly_spaced([step for step in grids if step <= self.step], PROGRESS_FRAMES)
        if frames := progress_frames({step: grids[step] for step in steps}):
            save_animation(self.folder / "progress.gif", frames, seconds=0.25)

    def _write_attention(self) -> Path:
        """Write a figure per attention layer, and the explorer. Returns the explorer's path."""
        real = None
        if self.loader is not None:
            real = self.loader.batch(0, slice(self.config.g_num)).contiguous(memory_format=self.memory_format)
        samples = collect_attention(self.G, self.D, self._sample_z(self.config.g_num), real)
        for name, figure in attention_figures(samples, self.step).items():
            figure.save(self.folder / f"{name}.png")
        return write_explorer(self.config.attn_folder, self.config.version, self.step, samples)

    def _write_attention_stats(self) -> None:
        """Write and print the attention statistics of each layer, averaged over generated images."""
        batches = progress(self._sample_z(SUMMARY_IMAGES).split(32), "attention statistics", "batch")
        layers = mean_attention_stats(collect_attention(self.G, self.D, z, None)[0] for z in batches)
        print(f"attention statistics over {SUMMARY_IMAGES} generated images (uniform attention in brackets):")
        print(textwrap.indent(format_attention_stats(layers), "  "))
        numbers = {
            layer: {
                "side": sides[0],
                "key_side": sides[1],
                **stats._asdict(),
                "uniform": uniform_attention_stats(*sides)._asdict(),
            }
            for layer, (sides, stats) in layers.items()
        }
        self._write_json("attention.json", numbers)

    def _write_gamma(self) -> None:
        """Write the chart of each attention layer's gamma over the steps, if the run has a log."""
        curves = read_curves(self.config.log_folder, self.step)
        if gammas := {name.removeprefix("gamma/"): curves[name] for name in curves if name.startswith("gamma/")}:
            chart = line_chart("Gamma of the attention layers", gammas)
            (self.folder / "gamma.svg").write_text(chart, encoding="utf-8")

    def _write_nearest(self) -> None:
        """Write the training images nearest to some samples, with the distances between training images as baseline."""
        images = self.loader.images
        samples = self.G(self._sample_z(NEAREST_SAMPLES))
        found = nearest_images(samples, images, NEAREST_NEIGHBORS)
        neighbors = self._training_images(found.indices.flatten()).unflatten(0, found.indices.shape)
        chosen = torch.from_numpy(np.random.default_rng(self.config.seed).permutation(len(images))[:64])
        baseline = nearest_images(self._training_images(chosen), images, 2).distances[:, 1]  # [:, 0]: the image itself
        footer = (
            "Numbers: RMSE of pixels in [-1, 1]. Mean RMSE to the nearest training image:\n"
            f"{found.distances[:, 0].mean():.3f} from these samples, {baseline.mean():.3f} from other training images."
        )
        nearest_figure(samples, neighbors, found.distances, footer).save(self.folder / "nearest.png")

    def _write_metrics(self) -> None:
        """Write and print the metrics that `--metrics` lists."""
        z = self._sample_z(self.config.metric_num, SEED_METRICS)
        scores = compute_metrics(self.config, self.G, z, self.loader)
        print(f"metrics of {len(z)} images: " + ", ".join(f"{name} {value:.4g}" for name, value in scores.items()))
        self._write_json("metrics.json", {"step": self.step, "images": len(z), "ema": self.uses_ema, **scores})

    def _sample_z(self, count: int, stream: int = SEED_SAMPLES) -> Tensor:
        """Return z (count, z_dim), a function of the seed and the stream."""
        seed = derive_seed(self.config.seed, stream)
        return sample_z(seed, count, self.config.z_dim, self.device, self.config.truncation)

    def _training_images(self, indices: Tensor) -> Tensor:
        """Return training images (K, 3, S, S) by index (K,); copies them if they are not on this device."""
        images = self.loader.images
        return to_model_range(images[indices.to(images.device)].to(self.device))

    def _write_json(self, name: str, content: dict) -> None:
        (self.folder / name).write_text(json.dumps(content, indent=2), encoding="utf-8")
