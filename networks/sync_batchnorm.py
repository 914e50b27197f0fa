"""BatchNorm over the batches of several processes on CPUs; torch's SyncBatchNorm is for GPUs only."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class SyncBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm over the batches, all of one size, of all processes: what one process makes of them put together."""

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> the same shape and type."""
        if not self.training:
            return super().forward(x)
        out, mean, variance = _Normalize.apply(x, self.weight, self.bias, self.eps)
        count = dist.get_world_size() * x.numel() // x.shape[1]
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.float(), self.momentum)
            self.running_var.lerp_((variance * (count / (count - 1))).float(), self.momentum)
        return out


class _Normalize(torch.autograd.Function):
    """x, weight, bias, eps -> the normalized x; mean and variance (C,) over all processes, in float64.

    Backward is that of the sum of the processes' losses. By hand, because on a CPU `torch.var_mean` takes twenty
    times as long as `batch_norm_update_stats`, which has no backward.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        mean, variance = (value.double() for value in torch.batch_norm_update_stats(x.float(), None, None, 0))
        # In float64, where the difference of the two below loses nothing.
        moments = _sum_over_processes(torch.stack([mean, variance + mean.square()])) / dist.get_world_size()
        mean, variance = moments[0], moments[1] - moments[0].square()
        inverse_std = torch.rsqrt(variance + eps)
        ctx.save_for_backward(x, weight, mean, inverse_std)
        ctx.mark_non_differentiable(mean, variance)
        scale = weight * inverse_std
        return _affine(x, scale, bias - mean * scale).to(x.dtype), mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        x, weight, mean, inverse_std = ctx.saved_tensors
        grad, x, dtype = grad.float(), x.float(), x.dtype
        bias_grad = grad.sum((0, 2, 3)).double()
        weight_grad = ((grad * x).sum((0, 2, 3)) - mean * bias_grad) * inverse_std
        count = dist.get_world_size() * x.numel() // x.shape[1]
        mean_grad, mean_slope = _sum_over_processes(torch.stack([bias_grad, weight_grad])) / count
        # x has its share in the mean and in the variance: grad - mean_grad - normalized x * mean_slope, scaled.
        scale = weight * inverse_std
        slope = -scale * inverse_std * mean_slope
        x_grad = _affine(grad, scale, -scale * mean_grad - slope * mean)
        x_grad.addcmul_(x, slope.float().view(1, -1, 1, 1))
        return x_grad.to(dtype), weight_grad.float(), bias_grad.float(), None


def _affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """scale * x + shift, in float32, for each channel of x (B, C, H, W)."""
    scale, shift = (value.float().view(1, -1, 1, 1) for value in (scale, shift))
    return torch.addcmul(shift, x.float(), scale)


def _sum_over_processes(values: Tensor) -> Tensor:
    dist.all_reduce(values)
    return values
