import pytest
import torch

from networks.attention import attend, attention_map


def inputs(dtype=torch.float32, grad=True):
    torch.manual_seed(0)
    shapes = ((3, 20, 4), (3, 20, 4), (3, 20, 32))
    return [torch.randn(shape).to(dtype).requires_grad_(grad) for shape in shapes]


def explicit(query, key, value):
    return attention_map(query, key).to(value.dtype) @ value


def test_the_fast_path_equals_the_explicit_one_in_values_and_gradients():
    results = []
    for function in (explicit, attend):
        tensors = inputs()
        out = function(*tensors)
        weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
        (out * weights).sum().backward()
        results.append([out, *(tensor.grad for tensor in tensors)])
    for expected, actual in zip(*results, strict=True):
        assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_logits_of_bf16_inputs_are_fp32():
    query, key, value = inputs(torch.bfloat16, grad=False)
    query, key = 10 * query, 10 * key  # logits of several hundred, which bf16 would round by 1
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(query, key, value)
    expected = explicit(query.float(), key.float(), value.float())
    assert out.dtype == torch.bfloat16
    assert (out.float() - expected).abs().max() <= 2**-7 * expected.abs().max()


def test_a_second_derivative_of_the_fast_path_is_an_error_not_a_wrong_number():
    query, key, value = inputs()
    (gradient,) = torch.autograd.grad(attend(query, key, value).square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()
