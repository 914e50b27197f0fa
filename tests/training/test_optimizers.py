import pytest

from training.optimizers import Schedule

EXPONENTIAL = Schedule("exponential", 0.5, total_step=100, epoch_steps=10)
LINEAR = Schedule("linear", 0.5, total_step=100, epoch_steps=10)


def test_factors_over_a_run():
    assert [Schedule("constant", 0.5, 100, 10).factor(step) for step in (0, 50, 99)] == [1, 1, 1]
    assert [EXPONENTIAL.factor(step) for step in (0, 9, 10, 19, 20)] == [1, 1, 0.5, 0.5, 0.25]
    assert [LINEAR.factor(step) for step in (0, 25, 99, 100)] == pytest.approx([1, 0.75, 0.01, 0])


@pytest.mark.parametrize("schedule", [EXPONENTIAL, LINEAR])
def test_an_unchanged_schedule_resumes_as_if_it_had_not_been_stopped(schedule):
    assert schedule.resumed(schedule, 37) == schedule
    changed = Schedule(schedule.kind, 0.5, 100, 20).resumed(schedule, 37)
    assert Schedule(schedule.kind, 0.5, 100, 20).resumed(changed, 60) == changed


@pytest.mark.parametrize("epoch_steps", [4, 10, 35.5])
@pytest.mark.parametrize("saved", [EXPONENTIAL, LINEAR])
def test_the_factor_does_not_jump_when_the_length_of_an_epoch_changes(saved, epoch_steps):
    resumed = Schedule(saved.kind, saved.decay, 100, epoch_steps).resumed(saved, 37)
    assert resumed.factor(37) == pytest.approx(saved.factor(37))
    assert resumed.epochs(37) == pytest.approx(3.7)


def test_epochs_go_on_from_those_done():
    """3.7 epochs of 10 steps are done; the fourth ends after 0.3 epochs of 40 steps, the fifth 40 steps later."""
    resumed = Schedule("exponential", 0.5, 100, 40).resumed(EXPONENTIAL, 37)
    assert [resumed.factor(step) for step in (37, 48, 49, 88, 89)] == pytest.approx(
        [1 / 8, 1 / 8, 1 / 16, 1 / 16, 1 / 32]
    )


def test_another_total_step_bends_the_line_and_does_not_break_it():
    resumed = Schedule("linear", 0.5, 200, 10).resumed(LINEAR, 50)
    assert [resumed.factor(step) for step in (50, 125, 200)] == pytest.approx([0.5, 0.25, 0])


def test_a_linear_schedule_that_reached_zero_can_be_extended():
    resumed = Schedule("linear", 0.5, 200, 10).resumed(LINEAR, 100)
    assert [resumed.factor(step) for step in (100, 150, 200)] == pytest.approx([0.5, 0.25, 0])
    assert Schedule("linear", 0.5, 50, 10).resumed(LINEAR, 100).start_factor == 0  # it is past its end


def test_another_kind_starts_at_the_options_rates():
    assert Schedule("constant", 0.5, 100, 10).resumed(EXPONENTIAL, 37).factor(99) == 1
    assert Schedule("exponential", 0.5, 100, 10).resumed(LINEAR, 37).factor(37) == 1
