"""Matrix products of self-attention: the fastest way on each device, and the explicit map of N queries x M keys.

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


def self_attention(query: Tensor, key: Tensor, value: Tensor, return_attention: bool) -> tuple[Tensor, Tensor | None]:
    """Return the result of `attend` and None, or the result and the map: slower, and differentiable twice."""
    if not return_attention:
        return attend(query, key, value), None
    attention = attention_map(query, key)
    return attention.to(value.dtype) @ value, attention


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return ``softmax(q k^T) v`` (B, N, C), not scaled by sqrt(d), for q (B, N, d), k (B, M, d) and v (B, M, C).

    Logits and softmax are in fp32 for any input type. The result can be differentiated once only.
    """
    if value.device.type == "cpu":
        return _AttendOnCpu.apply(query, key, value)
    if value.device.type != "cuda":
        return attention_map(query, key).to(value.dtype) @ value
    # The fused kernel needs widths that are multiples of 8, where zeros do not change the logits, and rows that are
    # contiguous and aligned to the 16 bytes that it loads at once. All channels are one head.
    heads = [F.pad(tensor, (0, -tensor.shape[2] % 8)).contiguous()[:, None] for tensor in (query, key, value)]
    with sdpa_kernel(FUSED):
        return F.scaled_dot_product_attention(*heads, scale=1.0)[:, 0, :, : value.shape[2]]


def attention_map(query: Tensor, key: Tensor) -> Tensor:
    """Return ``softmax(q k^T)`` in fp32, (B, N, M), of (B, N, d) and (B, M, d); row i is what query i attends to."""
    with torch.autocast(query.device.type, enabled=False):
        return torch.softmax(query.float() @ key.float().transpose(1, 2), dim=-1)


class _AttendOnCpu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key = query.transpose(1, 2).contiguous(), key.transpose(1, 2).contiguous()  # (B, d, N), (B, d, M)
        with torch.autocast("cpu", enabled=False):
            logits = query.float().transpose(1, 2) @ key.float()  # (B, N, M)
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
