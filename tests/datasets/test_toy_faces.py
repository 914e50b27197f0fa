import numpy as np

from datasets.toy_faces import draw_face


def test_a_face_is_the_same_at_every_size():
    small, large = draw_face(3, 5, 32), draw_face(3, 5, 256).resize((32, 32))
    assert np.abs(np.asarray(small, int) - np.asarray(large, int)).mean() < 6


def test_faces_are_symmetric():
    """Compare each face with its mirror image, shifted by up to 8 pixels, because the axis of symmetry varies."""
    for index in range(20):
        face = np.asarray(draw_face(0, index, 64), int)
        mirrored = face[:, ::-1]
        best = min(np.abs(np.roll(mirrored, shift, axis=1) - face)[16:48, 12:52].mean() for shift in range(-8, 9))
        assert best < 8
