"""The entry points of torch.hub.

G = torch.hub.load("OWNER/REPOSITORY", "generator", checkpoint="generator.safetensors")
G = torch.hub.load("OWNER/REPOSITORY", "generator", pretrained="faces64")       # weights of the repository
D = torch.hub.load(".", "discriminator", source="local", image_size=128)        # random weights
"""

import importlib
import pathlib
import sys
import types

dependencies = ["torch", "numpy", "tqdm", "safetensors"]


def _import_apart(package, *names):
    """Import modules of this repository below a package's name, once, and return them.

    The program may have, or import later, other modules of their names (utils, datasets, training, ...).
    """
    root = pathlib.Path(__file__).parent
    own = {path.stem for path in root.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}

    def take():
        return {name: sys.modules.pop(name) for name in [*sys.modules] if name.partition(".")[0] in own}

    if getattr(sys.modules.get(package), "__path__", None) != [str(root)]:
        others = take()
        try:
            for name in names:
                importlib.import_module(name)
        finally:
            modules = take()
            sys.modules.update(others)
        sys.modules[package] = types.ModuleType(package)
        sys.modules[package].__path__ = [str(root)]
        for name, module in modules.items():
            sys.modules[f"{package}.{name}"] = module
            module.__name__ = f"{package}.{name}"
            for value in vars(module).values():  # pickle, inspect and torch.compile find its code by these names
                if isinstance(value, (type, types.FunctionType)) and value.__module__ == name:
                    value.__module__ = module.__name__
    return [sys.modules[f"{package}.{name}"] for name in names]


_loading, _models, _spectral = _import_apart("sagan_hub", "exporting.loading", "training.models", "spectral")


def generator(checkpoint=None, network="sagan", image_size=64, z_dim=128, conv_dim=64, num_classes=0, pretrained=None):
    """Return a generator on the CPU in evaluation mode: G(z) -> images (B, 3, S, S) in [-1, 1], of z (B, z_dim).

    A conditional generator takes G(z, labels), with labels (B,) below num_classes. G(z, return_attention=True) also
    returns the attention maps (B, queries, keys).

    Args:
        checkpoint: path or URL of generator.safetensors or G.safetensors, of {step}_state.pth, whose EMA generator is
            returned, or of {step}_G.pth, also one of heykeetae/Self-Attention-GAN. Sizes are read from it, and the
            arguments below are ignored. None: random weights. A file on the web is downloaded once, into torch.hub's
            folder.
        network: "sagan" (the networks of heykeetae/Self-Attention-GAN) or "paper" (the ResNets of the paper).
        image_size: 32, 64, 128 or 256; of "paper" up to 128.
        conv_dim: width of the last block, of "paper" at size 32 a quarter of it; a multiple of 8.
        num_classes: of "paper"; 0 for an unconditional generator.
        pretrained: in place of `checkpoint`, the name of a folder of weights in the repository's pretrained/.

    Raises:
        ValueError: a value is not allowed, or the file has no generator or cannot be read.
    """
    if pretrained is not None:
        checkpoint = _loading.pretrained_file(pretrained, "G")
    if checkpoint is not None:
        return _loading.load_generator(checkpoint)
    return _new("Generator", network, num_classes, image_size, z_dim, conv_dim)


def discriminator(checkpoint=None, network="sagan", image_size=64, conv_dim=64, num_classes=0, pretrained=None):
    """Return a discriminator on the CPU in evaluation mode: D(images) -> logits (B,), of (B, 3, S, S) in [-1, 1].

    Labels, attention maps, arguments and errors are those of `generator`, except that checkpoint is {step}_state.pth,
    {step}_D.pth or D.safetensors, and conv_dim is the width of the first block (of "paper" at size 32, half of it).
    """
    if pretrained is not None:
        checkpoint = _loading.pretrained_file(pretrained, "D")
    if checkpoint is not None:
        return _loading.load_discriminator(checkpoint)
    return _new("Discriminator", network, num_classes, image_size, conv_dim)


def _new(kind, network, num_classes, *sizes):
    """Return a network with random weights, and with the sigma of spectral norm that training would soon find."""
    if network not in _models.MODELS:
        raise ValueError(f"network must be one of {', '.join(_models.MODELS)}, got {network}")
    result = getattr(_models.MODELS[network], kind)(*sizes, num_classes=num_classes)
    for layer in result.modules():
        if isinstance(layer, _spectral.SpectralNorm):
            for _ in range(20):
                layer._power_iteration()
    return result.eval()
