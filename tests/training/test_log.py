import json

from PIL import Image

from training.log import RunLog, read_curves


def steps(folder):
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_lines_are_written_at_once(tmp_path):
    with RunLog(tmp_path, 0, use_tensorboard=False) as log:
        log.scalars(10, {"d_loss": 1.5})
        assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 10, "d_loss": 1.5}


def test_a_continued_run_drops_the_lines_it_takes_again(tmp_path):
    with RunLog(tmp_path, 0, use_tensorboard=False) as log:
        for step in (10, 20, 30):
            log.scalars(step, {})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4')  # cut off by a kill
    with RunLog(tmp_path, 20, use_tensorboard=False) as log:
        log.scalars(30, {})
    assert steps(tmp_path) == [10, 20, 30]
    with RunLog(tmp_path, 0, use_tensorboard=False):
        pass
    assert steps(tmp_path) == []


def test_tensorboard_files_hold_scalars_and_images(tmp_path):
    with RunLog(tmp_path, 0, use_tensorboard=True) as log:
        log.scalars(10, {"d_loss": 1.5})
        log.image(10, "samples/fake", Image.new("RGB", (8, 8)))
    (events,) = tmp_path.glob("events.out.tfevents.*")
    content = events.read_bytes()
    assert b"d_loss" in content
    assert b"samples/fake" in content
    assert b"PNG" in content


def test_the_log_is_read_up_to_what_is_damaged_and_beyond(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 10, "a": 1.5, "gamma/G": 2}\n{"step": 20, "a": NaN, "gamma/G": 3}\nno json\n[1]\n{"a": 1}\n'
        '{"step": 25, "a": "text", "gamma/G": null}\n{"step": 30, "a": 2.5, "fid": 99.5, "gamma/G": 4}\n'
        '{"step": 50, "a": 7}\n{"step": 40, "a": 3'
    )
    curves = {name: points.tolist() for name, points in read_curves(tmp_path, 40).items()}
    assert curves == {"a": [[10, 1.5], [30, 2.5]], "gamma/G": [[10, 2], [20, 3], [30, 4]], "fid": [[30, 99.5]]}
    assert read_curves(tmp_path / "missing", 40) == {}
