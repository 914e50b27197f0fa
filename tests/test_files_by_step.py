from utils import evenly_spaced, files_by_step


def test_files_by_step_in_ascending_order(tmp_path):
    for name in ("100_fake.png", "9_fake.png", "9_ema.png", "real.png", "x_fake.png", "9_fake.png.tmp", "-1_fake.png"):
        (tmp_path / name).touch()
    assert list(files_by_step(tmp_path, "fake.png")) == [9, 100]
    assert files_by_step(tmp_path, "fake.png")[9] == tmp_path / "9_fake.png"
    assert files_by_step(tmp_path / "nowhere", "fake.png") == {}


def test_spread_keeps_the_ends():
    assert evenly_spaced(range(100), 4) == [0, 33, 66, 99]
    assert evenly_spaced(range(3), 4) == [0, 1, 2]
    assert evenly_spaced([], 4) == []
