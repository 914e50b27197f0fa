"""`--train false`: samples, interpolations, attention maps and metrics of a checkpoint.

    python main.py --train false --pretrained_model latest

Writes `<sample_path>/<version>/test_{step}/` and the attention explorer, `<attn_path>/<version>/{step}_explorer.html`.
The results depend only on the checkpoint, the options, the seed and the training images. Conditional networks
generate samples of each class, or of those of `--class_name`; results with fewer images show these classes in turn.
"""

import json
import textwrap
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from data_loader import Loader
from metrics import projection
from metrics.nearest import nearest_images
from metrics.scores import check_metrics, compute_metrics
from networks.latents import classes_in_turn, latent_directions, latent_lines, slerp
from parameter import Config
from training.checkpoint import Checkpoint
from training.models import checksum
from training.previews import collect_attention, draw_z, samples_grid, select_classes
from training.resuming import DATA_OPTIONS, load_test_networks, warn_of_other_images, warn_of_trained_holdout
from training.run_folders import folder_names, remove_test_results
from utils import (
    SEED_INTERPOLATION,
    SEED_SAMPLES,
    check_writable,
    conv_memory_format,
    evenly_spaced,
    files_by_step,
    progress,
)
from visuals import figures
from visuals.attention_stats import format_attention_stats, mean_attention_stats, uniform_attention_stats
from visuals.explorer import write_explorer
from visuals.playground import DIRECTIONS, REACH, generate_playground, playground_page

