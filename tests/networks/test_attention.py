import pytest
import torch

from networks.attention import attend, attention_map
from sagan_models import Discriminator


def inputs(dtype=torch.float32, grad=True):
    torch.manual_seed(0)
    shapes = ((3, 20, 4), (3, 20, 4), (3, 20, 32))
    return [torch.randn(shape).to(dtype).requires_grad_(grad) for shape in shapes]


def plain(query, key, value):
    return attention_map(query, key).to(value.dtype) @ value


def test_fast_path_is_the_plain_one_in_values_and_gradients():
    results = []
    for function in (plain, attend):
        tensors = inputs()
        out = function(*tensors)
        weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
        (out * weights).sum().backward()
        results.append([out, *(tensor.grad for tensor in tensors)])
    for expected, actual in zip(*results, strict=True):
        assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_bf16_keeps_its_logits_in_fp32():
    query, key, value = inputs(torch.bfloat16, grad=False)
    query, key = 10 * query, 10 * key  # logits of several hundred, which bf16 would round by 1
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(query, key, value)
    expected = plain(query.float(), key.float(), value.float())
    assert out.dtype == torch.bfloat16
    assert (out.float() - expected).abs().max() <= 2**-7 * expected.abs().max()


def test_asking_the_fast_path_for_a_second_derivative_is_an_error():
    query, key, value = inputs()
    (gradient,) = torch.autograd.grad(attend(query, key, value).square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


def test_discriminator_on_two_batches_at_once_is_two_forwards():
    """Losses and gradients to 1e-5, and the vectors of spectral norm advance twice."""
    results = []
    for joint in (False, True):
        torch.manual_seed(0)
        D = Discriminator(32, 16)
        for layer in (D.attn1, D.attn2):
            torch.nn.init.constant_(layer.gamma, 0.5)
        real, fake = torch.randn(4, 3, 32, 32), torch.randn(6, 3, 32, 32)
        real_logits, fake_logits = D(real, fake) if joint else (D(real), D(fake))
        loss = torch.relu(1 - real_logits).mean() + 3 * torch.relu(1 + fake_logits).mean()
        loss.backward()
        results.append({"loss": loss, "real": real_logits, "fake": fake_logits, **D.state_dict(),
                        **{f"{name}.grad": parameter.grad for name, parameter in D.named_parameters()}})  # fmt: skip
    for name, expected in results[0].items():
        scale = expected.abs().max() if "key_conv.bias" not in name else 1  # which has no gradient: rounding
        assert (results[1][name] - expected).abs().max() <= 1e-5 * scale, name
