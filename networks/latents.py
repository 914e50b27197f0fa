"""The noise z that generators start from: drawn from a seed, and the ways between two of its points."""

import torch
from torch import Tensor


def sample_z(seed: int, count: int, z_dim: int, device: torch.device | str, truncation: float | None = None) -> Tensor:
    """Normal noise (count, z_dim) drawn on the CPU: the same on every device.

    With `truncation`, numbers beyond it on either side are drawn anew (Brock et al., arXiv 1809.11096, section 3.1):
    images nearer to the average one, and less varied.
    """
    random = torch.Generator().manual_seed(seed)
    if truncation is None:
        return torch.randn(count, z_dim, generator=random).to(device)
    z = torch.empty(count, z_dim)
    return torch.nn.init.trunc_normal_(z, a=-truncation, b=truncation, generator=random).to(device)


def slerp(start: Tensor, end: Tensor, count: int) -> Tensor:
    """`count` points from each start to its end, both included, along the great circle between their directions.

    On a straight line the points in the middle would be shorter than any that G was trained on (White, *Sampling
    Generative Networks*, arXiv 1609.04468); here the length goes evenly from one to the other.

    Args:
        start, end: (B, z_dim), none of them 0.
        count: 2 or more.

    Returns:
        (B, count, z_dim).
    """
    lengths = start.norm(dim=1, keepdim=True), end.norm(dim=1, keepdim=True)
    start, end = start / lengths[0], end / lengths[1]
    angle = (start * end).sum(1, keepdim=True).clamp(-1, 1).acos()[..., None]  # (B, 1, 1)
    share = torch.linspace(0, 1, count, device=start.device)[None, :, None]  # (1, count, 1)
    towards = torch.sin((1 - share) * angle) * start[:, None] + torch.sin(share * angle) * end[:, None]
    towards = torch.where(angle < 1e-4, start[:, None], towards / torch.sin(angle))  # nearly equal: 0 / 0
    return towards * torch.lerp(lengths[0][:, None], lengths[1][:, None], share)
