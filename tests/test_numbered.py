from numbered import numbered_files, spread


def test_files_by_step_in_ascending_order(tmp_path):
    for name in ("100_fake.png", "9_fake.png", "9_ema.png", "real.png", "x_fake.png", "9_fake.png.tmp", "-1_fake.png"):
        (tmp_path / name).touch()
    assert list(numbered_files(tmp_path, "fake.png")) == [9, 100]
    assert numbered_files(tmp_path, "fake.png")[9] == tmp_path / "9_fake.png"
    assert numbered_files(tmp_path / "nowhere", "fake.png") == {}


def test_spread_keeps_the_ends():
    assert spread(range(100), 4) == [0, 33, 66, 99]
    assert spread(range(3), 4) == [0, 1, 2]
    assert spread([], 4) == []
