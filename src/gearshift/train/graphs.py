"""CUDA graphs: work that is the same at every step, launched at once."""

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
WARM_UP = 3
"""Calls before the graph is recorded: kernels are compiled and tuned in them, and gradients get their memory."""


class Graphed(Generic[T]):
    """A function of token ids on CUDA that becomes one CUDA graph.

    The function must launch the same kernels at every call and read nothing back. Gradients that it adds stay where
    they are from the first call on: set them to zero, never to None. What it returns is overwritten by the next call.
    """

    def __init__(self, function: Callable[[Tensor], T]):
        self.function = function
        self._graph: torch.cuda.CUDAGraph | None = None
        self._calls = 0

    def __call__(self, tokens: Tensor) -> T:
        """`function(tokens)`. Calls with another shape than the first one's run as they are."""
        if self._calls == 0:
            self._tokens = tokens.clone()
        if tokens.shape != self._tokens.shape:
            return self.function(tokens)
        self._tokens.copy_(tokens)
        self._calls += 1
        if self._calls <= WARM_UP:
            return self._warm_up()
        if self._graph is None:
            self._record()
        assert self._graph is not None
        self._graph.replay()
        return self._result

    def _warm_up(self) -> T:
        """On a stream of its own, as recording will be."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            result = self.function(self._tokens)
        torch.cuda.current_stream().wait_stream(stream)
        return result

    def _record(self) -> None:
        """Nothing is computed while recording, so gradients are as they were."""
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as one that fetches data, may use CUDA meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._result = self.function(self._tokens)
        self._graph = graph
