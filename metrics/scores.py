"""How good generated images are, in numbers: FID, KID, Inception Score, precision and recall, and a face rate.

    scores = evaluate(generate, loader.images, ["fid", "faces"], num_images=10_000, batch_size=64, ...)

Protocol. The first `num_images` images of the averaged generator in evaluation mode, of noise that the seed decides,
rounded to uint8, are compared with `num_images` real images (all, if there are fewer) from all over the training data,
as training sees them: the same crop and resize, no flips. Arithmetic is float32 whatever training uses.
torch-fidelity computes:

- fid, kid (100 subsets of up to 1,000 images; kid_std is the spread over them) and isc (10 splits; isc_std) on the
  Inception network of the original FID, with its own resize to 299x299;
- precision, recall and f_score (prc) on VGG16, with its own resize to 224x224, by 3 nearest neighbours.

With a `feature_extractor` of one's own, a TorchScript file, all of these use it instead: images (B, 3, S, S) uint8 in,
features (B, F) out, F >= 2; isc takes the same output as logits. Such a file is a program: loading it runs what is in
it, so it must come from someone you trust.

faces is the share of generated images in which OpenCV's frontal-face cascade finds a face, faces_real that of the real
images: the yardstick, because the detector misses some. It is 0.96 on CelebA at 64x64, and 0 on noise.

FID falls with more images: compare values of equal `num_images` only. 10,000 or more are customary; below 2,048, the
number of Inception's features, FID says little, and KID, which is unbiased, is the better guide.

torch-fidelity and opencv-python-headless are imported where they are needed: only who asks for a metric needs them.
"""

import glob
import json
import os
import random
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from errors import UserError
from metrics.extractors import Extractor, find_extractors, registered
from metrics.faces import face_rate, open_cascade
from utils import progress

Batches = Callable[[int, int], Tensor]  # (start, count) -> images start ... start + count - 1, (count, 3, S, S)

RESULTS = {  # torch-fidelity's names of results, and ours
    "frechet_inception_distance": "fid",
    "kernel_inception_distance_mean": "kid",
    "kernel_inception_distance_std": "kid_std",
    "inception_score_mean": "isc",
    "inception_score_std": "isc_std",
    "precision": "precision",
    "recall": "recall",
    "f_score": "f_score",
}
ISC_SPLITS = 10
MIN_IMAGES = ISC_SPLITS  # an image for each split; the others need fewer
KID_SUBSET = 1000
PRC_BATCH = 1000  # rows of the matrix of distances that are in memory at a time


def compute_scores(
    generate: Batches,
    real: Tensor | np.ndarray,
    names: Sequence[str],
    *,
    num_images: int,
    batch_size: int,
    device: torch.device,
    cache_path: Path,
    real_name: str,
    feature_extractor: Path | None = None,
) -> dict[str, float]:
    """Measures generated images against real ones. Random state and torch's switches are afterwards as before.

    Args:
        generate: generate(start, count) -> images number start ... start + count - 1, (count, 3, S, S) in [-1, 1] on
            any device, from a network in evaluation mode; called from 0 on, once more for each extractor.
        real: real images (N, S, S, 3) uint8, which may be memory-mapped or on the GPU; read batch by batch.
        names: some of "fid", "kid", "isc", "prc", "faces".
        num_images: how many to generate, and the most real ones to compare with.
        batch_size: images that are generated and seen by an extractor at a time; results do not depend on it.
        device: where the extractors run; the CPU for what is neither CUDA nor CPU.
        cache_path: the folder for downloaded weights; what is computed from the real images is kept in its `metrics`.
        real_name: names the real images, for a file's name: changes whenever they do. Count and size are added here.
        feature_extractor: a TorchScript file to use instead of Inception and VGG16, see above.

    Returns:
        Those of fid, kid, kid_std, isc, isc_std, precision, recall, f_score, faces, faces_real that were asked for.

    Raises:
        UserError: a library, weights or the extractor cannot be had or used, there are too few images, the cache
            cannot be written, or the generator's images are not finite.
    """
    fewest = min(num_images, len(real))
    if fewest < MIN_IMAGES:
        raise UserError(f"--metrics {','.join(names)} needs {MIN_IMAGES} images at least, not {fewest}")
    cache = cache_path / "metrics"
    scores: dict[str, float] = {}
    with preserve_global_state(device), _writing(cache):
        real = torch.as_tensor(real)
        real = real[:: max(1, len(real) // num_images)][:num_images]  # a view, of images from all over the data
        key = f"{real_name}_{real.shape[1]}px_{len(real)}"
        fakes, reals = partial(_generated, generate), partial(_real, real)
        extractors = find_extractors(names, real.shape[1], device, cache_path, feature_extractor)
        if "faces" in names:
            scores["faces"] = face_rate(fakes, num_images, batch_size, "faces")
            scores["faces_real"] = _cached_rate(
                cache / f"{key}-faces.json", partial(face_rate, reals, len(real), batch_size, "faces of real images")
            )
        for extractor in extractors:
            scores |= _feature_scores(
                extractor, (fakes, num_images), (reals, len(real)), batch_size, device, cache, key
            )
    return scores


def check_requirements(
    names: Sequence[str],
    *,
    image_size: int,
    device: torch.device,
    cache_path: Path,
    feature_extractor: Path | None = None,
) -> None:
    """Makes sure that `evaluate` will find all it needs, and downloads weights: to be called before hours of training.

    Raises:
        UserError: a library, weights or the extractor cannot be had or used.
    """
    with preserve_global_state(device):
        find_extractors(names, image_size, device, cache_path, feature_extractor)
        if "faces" in names:
            open_cascade()


@contextmanager
def preserve_global_state(device: torch.device) -> Iterator[None]:
    """Leaves no trace in random state, torch's switches or the filters of warnings, which are all ignored inside.

    Inside, arithmetic is plain float32 and cuDNN does not look for faster algorithms: values can be compared between
    runs of any --precision, and with those that others publish.
    """
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    python, numpy_state = random.getstate(), np.random.get_state()
    switches = cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, matmul.allow_tf32
    on_cuda = device.type == "cuda"
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng([device] if on_cuda else []))
            stack.enter_context(warnings.catch_warnings())
            stack.enter_context(torch.no_grad())
            if on_cuda:
                stack.enter_context(torch.cuda.device(device))  # torch-fidelity goes to the current one
            warnings.simplefilter("ignore")
            cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, matmul.allow_tf32 = False, True, False, False
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)
        cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, matmul.allow_tf32 = switches


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Makes the folder, and says in one line what the system objects to there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except (OSError, RuntimeError) as error:
        # What torch.save says of a full disk is a RuntimeError that names its own source file.
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):
            raise
        reason = getattr(error, "strerror", None) or "the disk may be full"
        raise UserError(f"cannot write to {folder}: {reason}; --cache_path puts the cache elsewhere") from error


