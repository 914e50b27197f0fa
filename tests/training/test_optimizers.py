import pytest

from training.optimizers import Schedule

EXPONENTIAL = Schedule("exponential", 0.5, total_step=100, epoch_steps=10)
LINEAR = Schedule("linear", 0.5, total_step=100, epoch_steps=10)


@pytest.mark.parametrize("epoch_steps", [4, 10, 35.5])
@pytest.mark.parametrize("saved", [EXPONENTIAL, LINEAR])
def test_the_factor_does_not_jump_and_an_unchanged_schedule_stays(saved, epoch_steps):
    options = Schedule(saved.kind, saved.decay, 100, epoch_steps)
    resumed = options.resumed(saved, 37)
    assert resumed.factor(37) == pytest.approx(saved.factor(37))
    assert resumed.epochs(37) == pytest.approx(3.7)
    assert options.resumed(resumed, 60) == resumed and (resumed == saved) == (epoch_steps == 10)


@pytest.mark.parametrize("resumed, factors", [
    # 3.7 epochs of 10 steps are done; the fourth ends after 0.3 epochs of 40 steps, the fifth 40 steps later.
    (Schedule("exponential", 0.5, 100, 40).resumed(EXPONENTIAL, 37),
     {37: 1 / 8, 48: 1 / 8, 49: 1 / 16, 88: 1 / 16, 89: 1 / 32}),
    (Schedule("linear", 0.5, 200, 10).resumed(LINEAR, 50), {50: 0.5, 125: 0.25, 200: 0}),
    (Schedule("linear", 0.5, 200, 10).resumed(LINEAR, 100), {100: 0.5, 150: 0.25, 200: 0}),  # it had reached 0
    (Schedule("linear", 0.5, 50, 10).resumed(LINEAR, 100), {100: 0}),  # past the new end
    (Schedule("constant", 0.5, 100, 10).resumed(EXPONENTIAL, 37), {99: 1}),  # another kind starts anew
    (Schedule("exponential", 0.5, 100, 10).resumed(LINEAR, 37), {37: 1}),
])  # fmt: skip
def test_a_resumed_schedule_with_other_options(resumed, factors):
    assert [resumed.factor(step) for step in factors] == pytest.approx([*factors.values()])
