"""`--train false`: what a trained generator makes, and what its attention looks at, from a checkpoint.

    python main.py --train false --pretrained_model latest

Leaves a sample grid and the attention figures in `<sample_path>/<version>/test_{step}/`.
"""

import torch

import checkpoint
from parameter import Config
from sagan_models import Generator
from utils import evaluating, pick_device, seeded_noise
from visualize import attention_figures, sample_grid


class Tester:
    """Evaluates the checkpoint that `config.pretrained_model` names, by default the latest.

    The averaged generator is used where the checkpoint has one (the reference's have none).

    Raises:
        UserError: the device or the checkpoint asked for is not there, or does not fit.
    """

    def __init__(self, config: Config):
        self.config = config
        self.device = pick_device(config.device)
        wanted = "latest" if config.pretrained_model in (None, "auto") else config.pretrained_model
        saved = checkpoint.load(config.model_folder, wanted, config.architecture)
        self.step = saved.step
        self.G = Generator(config.imsize, config.z_dim, config.g_conv_dim).to(
            self.device, memory_format=torch.channels_last
        )
        with checkpoint.complete(saved.step):
            self.G.load_state_dict(saved.state["ema"] if saved.state else saved.G)

    def test(self) -> int:
        """Writes the pictures for a batch of z drawn from the seed. Returns the exit code, 0."""
        config = self.config
        z = seeded_noise(config.seed, config.batch_size, config.z_dim, self.device)
        with evaluating(self.G):
            images = self.G(z)
            shown, *maps = self.G(z[: config.g_num], return_attention=True)
        folder = config.sample_folder / f"test_{self.step}"
        folder.mkdir(parents=True, exist_ok=True)
        pictures = {"grid": sample_grid(images)} | attention_figures("G", shown, maps, self.step)
        for name, picture in pictures.items():
            picture.save(folder / f"{name}.png")
        print(f"samples and attention after step {self.step}: {folder}")
        return 0
