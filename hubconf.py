"""The entry points of torch.hub.

G = torch.hub.load("OWNER/REPOSITORY", "generator", checkpoint="generator.safetensors")
D = torch.hub.load(".", "discriminator", source="local", image_size=128)        # random weights
"""

from exporting import loading as _loading
from training import models as _models

dependencies = ["torch"]  # and safetensors for an export


def generator(checkpoint=None, model="sagan", image_size=64, z_dim=128, conv_dim=64, num_classes=0):
    """Return a self-attention GAN's generator: G(z) -> images (B, 3, S, S) in [-1, 1], of z (B, z_dim).

    A conditional generator takes G(z, labels), with labels (B,) below num_classes. G(z, return_attention=True) also
    returns the attention maps (B, queries, keys). It is on the CPU and in evaluation mode.

    Args:
        checkpoint: path or http(s) URL of generator.safetensors (needs `pip install safetensors`), of {step}_state.pth,
            whose EMA generator is returned, or of {step}_G.pth, also one of heykeetae/Self-Attention-GAN. Sizes are
            read from it, and the arguments below are ignored. None: random weights. A URL's file is downloaded once,
            into torch.hub's folder.
        model: "sagan" (the networks of heykeetae/Self-Attention-GAN) or "paper" (the ResNets of the paper).
        image_size: 32, 64, 128 or 256; of "paper" 64 or 128.
        z_dim: length of z.
        conv_dim: width of the last block, a multiple of 8.
        num_classes: of "paper"; 0 for an unconditional generator.

    Raises:
        ValueError: a value is not allowed, or the file has no generator or cannot be read.
    """
    if checkpoint is not None:
        return _loading.load_generator(checkpoint)
    return _pair(model, num_classes).make_G(image_size, z_dim, conv_dim, **_models.network_options(num_classes)).eval()


def discriminator(checkpoint=None, model="sagan", image_size=64, conv_dim=64, num_classes=0):
    """Return a self-attention GAN's discriminator: D(images) -> logits (B,), of images (B, 3, S, S) in [-1, 1].

    A conditional discriminator takes D(images, labels). D(images, return_attention=True) also returns the attention
    maps (B, queries, keys). It is on the CPU and in evaluation mode.

    Args:
        checkpoint: path or http(s) URL of {step}_state.pth or of {step}_D.pth, also one of
            heykeetae/Self-Attention-GAN; as in `generator`. An export has no discriminator.
        model, image_size, num_classes: as in `generator`.
        conv_dim: width of the first block, a multiple of 8.

    Raises:
        ValueError: a value is not allowed, or the file has no discriminator or cannot be read.
    """
    if checkpoint is not None:
        return _loading.load_discriminator(checkpoint)
    return _pair(model, num_classes).make_D(image_size, conv_dim, **_models.network_options(num_classes)).eval()


def _pair(model, num_classes):
    """Return the constructors of a model, after a check of what they do not check themselves."""
    if model not in _models.MODELS:
        raise ValueError(f"model must be one of {', '.join(_models.MODELS)}, got {model}")
    if num_classes and _models.MODELS[model].g_num_classes is None:
        raise ValueError(f"the networks of model {model} have no classes: num_classes must be 0")
    return _models.MODELS[model]
