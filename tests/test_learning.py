"""A short run learns: generated images come closer to the data, and do not where G or D is not trained."""

import pytest
import torch
import torch.nn.functional as F

from networks.latents import sample_z
from utils import eval_mode

frechet_distance = pytest.importorskip("metrics.opencv").frechet_distance  # tested in test_opencv.py
OPTIONS = dict(batch_size=16, toy_num=512, g_conv_dim=16, d_conv_dim=16, g_lr=4e-4, d_lr=8e-4, ema_decay=0.98)
# 9.95 before training and 2.98 after it; 4.99 without G's updates, 6.77 without D's. Other seeds may take longer.
BOUND = 3.5


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [None, "g_optimizer", "d_optimizer"])
def test_generated_images_come_closer_to_the_data(make_trainer, monkeypatch, frozen):
    trainer = make_trainer(**OPTIONS)
    if frozen:
        monkeypatch.setattr(getattr(trainer, frozen), "step", lambda: None)
    for _ in range(100):
        trainer.train_step()
    real = torch.cat([trainer.loader.batch(position)[0] for position in range(32)])
    with eval_mode(trainer.ema.network):
        fake = trainer.ema.network(sample_z(1, 512, 16, "cpu"))
    thumbnails = (F.adaptive_avg_pool2d(images.float(), 4).flatten(1).double().numpy() for images in (fake, real))
    distance = frechet_distance(*thumbnails)
    assert distance > BOUND if frozen else distance < BOUND
