"""What an exported generator is and where it comes from: metadata of its files, and content of its model card."""

import json
from dataclasses import dataclass
from typing import NamedTuple

from training.checkpoint import EXPORT_CONTENT, EXPORT_VERSION


class Data(NamedTuple):
    """Training images.

    Attributes:
        title: for a sentence.
        terms: one or two sentences on their license.
        license: of the generator, as model hubs name it.
        license_link: of a license that they have no name for.
        hub_name: of the dataset on huggingface.co, if it is there.
    """

    title: str
    terms: str
    license: str = "unknown"
    license_link: str | None = None
    hub_name: str | None = None


DATASETS = {
    "celeb": Data(
        "CelebA",
        "CelebA may be used for non-commercial research only (mmlab.ie.cuhk.edu.hk/projects/CelebA.html).",
        license="other",
        license_link="https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html",
        hub_name="flwrlabs/celeba",
    ),
    "cifar10": Data(
        "CIFAR-10",
        "The authors of CIFAR-10 state no license (www.cs.toronto.edu/~kriz/cifar.html).",
        hub_name="uoft-cs/cifar10",
    ),
    "lsun": Data("the churches of LSUN", "The authors of LSUN state no license for the images (github.com/fyu/lsun)."),
    "toy": Data(
        "faces drawn by the training program", "They are drawn by a program under the MIT license.", license="mit"
    ),
}
OTHER_DATA = Data(
    "images of the author of this export", "Not stated yet. State the license of the images before you publish this."
)
UNKNOWN_DATA = Data(
    "unknown images", "Not known. Find out which images these weights were trained on before you publish."
)


@dataclass(frozen=True)
class Description:
    """A generator.

    Attributes:
        model: of `training.models.MODELS`.
        image_size, z_dim, conv_dim, has_attention: of its constructor.
        classes: their names, () for an unconditional generator.
        step: of the checkpoint.
        is_ema: whether these are the EMA weights.
        dataset: value of `--dataset`; None for unknown images.
        num_images: number of training images; None if it is not known.
        batch_size: of training; None if it is not known.
        checksum: `training.models.checksum` of the generator before its spectral norm is folded.
    """

    model: str
    image_size: int
    z_dim: int
    conv_dim: int
    has_attention: bool
    classes: tuple[str, ...]
    step: int
    is_ema: bool
    dataset: str | None
    num_images: int | None
    batch_size: int | None
    checksum: int

    @property
    def data(self) -> Data:
        return UNKNOWN_DATA if self.dataset is None else DATASETS.get(self.dataset, OTHER_DATA)

    def metadata(self) -> dict[str, str]:
        """Return the metadata of the exported files; `exporting.safetensors_file` builds the network from it."""
        return {
            "content": EXPORT_CONTENT,
            "content_version": EXPORT_VERSION,
            "model": self.model,
            "image_size": str(self.image_size),
            "z_dim": str(self.z_dim),
            "conv_dim": str(self.conv_dim),
            "num_classes": str(len(self.classes)),
            "attention": "full" if self.has_attention else "none",
            "classes": json.dumps(self.classes),
            "step": str(self.step),
            "ema": str(self.is_ema).lower(),
            "checksum": str(self.checksum),
            "images": "(B, 3, image_size, image_size), RGB, from -1 to 1",
            "dataset": self.dataset or "",
            "data": self.data.title,
            "data_license": self.data.terms,
        }
