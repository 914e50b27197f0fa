import json

import pytest
from PIL import Image

from training.log import RunLog


def logged_steps(folder):
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def write_steps(folder, steps):
    with RunLog(folder, 0, use_tensorboard=False) as log:
        for step in steps:
            log.scalars(step, {})


def test_entries_are_written_at_once_as_float32(tmp_path):
    with RunLog(tmp_path, 0, use_tensorboard=False) as log:
        log.scalars(10, {"d_loss": 0.10000000149011612})
        assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 10, "d_loss": 0.100000001}


def test_a_resumed_run_drops_later_entries(tmp_path):
    write_steps(tmp_path, (10, 20, 30))
    with RunLog(tmp_path, 20, use_tensorboard=False) as log:
        log.scalars(25, {})
    assert logged_steps(tmp_path) == [10, 20, 25]
    with RunLog(tmp_path, 0, use_tensorboard=False):
        pass
    assert logged_steps(tmp_path) == []


@pytest.mark.parametrize("end", ['{"step": 4', '{"step": 40}', "no json\n", "[40]\n", '{"d_loss": 1}\n'])
def test_a_resumed_run_drops_a_damaged_or_incomplete_line(tmp_path, end):
    write_steps(tmp_path, (10, 20))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(end)
    with RunLog(tmp_path, 100, use_tensorboard=False) as log:
        log.scalars(110, {})
    assert logged_steps(tmp_path) == [10, 20, 110]


def test_tensorboard_files_hold_scalars_and_images(tmp_path):
    with RunLog(tmp_path, 0, use_tensorboard=True) as log:
        log.scalars(10, {"d_loss": 1.5})
        log.image(10, "samples/fake", Image.new("RGB", (8, 8)))
    (events,) = tmp_path.glob("events.out.tfevents.*")
    content = events.read_bytes()
    assert b"d_loss" in content
    assert b"samples/fake" in content
    assert b"PNG" in content
