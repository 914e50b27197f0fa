"""The step as a CUDA graph: recorded once, then replayed with one launch in place of some eight hundred."""

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from errors import UserError

WARM_UP = 3  # eager steps before the recording: they set up what libraries set up lazily, and count as steps

Step = Callable[[Sequence[Tensor], Sequence[Tensor]], dict[str, Tensor]]


def can_capture(device: torch.device, wanted: str, adv_loss: str, processes: int) -> bool:
    """Whether to record the step; says why not where that was to be expected.

    Args:
        wanted: `--cuda_graph`: auto, true or false.

    Raises:
        UserError: true asks for what cannot be.
    """
    if device.type != "cuda" or wanted == "false":
        return False
    obstacle = "wgan-gp draws random numbers in it" if adv_loss == "wgan-gp" else ""
    obstacle = obstacle or ("processes exchange gradients in it" if processes > 1 else "")
    if obstacle and wanted == "true":
        raise UserError(f"--cuda_graph true: the step cannot be recorded, because {obstacle}")
    if obstacle:
        print(f"the step runs without a CUDA graph: {obstacle}")
    return not obstacle


class GraphedStep:
    """Runs `step(reals, noises)` by replaying its recording on new inputs; the results are those of `step` itself.

    The step must do the same work on the same memory every time: inputs of fixed shapes, parameters, statistics and
    optimizer state changed in place, no value read back. The tensors that it returns are overwritten by the next call.

    Args:
        step: takes real batches and noises, returns named 0-d tensors.
        device: the GPU, which has to be the current one.
        allow_fallback: where recording fails, say so and run `step` itself from then on, in place of raising.
    """

    def __init__(self, step: Step, device: torch.device, allow_fallback: bool = True):
        self.step = step
        self.allow_fallback = allow_fallback
        self.stream = torch.cuda.Stream(device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.calls = 0

    def __call__(self, reals: Sequence[Tensor], noises: Sequence[Tensor]) -> dict[str, Tensor]:
        self.calls += 1
        if self.calls <= WARM_UP:
            return self._warm_up(reals, noises)
        if self.calls == WARM_UP + 1:
            self._record(reals, noises)
        if self.graph is None:
            return self.step(reals, noises)
        for mine, given in zip((*self.reals, *self.noises), (*reals, *noises), strict=True):
            mine.copy_(given)
        self.graph.replay()
        return self.results

    def _warm_up(self, reals: Sequence[Tensor], noises: Sequence[Tensor]) -> dict[str, Tensor]:
        """An eager step on a stream of its own, as recording wants it."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*capturable=True")  # of an optimizer that is not recorded yet
            results = self.step(reals, noises)
        torch.cuda.current_stream().wait_stream(self.stream)
        return results

    def _record(self, reals: Sequence[Tensor], noises: Sequence[Tensor]) -> None:
        """Records the step; recording runs nothing."""
        self.reals = [torch.empty_like(tensor) for tensor in reals]  # in the layout of the inputs
        self.noises = [torch.empty_like(tensor) for tensor in noises]
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream()
        try:
            # "thread_local": other threads may use CUDA meanwhile, the one that writes pictures among them.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.results = self.step(self.reals, self.noises)
        except RuntimeError as error:
            torch.cuda.set_stream(stream)  # torch leaves the recording one current
            if not self.allow_fallback:
                raise
            print(f"the step runs without a CUDA graph: {str(error).splitlines()[0]}")
        else:
            self.graph = graph
