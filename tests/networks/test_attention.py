"""Matrix products of self-attention against explicit maps; maps of layers are in test_networks.py."""

import pytest
import torch
import torch.nn.functional as F

from networks.attention import attend, attention_map

N = 20  # queries; pooled keys are a quarter of them


def claiming(device, tensors):
    """The tensors, which say that they are on another device."""

    class Elsewhere(torch.Tensor):
        @property
        def device(self):
            return torch.device(device)

    return [tensor.as_subclass(Elsewhere) for tensor in tensors]


def inputs(dtype=torch.float32, grad=True, keys=N):
    torch.manual_seed(0)
    shapes = ((3, N, 4), (3, keys, 4), (3, keys, 32))
    return [torch.randn(shape).to(dtype).requires_grad_(grad) for shape in shapes]


def explicit(query, key, value):
    return attention_map(query, key).to(value.dtype) @ value


@pytest.mark.parametrize("keys", [N, N // 4])
def test_the_fast_path_equals_the_explicit_one_in_values_and_gradients(keys):
    """Under autocast within a few rounding steps of bf16, relative to their norms."""
    results = []
    for function, dtype in ((explicit, torch.float32), (attend, torch.float32), (attend, torch.bfloat16)):
        tensors = inputs(keys=keys)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = function(*(tensor.to(dtype) for tensor in tensors)).float()
        (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
        results.append([out, *(tensor.grad for tensor in tensors)])
    for expected, actual, bf16 in zip(*results, strict=True):
        assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert (bf16 - expected).norm() <= 2**-6 * expected.norm()


def test_logits_of_bf16_inputs_are_fp32():
    query, key, value = inputs(torch.bfloat16, grad=False)
    query, key = 10 * query, 10 * key  # logits of several hundred, which bf16 would round by 1
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(query, key, value)
    expected = explicit(query.float(), key.float(), value.float())
    assert out.dtype == torch.bfloat16
    assert (out.float() - expected).abs().max() <= 2**-7 * expected.abs().max()


@pytest.mark.parametrize("device, keys", [("mps", N), ("mps", N // 4), ("xpu", N)])
def test_other_devices_multiply_by_the_explicit_map(monkeypatch, device, keys):
    """torch's fused attention on MPS returns a wrong width before torch 2.12."""
    monkeypatch.setattr(F, "scaled_dot_product_attention", None)
    query, key, value = inputs(keys=keys)
    out = attend(*claiming(device, (query, key, value)))
    assert torch.equal(out.as_subclass(torch.Tensor), explicit(query, key, value))
    (gradient,) = torch.autograd.grad(out.square().sum(), query, create_graph=True)
    gradient.sum().backward()
    assert value.grad.isfinite().all()


@pytest.mark.parametrize("d, c", [(8, 64), (5, 40), (1, 8), (1, 4)])
@pytest.mark.parametrize("keys", [16, 4])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_the_fused_kernel_is_given_what_it_can_read(monkeypatch, memory_format, keys, d, c):
    """Rows that are contiguous and begin at multiples of 16 bytes; otherwise torch falls back to explicit maps."""
    given = []
    attention = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *heads, scale: given.extend(heads) or attention(
        *(head.as_subclass(torch.Tensor) for head in heads), scale=scale))  # fmt: skip
    projected = torch.randn(2, 2 * d + c, 4, 4).contiguous(memory_format=memory_format)
    query, key, value = projected.flatten(2).transpose(1, 2).split([d, d, c], 2)
    key, value = key[:, :keys], value[:, :keys]
    out = attend(*claiming("cuda", (query, key, value)))
    torch.testing.assert_close(out, explicit(query, key, value), rtol=1e-5, atol=1e-5)
    assert [head.shape[:3] for head in given] == [(2, 1, 16), (2, 1, keys), (2, 1, keys)]
    assert all(head.shape[3] % 8 == 0 and head.is_contiguous() for head in given)
    assert given[2].shape[3] == (c if c % 8 == 0 else 8)
