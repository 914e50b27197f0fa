import pytest
import torch

from training.divergence import NonFiniteError, NonFiniteGuard

ONE = torch.tensor(1.0)


def test_finite_losses_pass_and_are_let_go():
    watch = NonFiniteGuard()
    for step in range(3):
        watch.note(step, ONE, ONE)
        watch.check_losses(at_least=3)
        assert len(watch._losses) == (step + 1) % 3
    watch.check(3, {"weight": ONE})


@pytest.mark.parametrize("d_loss, g_loss", [("nan", "1"), ("2", "inf"), ("-inf", "nan")])
def test_the_first_step_that_is_not_finite_is_named_with_both_losses(d_loss, g_loss):
    watch = NonFiniteGuard()
    watch.note(1, ONE, ONE)
    loss = torch.tensor(float(d_loss))
    watch.note(2, loss, torch.tensor(float(g_loss)))
    loss.fill_(0)  # a recorded step overwrites its results
    watch.note(3, torch.tensor(float("nan")), ONE)
    with pytest.raises(NonFiniteError, match=f"in step 2 D's loss was {d_loss} and G's loss {g_loss}"):
        watch.check_losses()


def test_a_weight_that_is_not_finite_is_noticed_wherever_it_is():
    watch = NonFiniteGuard()
    with pytest.raises(NonFiniteError, match="after step 5"):
        watch.check(5, {"a": ONE}, {"state": {0: {"exp_avg": [ONE, torch.tensor(float("inf"))]}}})
