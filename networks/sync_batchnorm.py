"""BatchNorm over the batches of several ranks on CPUs; `nn.SyncBatchNorm` works on GPUs only."""

import torch
import torch.distributed as dist
from torch import Tensor, nn


class CpuSyncBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm over the batches, all of the same size, of all ranks: the result of one process on the whole batch.

    Autograd differentiates it, in a few percent more time per training step than a backward written by hand.
    """

    @staticmethod
    def copy_of(layer: nn.BatchNorm2d) -> "CpuSyncBatchNorm2d":
        """Return a layer with the options and the state of another."""
        synced = CpuSyncBatchNorm2d(layer.num_features, layer.eps, layer.momentum, layer.affine)
        synced.load_state_dict(layer.state_dict())
        return synced

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x (B, C, H, W). Returns its shape and dtype; statistics are computed in at least float32."""
        if not self.training:
            return super().forward(x)
        values, size = x.float(), dist.get_world_size()
        # In float64, in which the difference of squares below loses nothing of these variances.
        variance, mean = (v.double() for v in torch.var_mean(values, (0, 2, 3), correction=0))
        mean, mean_square = _AllReduceSum.apply(torch.stack([mean, variance + mean.square()])) / size
        variance = mean_square - mean.square()
        scale = torch.rsqrt(variance + self.eps)
        scale = self.weight * scale if self.affine else scale
        shift = (self.bias if self.affine else 0) - mean * scale
        with torch.no_grad():
            count = size * x.numel() // x.shape[1]
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.float(), self.momentum)
            self.running_var.lerp_((variance * count / (count - 1)).float(), self.momentum)  # the unbiased variance
        scale, shift = (v.float().view(1, -1, 1, 1) for v in (scale, shift))
        return torch.addcmul(shift, values, scale).to(x.dtype)


class _AllReduceSum(torch.autograd.Function):
    """Sum over the ranks, with the gradient of the sum of their losses: torch has it as a deprecated function."""

    @staticmethod
    def forward(ctx, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return _AllReduceSum.apply(grad)
