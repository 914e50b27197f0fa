import pytest
import torch
from training.divergence import NonFiniteError, NonFiniteGuard

ONE = torch.tensor(1.0)


def add(guard, step, d_loss, g_loss):
    guard.add(step, {"d_loss": torch.tensor(float(d_loss)), "g_loss": torch.tensor(float(g_loss)), "d_real": ONE})


def test_finite_values_pass():
    guard = NonFiniteGuard(torch.device("cpu"))
    guard.check_losses()
    for step in range(3):
        add(guard, step, 1, -1)
        guard.check({"weight": ONE, "optimizer": {"state": {0: [ONE]}}, "step": 3, "name": "text"})


@pytest.mark.parametrize("d_loss, g_loss", [("nan", "1"), ("2", "inf"), ("-inf", "nan")])
def test_the_first_step_with_a_non_finite_loss_is_named_with_both_losses(d_loss, g_loss):
    guard = NonFiniteGuard(torch.device("cpu"))
    add(guard, 1, 1, 1)
    stats = {"d_loss": torch.tensor(float(d_loss)), "g_loss": torch.tensor(float(g_loss))}
    guard.add(2, stats)
    stats["d_loss"].fill_(0)  # a CUDA graph overwrites its results
    add(guard, 3, "nan", 7)
    with pytest.raises(NonFiniteError, match=rf"step 2 \(d_loss={d_loss}, g_loss={g_loss}\)"):
        guard.check_losses()


def test_a_non_finite_tensor_is_found_anywhere_in_a_state():
    guard = NonFiniteGuard(torch.device("cpu"))
    with pytest.raises(NonFiniteError, match="weight"):
        guard.check({"a": ONE, "state": {0: {"exp_avg": [ONE, torch.tensor(float("inf"))]}}})
