"""Measure the speed of decoding into the cache, of opening the cache and of gathering batches.

    python benchmarks/data.py                                     # 20,000 noise images of CelebA's size
    python benchmarks/data.py --image_path data/CelebA            # your own images

Decoding is compared with the speed of Pillow alone on one core, times the number of workers.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datasets.sources import Source, find_source

SAMPLE = 5000  # evenly spaced images for the rate of one core
BATCHES = 500
CROP = 160  # pixels, as for CelebA


def write_images(folder: Path, count: int) -> None:
    """Write JPEG files of CelebA's size, 178x218, which take as long to decode as photographs."""
    random = np.random.default_rng(0)
    for index in range(count):
        coarse = random.integers(0, 256, (28, 23, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((178, 218), Image.Resampling.BICUBIC).save(
            folder / f"{index:06}.jpg", quality=90
        )


def one_core(source: Source, folder: str, size: int) -> float:
    """Return the images/s that Pillow alone opens, decodes, crops and resizes in this process."""
    items = source.items[:: max(1, len(source.items) // SAMPLE)]
    start = time.perf_counter()
    for item in items:
        with Image.open(Path(folder) / item) as image:
            left, top = (image.width - CROP) / 2, (image.height - CROP) / 2
            square = image.convert("RGB").crop((left, top, left + CROP, top + CROP))
            square.resize((size, size), Image.Resampling.BILINEAR)
    return len(items) / (time.perf_counter() - start)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image_path", help="folder of images; without it, noise images are written")
    parser.add_argument("--images", type=int, default=20_000, help="number of noise images")
    parser.add_argument("--imsize", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--num_workers", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def main() -> None:
    from data_loader import Loader  # not at the top: worker processes import this file, not torch
    from datasets.cache import open_cache

    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as scratch:
        if not arguments.image_path:
            write_images(Path(scratch), arguments.images)
        folder = arguments.image_path or scratch
        source = find_source("folder", folder, crop_size=CROP)
        before = one_core(source, folder, arguments.imsize)

        cache = Path(scratch) / "cache"
        start = time.perf_counter()
        images, _ = open_cache(source, arguments.imsize, cache, arguments.num_workers)
        rate = len(images) / (time.perf_counter() - start)
        single = (before + one_core(source, folder, arguments.imsize)) / 2  # the machine's speed may have changed
        start = time.perf_counter()
        open_cache(source, arguments.imsize, cache)
        opened = time.perf_counter() - start

        loader = Loader(
            source, arguments.imsize, arguments.batch_size, cache_path=str(cache), device=arguments.device
        ).open()
        loader.batch(0)
        start = time.perf_counter()
        for position in range(BATCHES):
            batch, _ = loader.batch(position)
        batch.sum().item()  # wait for the device
        gather = (time.perf_counter() - start) / BATCHES

    workers = max(1, arguments.num_workers)  # 0: this process decodes
    print(f"one core decodes       {single:8.0f} images/s")
    print(f"{workers} workers decode       {rate:8.0f} images/s, {rate / (workers * single):.0%} of {workers} cores")
    print(f"opening the cache      {opened * 1e3:8.1f} ms")
    print(f"a batch of {arguments.batch_size:<4}        {gather * 1e3:8.2f} ms on {arguments.device}")


if __name__ == "__main__":
    main()
