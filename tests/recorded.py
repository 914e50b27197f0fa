"""Numbers recorded from the reference and from StudioGAN's SAGAN (64x64, batch 4, float32 on a CPU), and our own."""

import copy
import re
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from networks.losses import g_loss, hinge_d_loss
from training.models import MODELS

FILES = {"sagan": "reference_64.npz", "paper": "paper_64.npz"}
SALTS = {"sagan": "public", "paper": "paper"}
ROWS = {  # of the recorded maps
    "sagan": {"g_attn1": 17, "g_attn2": 333, "d_attn1": 5, "d_attn2": 3},
    "paper": {"g_attn1": 333, "d_attn1": 333},
}


def read_oracle(model: str) -> dict[str, np.ndarray]:
    return dict(np.load(Path(__file__).parent / FILES[model]))


def draw(model: str, key: str, shape: tuple[int, ...]) -> Tensor:
    """Normal numbers seeded by a tensor's name, as they were drawn for the recording."""
    random = np.random.RandomState(zlib.crc32(f"{SALTS[model]}/{key}".encode()))
    return torch.tensor(random.standard_normal(shape).astype("float32"))


def recorded_networks(model: str) -> tuple[nn.Module, nn.Module]:
    """G and D with the weights of the recording."""
    networks = MODELS[model].Generator(), MODELS[model].Discriminator()
    for key, tensor in (*networks[0].state_dict().items(), *networks[1].state_dict().items()):
        values = draw(model, key, tuple(tensor.shape))
        if key.endswith(("_u", "_v")):
            values /= values.norm()
        elif "running_var" in key:
            values = values.abs() + 0.5
        elif "num_batches_tracked" in key:
            values.zero_()
        elif "gamma" in key:
            values.fill_(0.5)
        else:
            is_batch_norm = re.search(r"\.1\.weight|(\.|^)bn\d?\.weight$", key)
            values = 1 + 0.1 * values if is_batch_norm else 0.05 * values
        tensor.copy_(values)
    return networks


def replay(model: str, dtype: torch.dtype) -> dict[str, np.ndarray]:
    """Return what was recorded, computed by our networks in float32 or float64; of the maps, column sums and one row.

    With gradients in float64 only: rounding in float32 changes the sign of a few inputs of ReLUs, and with them
    gradients of the paper's G by up to 1%.
    """
    G, D = (network.to(dtype) for network in recorded_networks(model))
    z, real = draw(model, "z", (4, 128)).to(dtype), draw(model, "real", (4, 3, 64, 64)).clip(-1, 1).to(dtype)
    ours = {}
    for network, x, prefix in ((G, z, "g"), (D, real, "d")):
        with torch.no_grad():
            _, *maps = copy.deepcopy(network)(x, return_attention=True)
        for index, attention in enumerate(maps, 1):
            name = f"{prefix}_attn{index}"
            ours |= {f"{name}_sum": attention.sum(1), f"{name}_row": attention[:, ROWS[model][name]]}

    def backward(loss: Tensor, network: nn.Module, prefix: str) -> None:
        if loss.requires_grad:
            loss.backward()
            for key, parameter in network.named_parameters():
                # In float32, as it was recorded: torch's sum over 9 million squares is off by 3e-4.
                ours[f"{prefix}_gradnorm/{key}"] = parameter.grad.float().norm()
                ours[f"{prefix}_gradhead/{key}"] = parameter.grad.flatten()[:8].clone()

    with torch.set_grad_enabled(dtype == torch.float64):
        ours["g_image"] = image = G(z)
        ours |= {f"G_after/{key}": value.clone() for key, value in G.state_dict().items()}
        ours["d_logits_real"] = real_logits = D(real)
        ours["d_loss_real"], _ = hinge_d_loss(real_logits, real_logits)
        backward(ours["d_loss_real"], D, "D")
        ours["d_logits_fake_second_forward"] = fake_logits = D(image)
        _, ours["d_loss_fake"] = hinge_d_loss(fake_logits, fake_logits)
        ours["g_loss"] = g_loss(fake_logits)
        backward(ours["g_loss"], G, "G")
    return {name: value.detach().double().numpy() for name, value in ours.items()}
