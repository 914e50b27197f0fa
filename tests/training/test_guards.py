import numpy as np
import pytest
import torch

from training.guards import CollapseCheck, NonFiniteError, NonFiniteGuard, OverfittingCheck, image_spread


@pytest.mark.parametrize("d_loss, g_loss", [("nan", "1"), ("2", "inf"), ("-inf", "nan")])
def test_the_first_step_with_a_non_finite_loss_is_named_with_both_losses(d_loss, g_loss):
    guard = NonFiniteGuard(torch.device("cpu"))
    for step, losses in enumerate([("1", "-1"), (d_loss, g_loss), ("nan", "7")]):
        stats = dict(zip(("d_loss", "g_loss"), torch.tensor([*map(float, losses)]), strict=True))
        guard.add(step, stats)
        stats["d_loss"].fill_(0)  # a CUDA graph overwrites its results
    with pytest.raises(NonFiniteError, match=rf"step 1 \(d_loss={d_loss}, g_loss={g_loss}\)"):
        guard.check_losses()


def test_a_non_finite_tensor_is_found_anywhere_in_a_state():
    guard, finite = NonFiniteGuard(torch.device("cpu")), {"a": torch.ones(2), "step": 3}
    guard.check(finite)
    with pytest.raises(NonFiniteError, match="weight"):
        guard.check({**finite, "state": {0: {"exp_avg": [torch.ones(2), torch.tensor([1, float("inf")])]}}})


@pytest.mark.parametrize("epoch, values, since", [
    (1000, [(step, 0.95) for step in range(10, 1010, 10)], None),  # less than an epoch
    (1000, [(step, 0.8 if step % 1000 == 0 else 1.0) for step in range(10, 9000, 10)], None),  # breaks
    (1000, [(step, 0.5 if step == 200 else 1.0) for step in range(150, 3000, 10)], 210),  # an epoch after one
    (1000, [(step, 0.9) for step in range(10, 4000, 10)], None),  # not above the limit
    (1000, [(step, 0.95) for step in range(1000, 20_000, 1000)], None),  # 19 values
    (1000, [(step, 0.95) for step in range(1000, 21_000, 1000)], 1000),  # 20
    (5, [(step, 1.0) for step in range(10, 510, 10)], None),  # short epochs count 500 steps
    (5, [(step, 1.0) for step in range(10, 520, 10)], 10),
])  # fmt: skip
@pytest.mark.parametrize("has_holdout, has_augment", [(False, True), (True, False)])
def test_one_warning_after_an_epoch_500_steps_and_20_values(capsys, epoch, values, since, has_holdout, has_augment):
    check = OverfittingCheck(epoch, has_holdout, has_augment)
    for step, r in values:
        check.add(step, r)
    lines = capsys.readouterr().err.splitlines()
    found = [(f"since step {since}," in line, "--holdout" in line, "--augment" in line) for line in lines]
    assert found == ([(True, not has_holdout, not has_augment)] if since else [])


@pytest.mark.parametrize("values, since", [
    ({100: 0.4, 500: 0.1, 900: 0.2, 1900: 0.3, 2000: 0.3}, None),  # alike at the start only
    ({100: 0.4, 500: 0.1, 2000: 0.25, 2100: 0.28}, None),  # half is enough
    ({100: 0.1, 500: 0.3, 1000: 0.2, 1500: 0.1}, None),  # may still be the start
    ({100: 0.1, 500: 0.3, 1000: 0.2, 2000: 0.1, 2100: 0.05}, 1000),
    ({2000: 0.4, 2100: 0.3, 2200: 0.24, 2300: 0.2, 2400: 0.4, 2500: 0.1}, 2200),
])  # fmt: skip
def test_samples_that_become_alike_are_one_warning(capsys, values, since):
    check = CollapseCheck(has_augment=False)
    for step, spread in values.items():
        check.add(step, spread, 0.5)
    lines = capsys.readouterr().err.splitlines()
    assert ["mode collapse" in line and f"since step {since}," in line for line in lines] == ([True] if since else [])


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_the_spread_is_the_mean_distance_of_all_pairs(memory_format):
    random = np.random.default_rng(0)
    images = random.uniform(-1, 1, (30, 3, 8, 8)) * random.uniform(0, 1, (30, 1, 1, 1))
    pairs = [(images[i] - images[j]) ** 2 for i in range(30) for j in range(i)]
    spread = image_spread(torch.tensor(images, dtype=torch.float32).contiguous(memory_format=memory_format))
    assert spread == pytest.approx(np.mean([np.sqrt(pair.mean()) for pair in pairs]), rel=1e-5)
    assert image_spread(torch.ones(3, 3, 8, 8)) == 0
