import pytest
from training.overfitting import OverfittingCheck


def warnings_of(values, epoch, capsys, has_holdout=False, has_augment=False):
    check = OverfittingCheck(epoch, has_holdout, has_augment)
    for step, r in values:
        check.add(step, r)
    return capsys.readouterr().err.splitlines()


@pytest.mark.parametrize("has_holdout", [False, True])
@pytest.mark.parametrize("has_augment", [False, True])
def test_an_epoch_above_the_limit_is_one_warning(capsys, has_holdout, has_augment):
    (line,) = warnings_of([(step, 0.95) for step in range(10, 4000, 10)], 1000, capsys, has_holdout, has_augment)
    assert "since step 10," in line and "0.95" in line
    assert ("--holdout" in line) == ("a new run" in line) == (not has_holdout) == ("d_holdout" not in line)
    assert ("--augment" in line) == (not has_augment)


@pytest.mark.parametrize("values", [
    [(step, 0.95) for step in range(10, 1010, 10)],
    [(step, 0.8 if step % 1000 == 0 else 1.0) for step in range(10, 9000, 10)],
    [(step, 0.9) for step in range(10, 4000, 10)],
    [(step, 0.95) for step in range(1000, 20_000, 1000)],
])  # fmt: skip
def test_less_than_an_epoch_or_twenty_values_or_a_break_is_none(capsys, values):
    assert not warnings_of(values, 1000, capsys)


def test_twenty_values_are_enough(capsys):
    assert len(warnings_of([(step, 0.95) for step in range(1000, 21_000, 1000)], 1000, capsys)) == 1


def test_it_counts_from_the_last_break(capsys):
    values = [(step, 0.5 if step == 200 else 1.0) for step in range(150, 1230, 10)]
    (line,) = warnings_of(values, 1000, capsys)
    assert "since step 210," in line


def test_short_epochs_count_500_steps(capsys):
    assert not warnings_of([(step, 1.0) for step in range(10, 510, 10)], 5, capsys)
    assert len(warnings_of([(step, 1.0) for step in range(10, 520, 10)], 5, capsys)) == 1
