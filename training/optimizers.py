"""Adam, and its learning rate over a run: continuous where a resumed run has other options or images."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


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


@dataclass(frozen=True)
class Schedule:
    """Factor of both learning rates as a function of the step.

    constant: 1. exponential: times `decay` after each epoch. linear: to 0 at `total_step`.

    Attributes:
        kind: constant, exponential or linear.
        epoch_steps: steps per epoch.
        start_step, start_epochs, start_factor: step from which these options hold, epochs done and factor there.
    """

    kind: str
    decay: float
    total_step: int
    epoch_steps: float
    start_step: int = 0
    start_epochs: float = 0.0
    start_factor: float = 1.0

    def epochs(self, step: int) -> float:
        """Return the epochs done after `step` steps."""
        return self.start_epochs + (step - self.start_step) / self.epoch_steps

    def factor(self, step: int) -> float:
        """Return the factor in the step that follows `step` finished ones."""
        match self.kind:
            case "exponential":
                return self.start_factor * self.decay ** (_whole(self.epochs(step)) - _whole(self.start_epochs))
            case "linear":
                return self.start_factor * (self.total_step - step) / (self.total_step - self.start_step)
        return self.start_factor

    def resumed(self, saved: "Schedule", step: int) -> "Schedule":
        """Return this schedule as the continuation, after `step` steps, of the one that a checkpoint was saved with.

        The factor does not jump where the images, the batch size, `total_step` or `decay` changed. Another kind starts
        at 1. A linear schedule that had reached 0 continues as if it had had this `total_step` from the first step.
        """
        if dataclasses.replace(saved, start_step=0, start_epochs=0.0, start_factor=1.0) == self:
            return saved
        if self.kind != saved.kind:
            factor = 1.0
        elif self.kind == "linear" and step >= saved.total_step:
            factor = max(0.0, 1 - step / self.total_step)
        else:
            factor = saved.factor(step)
        return dataclasses.replace(self, start_step=step, start_epochs=saved.epochs(step), start_factor=factor)


def _whole(epochs: float) -> int:
    """Return the number of finished epochs; sums of fractions may fall short of it by a rounding error."""
    return math.floor(epochs + 1e-6)
