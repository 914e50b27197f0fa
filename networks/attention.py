"""Matrix products of self-attention: the fastest way on each device, and the explicit N x N map.

Fused kernels on an NVIDIA GPU never store the map. Those of the CPU are slow, so the map is computed there, with a
backward written by hand: autograd's asks for memory layouts in which a CPU's matrix product is four to eight times
slower. Other devices multiply by the explicit map: fused kernels of MPS are wrong before torch 2.12 where values are
wider than queries.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# The kernel that allows values and queries of different widths, and a fallback; torch's choice varies by version.
FUSED = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return ``softmax(q k^T) v``, not scaled by sqrt(d), with logits and softmax in fp32 for any input type.

    Args:
        query, key: (B, N, d).
        value: (B, N, C).

    Returns:
        (B, N, C), which can be differentiated once only; use `attention_map` for a double backward.
    """
    if value.device.type == "cpu":
        return _AttendOnCpu.apply(query, key, value)
    if value.device.type != "cuda":
        return attention_map(query, key).to(value.dtype) @ value
    padding = (0, -query.shape[2] % 8)  # the fused kernel needs multiples of 8; zeros do not change the logits
    # Contiguous, because the kernel needs rows that are contiguous and aligned to the 16 bytes that it loads at once.
    heads = [tensor.contiguous().unsqueeze(1) for tensor in (F.pad(query, padding), F.pad(key, padding), value)]
    with sdpa_kernel(FUSED):
        return F.scaled_dot_product_attention(*heads, scale=1.0).squeeze(1)  # one head


def attention_map(query: Tensor, key: Tensor) -> Tensor:
    """Return ``softmax(q k^T)`` in fp32, (B, N, N), of (B, N, d) each; row i is what position i attends to."""
    with torch.autocast(query.device.type, enabled=False):
        return torch.softmax(query.float() @ key.float().transpose(1, 2), dim=-1)


class _AttendOnCpu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key = query.transpose(1, 2).contiguous(), key.transpose(1, 2).contiguous()  # (B, d, N)
        with torch.autocast("cpu", enabled=False):
            logits = query.float().transpose(1, 2) @ key.float()  # (B, N, N)
            attention = torch.softmax(logits, -1, out=logits).to(value.dtype)
            out = attention @ value  # (B, N, C)
        ctx.save_for_backward(query, key, value, attention, out)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, attention, out = ctx.saved_tensors
        grad_value = (grad.transpose(1, 2) @ attention).transpose(1, 2)
        # Softmax: dS = A * (dA - rowsum(dA * A)); the row sum equals rowsum(grad * out) (Dao et al., 2205.14135).
        grad_logits = grad @ value.transpose(1, 2)
        grad_logits.sub_((grad * out).sum(-1, keepdim=True)).mul_(attention)
        grad_query = (key @ grad_logits.transpose(1, 2)).transpose(1, 2)
        grad_key = (query @ grad_logits).transpose(1, 2)
        return grad_query, grad_key, grad_value