def _generated(generate: Batches, start: int, count: int) -> Tensor:
    """Generated images as a file would hold them: (count, 3, S, S) uint8."""
    images = generate(start, count).float()
    if not images.isfinite().all():
        raise UserError("the generator's images are not finite, there is nothing to measure: take an older checkpoint")
    return images.add(1).mul(127.5).round().clamp(0, 255).byte().contiguous()


def _real(real: Tensor, start: int, count: int) -> Tensor:
    """Real images (N, S, S, 3) as the extractors want them: (count, 3, S, S) uint8."""
    return real[start : start + count].permute(0, 3, 1, 2).contiguous()


def _feature_scores(
    extractor: Extractor,
    fakes: tuple[Batches, int],
    reals: tuple[Batches, int],
    batch_size: int,
    device: torch.device,
    cache: Path,
    key: str,
) -> dict[str, float]:
    """What torch-fidelity makes of generated and real images, each a function and how many; `key` names the real."""
    import torch_fidelity

    for path in cache.glob(f"{glob.escape(key)}-{extractor.name}-*.pt"):
        if not zipfile.is_zipfile(path):  # cut off, as by a loss of power: the library would stumble over it
            path.unlink()
    wanted = extractor.metrics
    with registered(extractor), progress(None, ", ".join(wanted), "img", total=0) as bar:
        results = torch_fidelity.calculate_metrics(
            input1=_source(*fakes, bar),
            input1_model_num_samples=fakes[1],
            input2=None if wanted == ["isc"] else _source(*reals, bar),  # isc looks at generated images alone
            input2_model_num_samples=reals[1],
            input2_cache_name=key,
            fid="fid" in wanted,
            kid="kid" in wanted,
            isc="isc" in wanted,
            prc="prc" in wanted,
            isc_splits=ISC_SPLITS,
            kid_subset_size=min(KID_SUBSET, fakes[1], reals[1]),
            prc_batch_size=PRC_BATCH,
            feature_extractor=extractor.name,
            feature_extractor_weights_path=str(extractor.weights),
            cuda=device.type == "cuda",
            batch_size=batch_size,
            cache_root=str(cache),
            save_cpu_ram=True,
            verbose=False,
        )
    return {ours: results[theirs] for theirs, ours in RESULTS.items() if theirs in results}


def _source(images: Batches, count: int, bar: tqdm) -> Any:
    """`count` images in the shape of a torch-fidelity generator. Adds them to the bar's total when they are begun.

    It pays no attention to the noise that it is given: what comes next is a function of the position alone.
    """
    from torch_fidelity import GenerativeModelBase

    class Source(GenerativeModelBase):
        z_size, z_type, num_classes = 1, "normal", 0

        def __init__(self):
            super().__init__()
            self.position = 0

        def forward(self, z: Tensor) -> Tensor:
            if self.position == 0:
                bar.total += count
            batch = images(self.position, len(z)).to(z.device)
            self.position += len(z)
            bar.update(len(z))
            return batch

    return Source()


def _cached_rate(path: Path, compute: Callable[[], float]) -> float:
    """A number from the file at `path`, or computed and written there."""
    try:
        return float(json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError):  # none yet, or damaged
        rate = compute()
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(rate), encoding="utf-8")
    os.replace(temporary, path)
    return rate
