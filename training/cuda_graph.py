"""The training step as a CUDA graph: captured once, then replayed with one launch in place of some eight hundred."""

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from errors import UserError, one_line

WARM_UP = 3  # eager steps before the capture, in which libraries do their lazy initialization; they count as steps

Inputs = Sequence[dict[str, Tensor]]  # of each update


def can_capture(device: torch.device, cuda_graph: str, world_size: int) -> bool:
    """Return whether to capture the step; print the reason where `--cuda_graph auto` falls back to eager.

    The all-reduce of gradients between ranks is not captured.

    Raises:
        UserError: `--cuda_graph true` on several ranks, or without an NVIDIA GPU.
    """
    if cuda_graph == "true" and (device.type != "cuda" or world_size > 1):
        raise UserError(
            f"--cuda_graph true needs an NVIDIA GPU and a single process; this run has {world_size} on {device}: "
            "use --cuda_graph auto"
        )
    if cuda_graph == "false" or device.type != "cuda":
        return False
    if world_size > 1:
        print("CUDA graph disabled, running eagerly: gradients are all-reduced between ranks")
    return world_size == 1


class GraphedStep:
    """Call `step` by replaying its capture on new inputs; the results are those of `step` itself.

    The step must do the same work on the same memory at every call: inputs of fixed shapes; parameters, statistics and
    optimizer state updated in place; no random numbers drawn, no value read back. The tensors that it returns are
    overwritten by the next call.

    Args:
        step: takes the inputs of all its updates; returns named 0-d tensors.
        device: the GPU, which must be the current one.
        fallback: run `step` eagerly, with one printed line, where the capture fails; False raises instead. Some
            versions of torch do not free the memory of a failed capture.
    """

    def __init__(self, step: Callable[[Inputs], dict[str, Tensor]], device: torch.device, fallback: bool):
        self.step = step
        self.fallback = fallback
        self.stream = torch.cuda.Stream(device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: Inputs = ()
        self.results: dict[str, Tensor] = {}
        self.calls = 0

    def __call__(self, inputs: Inputs) -> dict[str, Tensor]:
        self.calls += 1
        if self.calls <= WARM_UP:
            return self._warm_up(inputs)
        if self.calls == WARM_UP + 1:
            self._capture(inputs)
        if self.graph is None:
            return self.step(inputs)
        for target, source in zip(tree_leaves(self.inputs), tree_leaves(inputs), strict=True):
            target.copy_(source)
        self.graph.replay()
        return self.results

    def _warm_up(self, inputs: Inputs) -> dict[str, Tensor]:
        """Run an eager step on a side stream, as capturing requires."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*capturable=True")  # the optimizer is not captured yet
            results = self.step(inputs)
        torch.cuda.current_stream().wait_stream(self.stream)
        return results

    def _capture(self, inputs: Inputs) -> None:
        """Capture the step; capturing executes nothing."""
        self.inputs = tree_map(torch.zeros_like, inputs)  # keeps memory formats
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream()
        try:
            # "thread_local": other threads may use CUDA meanwhile, such as the one that writes images.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.results = self.step(self.inputs)
        except RuntimeError as error:
            torch.cuda.set_stream(stream)  # torch leaves the capturing stream current
            if not self.fallback:
                raise
            while error.__context__:  # leaving a failed capture raises further, less specific errors
                error = error.__context__
            print(f"CUDA graph disabled, running eagerly: {one_line(error)}")
        else:
            self.graph = graph
