"""The matrix products of self-attention, by what runs fastest where; the N x N maps never leave this file.

On GPUs torch's fused kernels hold no map at all. They are slow on a CPU, so there the maps are made, and the backward
is written out: autograd's own asks the CPU's matrix product for shapes that it is four to eight times slower at.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# The kernel that takes queries and values of different widths, and a way out; torch's own choice changes with versions.
FUSED = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """``softmax(q k^T) v``, not scaled by sqrt(d). Logits and softmax are computed in fp32 whatever the inputs are.

    Args:
        query, key: (B, N, d).
        value: (B, N, C).

    Returns:
        (B, N, C). It can be differentiated once: a gradient penalty needs `attention_map`.
    """
    if value.device.type == "cpu":
        return _AttendOnCpu.apply(query, key, value)
    padding = (0, -query.shape[2] % 8)  # the fused kernel wants multiples of 8; zeros change no logit
    heads = [tensor.unsqueeze(1) for tensor in (F.pad(query, padding), F.pad(key, padding), value)]  # one head
    with sdpa_kernel(FUSED):
        return F.scaled_dot_product_attention(*heads, scale=1.0).squeeze(1)


def attention_map(query: Tensor, key: Tensor) -> Tensor:
    """``softmax(q k^T)`` in fp32: (B, N, d) twice -> (B, N, N); row i is what position i looks at."""
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
        # Through softmax: dS = A * (dA - sum_j dA A), where the sum is that of grad * out (Dao et al., 2205.14135).
        grad_logits = grad @ value.transpose(1, 2)
        grad_logits.sub_((grad * out).sum(-1, keepdim=True)).mul_(attention)
        grad_query = (key @ grad_logits.transpose(1, 2)).transpose(1, 2)
        grad_key = (query @ grad_logits).transpose(1, 2)
        return grad_query, grad_key, grad_value