INTERPOLATION_STEPS = 10  # images per interpolation, both ends included
NEAREST_SAMPLES, NEAREST_NEIGHBORS = 8, 5  # rows and training images per row of nearest.png
PROJECTION_DRAWS, PROJECTED_HELD_OUT = 256, 7  # z to start from; held-out images beside the photo
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
        photo: that of `--project`, (1, 3, S, S) in [-1, 1].

    Raises:
        UserError: a library of `--metrics` is missing, the checkpoint is incomplete, or has no classes of that name.
    """

    def __init__(
        self,
        config: Config,
        loader: Loader | None,
        saved: Checkpoint,
        device: torch.device,
        photo: Tensor | None = None,
    ):
        self.config, self.loader, self.device, self.step = config, loader, device, saved.step
        self.folder = config.test_folder(self.step)
        for folder in (self.folder, config.attn_folder):
            check_writable(folder)
        check_metrics(config, device)
        self.G, self.D, self.classes, self.is_ema = load_test_networks(saved, config)
        if loader is not None:
            if not (saved.state or saved.metadata):  # weights alone have no names
                self.classes = loader.classes
            warn_of_other_images(saved, loader.fingerprint)
            if photo is not None:
                warn_of_trained_holdout(saved, loader.fingerprint)
        self.selected_classes = select_classes(config.class_name, self.classes)
        for network in filter(None, (self.G, self.D)):
            network.to(device, memory_format=conv_memory_format(device, "fp32"))
        self.photo = None if photo is None else photo.to(device)
        self.directions = latent_directions(self.G.first_layer, DIRECTIONS)

    @torch.no_grad()
    def test(self) -> int:
        """Write all results and print where they are. Returns the exit code, 0."""
        # Of an earlier test of this step; metrics take long, and stay until there are new ones.
        remove_test_results(self.folder, keep=["metrics.json"])
        self.folder.mkdir(parents=True, exist_ok=True)
        self.config.attn_folder.mkdir(parents=True, exist_ok=True)
        print(f"{'EMA ' * self.is_ema}generator, step {self.step}, on {self.device}")
        self._write_samples()
        z, label = self._corners()
        self._write_directions(z[0], label)
        self._write_interpolations()
        if len(self.selected_classes) > 1:
            self._write_class_interpolations()
        self._write_progress()
        pages = [self._write_playground(z, label), self.folder / "grid.png"]
        pages += [self.folder / "projection.png"] if self.photo is not None else []
        if self.config.has_attention:
            pages.insert(0, self._write_attention())
            self._write_attention_stats()
        if self.loader is not None and len(self.loader.images) > 1:
            self._write_nearest()
        if self.config.metrics:
            self._write_metrics()
        print(f"results in {self.folder}: " + ", ".join(sorted(path.name for path in self.folder.iterdir())))
        print("Open first:")
        for path in pages:
            print(f"  {path}")
        return 0

    def _write_samples(self) -> None:
        """Write each sample as an image, those of each class to a folder of its own, and some of them as a grid."""
        z = draw_z(self.config, self.config.num_samples, self.device)
        folder, names = self.folder / "samples", folder_names(self.classes)
        for number in self.selected_classes:
            self._write_images(folder / names[number], z, torch.full((len(z),), number, device=self.device))
        if not self.classes:
            self._write_images(folder, z, None)
        samples_grid(self.G, self.config, self.classes).save(self.folder / "grid.png")

    def _write_images(self, folder: Path, z: Tensor, labels: Tensor | None) -> None:
        """Write G's images, one file each."""
        folder.mkdir(parents=True, exist_ok=True)
        size = self.config.batch_size
        for first in progress(range(0, len(z), size), "samples", "batch"):
            rows = slice(first, first + size)
            images = self.G(z[rows], None if labels is None else labels[rows])
            for number, pixels in enumerate(figures.to_pixels(images), start=first):
                Image.fromarray(pixels).save(folder / f"{number:05}.png")

    def _write_interpolations(self) -> None:
        """Write `g_num` interpolations between two z, each of one class if there are classes."""
        z, labels = self._inputs(2 * self.config.g_num, SEED_INTERPOLATION)
        start, end = z.chunk(2)
        labels = None if labels is None else labels[: len(start)]
        columns = [self.G(z, labels) for z in slerp(start, end, INTERPOLATION_STEPS).unbind(1)]
        self._write_columns("interpolation", columns, [] if labels is None else self._names(labels))

    def _write_class_interpolations(self) -> None:
        """Write `g_num` interpolations between two classes, each of one z."""
        z, labels = self._inputs(self.config.g_num + 1, SEED_INTERPOLATION)
        start, end = F.one_hot(labels, len(self.classes)).float().unfold(0, 2, 1).unbind(2)  # each (g_num, classes)
        steps = torch.linspace(0, 1, INTERPOLATION_STEPS).tolist()
        columns = [self.G(z[:-1], torch.lerp(start, end, step)) for step in steps]
        row_names = [f"{one} - {other}" for one, other in pairwise(self._names(labels))]
        self._write_columns("class_interpolation", columns, row_names)

    def _corners(self) -> tuple[Tensor, Tensor | None]:
        """Return the first four z (4, z_dim), with `--project` the first one the photo's, and its label (1,)."""
        z, labels = self._inputs(max(self.config.num_samples, 4))  # those of the samples
        if self.photo is None:
            return z[:4], None if labels is None else labels[:1]
        first, label = self._write_projection(self.photo)
        return torch.cat([first, z[1:4]]), label

    def _write_projection(self, photo: Tensor) -> tuple[Tensor, Tensor | None]:
        """Write the z nearest to a photo (1, 3, S, S) and a figure, print how near it is. Returns it and its label.

        Held-out images of the same classes beside it show how near G comes to images that it was not trained on.
        """
        real = photo[:0]
        if self.loader is not None and self.loader.holdout:
            real, _ = self.loader.held_out(0, PROJECTED_HELD_OUT, self.selected_classes)
        images, draws = torch.cat([photo, real]), max(PROJECTION_DRAWS, len(self.selected_classes))
        found = projection.project(self.G, self.D, images, *self._inputs(draws))
        label = None if found.labels is None else found.labels[:1]
        distance = projection.describe(found.rmse[:, -1]) + ("" if self.D else "; without D, by pixels alone")
        kind = "" if label is None else f" as {self._names(label)[0]}"
        print(f"projection of {self.config.project}{kind}: {distance}")
        np.save(self.folder / "projection.npy", found.z[0].cpu().numpy())
        names = ["photo", *["held-out"] * len(real)]
        steps = [f"nearest of {draws}", *(f"step {step}" for step in projection.SHOWN_STEPS[1:])]
        footer = f"Photo{kind}: {distance}.".replace("; ", ";\n")
        figure = figures.projection_figure(images, found.images, found.rmse, names, steps, footer)
        figure.save(self.folder / "projection.png")
        return found.z[:1], label

    def _write_directions(self, z: Tensor, label: Tensor | None) -> None:
        """Write the image of z (z_dim,), of a class (1,), moved along each direction, a row each."""
        amounts = range(-int(REACH), int(REACH) + 1)
        rows = latent_lines(z, self.directions, amounts)  # (K, A, z_dim)
        images = self.G(rows.flatten(0, 1), None if label is None else label.expand(rows.shape[:2].numel()))
        names = [f"direction {number}" for number in range(1, len(rows) + 1)]
        titles = [f"{amount:+}" if amount else "0" for amount in amounts]
        figures.sample_grid(images, row_names=names, column_names=titles).save(self.folder / "directions.png")

    def _write_columns(self, name: str, columns: list[Tensor], row_names: list[str]) -> None:
        """Write interpolations as rows of an image, and as an animation back and forth.

        Args:
            columns: the images of each step (g_num, 3, S, S).
            row_names: names of the rows, or none.
        """
        grid = figures.sample_grid(torch.stack(columns, 1).flatten(0, 1), len(columns), row_names)
        grid.save(self.folder / f"{name}.png")
        frames = [figures.sample_grid(column, columns=len(column)) for column in columns]
        figures.save_animation(self.folder / f"{name}.gif", [*frames, *frames[-2::-1]], seconds=0.15)

    def _write_progress(self) -> None:
        """Write an animation of the sample grids that training saved up to this step, all of the same z."""
        grids = files_by_step(self.config.sample_folder, "ema.png" if self.is_ema else "fake.png")
        steps = evenly_spaced([step for step in grids if step <= self.step], PROGRESS_FRAMES)
        if frames := figures.progress_frames({step: grids[step] for step in steps}):
            figures.save_animation(self.folder / "progress.gif", frames, seconds=0.25)

    def _write_playground(self, z: Tensor, label: Tensor | None) -> Path:
        """Write the grid between four z (4, z_dim) for each class, first for that of `label` (1,). Returns its path."""
        numbers = [] if label is None else [*dict.fromkeys([label.item(), *self.selected_classes])]
        classes = [(self.classes[number], number) for number in numbers[: figures.CLASS_ROWS]] or [("", None)]
        corner = f"the z nearest to {Path(self.config.project).name}" if self.config.project else ""
        playground = generate_playground(self.G, z, self.directions, classes)
        path = self.folder / "playground.html"
        page = playground_page(playground, f"{self.config.version}, step {self.step}", corner, len(numbers))
        path.write_text(page, encoding="utf-8")
        return path

    def _write_attention(self) -> Path:
        """Write a figure per attention layer, and the explorer. Returns the explorer's path."""
        count = self.config.g_num
        real = self.loader.batch(0, slice(count)) if self.loader else ()
        samples = collect_attention(self.G, self.D, *self._inputs(count), *real, classes=self.classes)
        for name, figure in figures.attention_figures(samples, self.step).items():
            figure.save(self.folder / f"{name}.png")
        return write_explorer(self.config.attn_folder, self.config.version, self.step, samples)

    def _write_attention_stats(self) -> None:
        """Write and print the attention statistics of each layer, averaged over generated images."""
        z, labels = self._inputs(SUMMARY_IMAGES)
        batches = [(z[rows], None if labels is None else labels[rows]) for rows in torch.arange(len(z)).split(32)]
        layers = mean_attention_stats(
            collect_attention(self.G, self.D, *batch, classes=self.classes)[0]
            for batch in progress(batches, "attention statistics", "batch")
        )
        print(f"attention statistics over {SUMMARY_IMAGES} generated images (uniform attention in brackets):")
        print(textwrap.indent(format_attention_stats(layers), "  "))
        numbers = {
            layer: {"side": side, "key_side": key_side, **stats._asdict(),
                    "uniform": uniform_attention_stats(side, key_side)._asdict()}
            for layer, ((side, key_side), stats) in layers.items()
        }  # fmt: skip
        self._write_json("attention.json", numbers)

    def _write_nearest(self) -> None:
        """Write the training images nearest to some samples, with the distances between training images as baseline."""
        images = self.loader.images
        samples = self.G(*self._inputs(NEAREST_SAMPLES))
        found = nearest_images(samples, images, NEAREST_NEIGHBORS)
        neighbors = self.loader.images_at(found.indices.flatten()).unflatten(0, found.indices.shape)
        neighbors[found.mirrored] = neighbors[found.mirrored].flip(3)
        chosen = torch.from_numpy(np.random.default_rng(self.config.seed).permutation(len(images))[:64])
        baseline = nearest_images(self.loader.images_at(chosen), images, 2).distances[:, 1]  # [:, 0]: the image itself
        footer = (
            "Numbers: RMSE of pixels in [-1, 1], to a training image or its mirror image. Mean of the nearest:\n"
            f"{found.distances[:, 0].mean():.3f} from these samples, {baseline.mean():.3f} from other training images."
        )
        captions = [["", *(f"{rmse:.3f}" for rmse in row)] for row in found.distances.tolist()]
        rows, titles = torch.cat([samples[:, None], neighbors], 1), ("sample", "nearest training images (RMSE)")
        figures.comparison_figure(rows, titles, captions, footer).save(self.folder / "nearest.png")

    def _write_metrics(self) -> None:
        """Write and print the metrics that `--metrics` lists."""
        scores, count = compute_metrics(self.config, self.G, self.loader), self.config.metric_num
        how = ", classes as frequent as in the training images" if self.classes else ""
        print(f"metrics of {count} images{how}: " + ", ".join(f"{name} {value:.4g}" for name, value in scores.items()))
        protocol = {name: getattr(self.config, name) for name in DATA_OPTIONS}
        protocol |= {"step": self.step, "images": count, "ema": self.is_ema}
        protocol |= {"checksum": checksum(self.G.state_dict()), "data": self.loader.fingerprint}
        self._write_json("metrics.json", protocol | scores)

    def _inputs(self, count: int, stream: int = SEED_SAMPLES) -> tuple[Tensor, Tensor | None]:
        """Return z (count, z_dim) and labels (count,): the selected classes in turn, None without classes."""
        labels = classes_in_turn(self.selected_classes, count).to(self.device) if self.classes else None
        return draw_z(self.config, count, self.device, stream), labels

    def _names(self, numbers: Iterable[int]) -> list[str]:
        return [figures.shorten(self.classes[number]) for number in numbers]

    def _write_json(self, name: str, content: dict) -> None:
        (self.folder / name).write_text(json.dumps(content, indent=2), encoding="utf-8")
