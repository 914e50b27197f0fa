"""Numbers recorded from the reference and from the paper's networks, computed again by ours and compared."""

import copy
import re
import zlib

import numpy as np
import torch

from networks.losses import g_loss, hinge_d_loss


def draw(key: str, shape: tuple[int, ...], salt: str) -> np.ndarray:
    """Normal numbers seeded by a tensor's name, as the oracle of this salt draws them."""
    random = np.random.RandomState(zlib.crc32(f"{salt}/{key}".encode()))
    return random.standard_normal(shape).astype("float32")


def fill_as_oracle(network: torch.nn.Module, salt: str) -> torch.nn.Module:
    """Set the weights with which an oracle's numbers were recorded. Returns the network."""
    for key, tensor in network.state_dict().items():
        values = np.asarray(draw(key, tuple(tensor.shape), salt))
        if key.endswith(("_u", "_v")):
            values = values / np.linalg.norm(values)
        elif "running_var" in key:
            values = np.abs(values) + 0.5
        elif "num_batches_tracked" in key:
            values = np.zeros_like(values)
        elif "gamma" in key:
            values = np.full_like(values, 0.5)
        else:
            is_batch_norm = ".1.weight" in key or re.search(r"(\.|^)bn\d?\.weight$", key)
            values = 1 + 0.1 * values if is_batch_norm else 0.05 * values
        tensor.copy_(torch.from_numpy(np.asarray(values)))
    return network


def oracle_inputs(salt: str) -> tuple[torch.Tensor, torch.Tensor]:
    """z (4, 128) and real images (4, 3, 64, 64) of an oracle."""
    return torch.from_numpy(draw("z", (4, 128), salt)), torch.from_numpy(draw("real", (4, 3, 64, 64), salt).clip(-1, 1))


def replay(
    G: torch.nn.Module, D: torch.nn.Module, z: torch.Tensor, real: torch.Tensor, rows: dict[str, int]
) -> dict[str, np.ndarray]:
    """Return what an oracle recorded, computed by our networks; of the maps, column sums and one row each."""
    before, ours = copy.deepcopy((G, D)), {}

    def gradients(network, prefix):
        for key, parameter in network.named_parameters():
            # In fp32, as it was recorded: torch's sum over 9 million squares is off by 3e-4.
            ours[f"{prefix}_gradnorm/{key}"] = parameter.grad.float().norm().numpy()
            ours[f"{prefix}_gradhead/{key}"] = parameter.grad.flatten()[:8].numpy()

    image = G(z)
    ours["g_image"] = image.detach().numpy()
    ours |= {f"G_after/{key}": value.clone().numpy() for key, value in G.state_dict().items()}
    real_logits = D(real)
    d_loss_real, _ = hinge_d_loss(real_logits, real_logits)
    d_loss_real.backward()
    gradients(D, "D")
    D.zero_grad()
    fake_logits = D(image)
    _, d_loss_fake = hinge_d_loss(fake_logits, fake_logits)
    loss = g_loss(fake_logits)
    loss.backward()
    gradients(G, "G")
    ours |= {
        "d_logits_real": real_logits.detach().numpy(),
        "d_loss_real": d_loss_real.item(),
        "d_logits_fake_second_forward": fake_logits.detach().numpy(),
        "d_loss_fake": d_loss_fake.item(),
        "g_loss": loss.item(),
    }

    # The attention maps of the same forwards.
    for network, x, prefix in zip(before, (z, real), "gd", strict=True):
        with torch.no_grad():
            _, *maps = network(x, return_attention=True)
        for index, attention in enumerate(maps, 1):
            name = f"{prefix}_attn{index}"
            ours |= {f"{name}_sum": attention.sum(1).numpy(), f"{name}_row": attention[:, rows[name]].numpy()}
    return ours


def assert_as_recorded(ours: dict[str, np.ndarray], oracle: dict[str, np.ndarray], without_gradient: str = "") -> None:
    """Compare our numbers with an oracle's to 1e-4 of each tensor's largest value.

    Args:
        ours: numbers by the oracle's names.
        without_gradient: matches the names of gradients that are 0, of which rounding errors were recorded.
    """
    for key, values in ours.items():
        expected, actual = np.asarray(oracle[key], np.float64), np.asarray(values, np.float64)
        if re.fullmatch(without_gradient, key):
            assert np.abs(actual).max() < 1e-6, key
        else:
            assert np.abs(actual - expected).max() <= 1e-4 * np.abs(expected).max(), key
