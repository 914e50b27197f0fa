import pytest

from errors import UserError
from training.environment import LOCAL_RANKS, Launch, read_launch

NAMES = ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT", *LOCAL_RANKS)
TORCHRUN = dict(WORLD_SIZE="4", RANK="3", LOCAL_RANK="1", MASTER_ADDR="localhost", MASTER_PORT="29500")


@pytest.fixture
def environment(monkeypatch):
    """A function that sets these variables and no others of a launcher."""

    def set_variables(variables):
        for name in NAMES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_variables


@pytest.mark.parametrize("variables", [
    {}, {"RANK": "1"}, {"LOCAL_RANK": "2", "RANK": "x"}, {"WORLD_SIZE": "1"}, {"WORLD_SIZE": "1", "RANK": "3"},
    {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
])  # fmt: skip
def test_without_a_world_size_it_is_a_single_process(environment, variables):
    environment(variables)
    assert read_launch() == Launch(0, 1, 0)


@pytest.mark.parametrize("local", LOCAL_RANKS)
def test_torchrun_and_other_launchers(environment, local):
    environment({name: value for name, value in TORCHRUN.items() if name != "LOCAL_RANK"} | {local: "1"})
    assert read_launch() == Launch(3, 4, 1)


@pytest.mark.parametrize("missing", ["RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_a_missing_variable_is_named(environment, missing):
    environment({name: value for name, value in TORCHRUN.items() if name != missing})
    with pytest.raises(UserError, match=f"WORLD_SIZE=4 and no {missing}: .*torchrun"):
        read_launch()


@pytest.mark.parametrize("name, value", [
    ("WORLD_SIZE", ""), ("WORLD_SIZE", "two"), ("WORLD_SIZE", "0"), ("WORLD_SIZE", "-1"), ("RANK", "4"), ("RANK", "x"),
    ("LOCAL_RANK", "9"), ("MASTER_PORT", "http"), ("MASTER_PORT", "99999"),
])  # fmt: skip
def test_a_bad_value_is_named(environment, name, value):
    environment(TORCHRUN | {name: value})
    with pytest.raises(UserError, match=f"{name} .*'{value}'"):
        read_launch()
