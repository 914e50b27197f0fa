"""Adam, and the schedule of its learning rate."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from parameter import Config


class Adam(torch.optim.Adam):
    """Fused Adam whose moments can be resumed with other learning rates and betas, and on another device."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, betas: tuple[float, float], capturable: bool):
        parameters = [*parameters]
        if parameters[0].is_cuda:
            lr = torch.tensor(lr, device=parameters[0].device)  # a captured step reads the tensor at each replay
        super().__init__(parameters, lr, betas, fused=True, capturable=capturable)

    def set_learning_rate(self, rate: float) -> None:
        """Set the learning rate; in place if it is a tensor, which a CUDA graph reads."""
        for group in self.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load the moments; learning rates and betas are this run's options."""
        super().load_state_dict({"state": state_dict["state"], "param_groups": self.state_dict()["param_groups"]})
        for parameter, moments in self.state.items():
            for key in ("exp_avg", "exp_avg_sq"):  # fused Adam needs the memory format of the parameter
                moments[key] = torch.empty_like(parameter).copy_(moments[key])


def lr_decay(config: Config, step: int, num_batches: int) -> float:
    """Return the number by which both learning rates are multiplied after `step` steps, of `num_batches` per epoch.

    One number per step, so that the rates do not jump where a resumed run has other options or images.
    """
    match config.lr_schedule:
        case "exponential":  # after each epoch
            before, now = (steps * config.n_critic // num_batches for steps in (step - 1, step))
            return config.lr_decay ** (now - before)
        case "linear":  # to 0 at `total_step`
            return (config.total_step - step) / (config.total_step - step + 1)
    return 1.0
