"""Baseline of benchmarks/step.py: SAGAN's networks and updates as the 2018 reference and its many copies write them.

Eager fp32, contiguous memory, plain (not fused) Adam; every forward computes and returns the full attention maps; fake
images are not detached in the update of D, and the update of G computes the gradients of D too. One error of the
reference is not repeated: its spectral norm overwrites the vectors u and v of an earlier forward, before backward has
used them. The losses therefore equal this repository's; `tests/test_benchmarks.py` checks that. Image size 64 only.
"""

import torch
from torch import Tensor, nn


class SpectralNorm(nn.Module):
    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module
        weight = module.weight
        del module._parameters["weight"]
        module.weight_bar = nn.Parameter(weight.detach())
        module.register_buffer("weight_u", nn.functional.normalize(torch.randn(weight.shape[0]), dim=0))
        module.register_buffer("weight_v", nn.functional.normalize(torch.randn(weight[0].numel()), dim=0))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.module.weight_bar
        matrix = weight.view(weight.shape[0], -1)
        v = torch.mv(matrix.detach().t(), self.module.weight_u)
        v = v / (v.norm() + 1e-12)
        u = torch.mv(matrix.detach(), v)
        u = u / (u.norm() + 1e-12)
        self.module.weight_u, self.module.weight_v = u, v
        self.module.weight = weight / u.dot(matrix.mv(v))
        return self.module(x)


class SelfAttention(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.query_conv = nn.Conv2d(channels, channels // 8, 1)
        self.key_conv = nn.Conv2d(channels, channels // 8, 1)
        self.value_conv = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        batch, channels, height, width = x.shape
        query = self.query_conv(x).view(batch, -1, height * width).permute(0, 2, 1)
        key = self.key_conv(x).view(batch, -1, height * width)
        attention = torch.softmax(torch.bmm(query, key), dim=-1)
        value = self.value_conv(x).view(batch, -1, height * width)
        out = torch.bmm(value, attention.permute(0, 2, 1)).view(batch, channels, height, width)
        return self.gamma * out + x, attention


class Generator(nn.Module):
    def __init__(self, z_dim: int = 128, conv_dim: int = 64):
        super().__init__()

        def block(inputs: int, outputs: int, stride: int, padding: int) -> nn.Sequential:
            convolution = SpectralNorm(nn.ConvTranspose2d(inputs, outputs, 4, stride, padding))
            return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())

        self.l1 = block(z_dim, conv_dim * 8, 1, 0)
        self.l2 = block(conv_dim * 8, conv_dim * 4, 2, 1)
        self.l3 = block(conv_dim * 4, conv_dim * 2, 2, 1)
        self.attn1 = SelfAttention(conv_dim * 2)
        self.l4 = block(conv_dim * 2, conv_dim, 2, 1)
        self.attn2 = SelfAttention(conv_dim)
        self.last = nn.Sequential(nn.ConvTranspose2d(conv_dim, 3, 4, 2, 1), nn.Tanh())

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out = self.l3(self.l2(self.l1(z.view(*z.shape, 1, 1))))
        out, attention1 = self.attn1(out)
        out, attention2 = self.attn2(self.l4(out))
        return self.last(out), attention1, attention2


class Discriminator(nn.Module):
    def __init__(self, conv_dim: int = 64):
        super().__init__()

        def block(inputs: int, outputs: int) -> nn.Sequential:
            return nn.Sequential(SpectralNorm(nn.Conv2d(inputs, outputs, 4, 2, 1)), nn.LeakyReLU(0.1))

        self.l1 = block(3, conv_dim)
        self.l2 = block(conv_dim, conv_dim * 2)
        self.l3 = block(conv_dim * 2, conv_dim * 4)
        self.attn1 = SelfAttention(conv_dim * 4)
        self.l4 = block(conv_dim * 4, conv_dim * 8)
        self.attn2 = SelfAttention(conv_dim * 8)
        self.last = nn.Sequential(nn.Conv2d(conv_dim * 8, 1, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out, attention1 = self.attn1(self.l3(self.l2(self.l1(x))))
        out, attention2 = self.attn2(self.l4(out))
        return self.last(out).flatten(), attention1, attention2


class Baseline:
    """Both networks and their optimizers. `d_step` and `g_step` have the signatures of those of `Trainer`."""

    def __init__(self, device: str = "cpu", z_dim: int = 128, conv_dim: int = 64):
        self.G, self.D = Generator(z_dim, conv_dim).to(device), Discriminator(conv_dim).to(device)
        self.g_optimizer = torch.optim.Adam(self.G.parameters(), 1e-4, (0.0, 0.9))
        self.d_optimizer = torch.optim.Adam(self.D.parameters(), 4e-4, (0.0, 0.9))

    def d_step(self, real: Tensor, z: Tensor) -> dict[str, Tensor]:
        real_logits, _, _ = self.D(real)
        fake_images, _, _ = self.G(z)
        fake_logits, _, _ = self.D(fake_images)
        d_loss_real = torch.relu(1.0 - real_logits).mean()
        d_loss_fake = torch.relu(1.0 + fake_logits).mean()
        d_loss = d_loss_real + d_loss_fake
        self._zero_grad()
        d_loss.backward()
        self.d_optimizer.step()
        return {"d_loss_real": d_loss_real, "d_loss_fake": d_loss_fake, "d_loss": d_loss}

    def g_step(self, z: Tensor) -> dict[str, Tensor]:
        fake_images, _, _ = self.G(z)
        fake_logits, _, _ = self.D(fake_images)
        g_loss = -fake_logits.mean()
        self._zero_grad()
        g_loss.backward()
        self.g_optimizer.step()
        return {"g_loss": g_loss}

    def _zero_grad(self) -> None:
        self.g_optimizer.zero_grad()
        self.d_optimizer.zero_grad()
