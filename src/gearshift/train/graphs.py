"""CUDA graphs: work whose kernels are known beforehand, launched at once.

A small model's step is bound by how fast its thousands of kernels are launched. What is the same at every step is
recorded whole (`Graphed`); a student, whose layers run another mixer at each step, in a pair of graphs for each mixer
of each layer (`GraphedLayers`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from gearshift.data import Batch
from gearshift.mixers.base import MixContext
from gearshift.model import GearshiftForCausalLM
from gearshift.spec import Placement
from gearshift.train.engine import Precision
from gearshift.train.gradients import JoinedGradients
from gearshift.train.steps import BlockSteps

T = TypeVar("T")
WARM_UP = 3
"""Calls before a graph is recorded: kernels are compiled and tuned in them, and gradients get their memory."""


class Graphed(Generic[T]):
    """A function of a batch on CUDA that becomes one CUDA graph.

    The function must launch the same kernels at every call and read nothing back. Gradients that it adds stay where
    they are from the first call on: set them to zero, never to None. What it returns is overwritten by the next call.
    """

    def __init__(self, function: Callable[[Batch], T]):
        self.function = function
        self._graph: torch.cuda.CUDAGraph | None = None
        self._calls = 0

    def __call__(self, batch: Batch) -> T:
        """`function(batch)`. Packed documents, and calls of another shape than the first one's, run as they are."""
        if batch.starts is not None:
            return self.function(batch)
        if self._calls == 0:
            self._batch = Batch(batch.tokens.clone())
        if batch.tokens.shape != self._batch.tokens.shape:
            return self.function(batch)
        self._batch.tokens.copy_(batch.tokens)
        self._calls += 1
        if self._calls <= WARM_UP:
            with _side_stream():
                return self.function(self._batch)
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            with _recording(self._graph):
                self._result = self.function(self._batch)
        self._graph.replay()
        return self._result


@dataclass
class _Recorded:
    """A mixer of a layer, and all that stands around it in the block, recorded."""

    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph
    gradients: JoinedGradients
    """Of the parameters that learn, in memory that the layer's mixers share."""


class GraphedLayers:
    """The layers of a student on CUDA, for batches of one shape. A layer's mixer is recorded at its first use.

    One mixer of a layer runs at a time, so those of a layer share the memory of what the backward pass needs, and that
    of their gradients; all layers share the memory that a backward pass takes for itself.
    """

    def __init__(self, model: GearshiftForCausalLM, steps: BlockSteps, precision: Precision, hidden: Tensor):
        """`hidden` [batch, tokens, hidden] is like what the first layer will read."""
        self.model = model
        self.steps = steps
        self.precision = precision
        layers = len(model.model.blocks)
        with torch.no_grad():
            self._context: MixContext = model.model.context(hidden)
            self._hidden = [torch.zeros_like(hidden) for _ in range(layers + 1)]
            self._upstream = [torch.zeros_like(hidden) for _ in range(2)]
            self._gradients = [torch.zeros(_most_learning(block), device=hidden.device) for block in model.model.blocks]
        self._pools: list[Any] = [torch.cuda.graph_pool_handle() for _ in range(layers)]
        self._backward_pool: Any = torch.cuda.graph_pool_handle()
        self._recorded: dict[tuple[int, str], _Recorded] = {}

    def fits(self, hidden: Tensor) -> bool:
        """Whether `hidden` is of the shape that the layers were recorded for."""
        return hidden.shape == self._hidden[0].shape and hidden.dtype == self._hidden[0].dtype

    def run(self, hidden: Tensor, placement: Placement) -> Tensor:
        """[batch, tokens, hidden] before the first layer -> after the last one. Only mixers get gradients."""
        self._hidden[0].copy_(hidden)
        layers = list(enumerate(placement))
        first = next((layer for layer, name in layers if self._learning(layer, name)), len(layers))
        for layer, name in layers[:first]:
            self.forward(layer, name)
        # Autograd follows tensors that need gradients: what the first layer that learns reads has to pretend.
        hidden = self._hidden[first].detach().requires_grad_()
        for layer, name in layers[first:]:
            hidden = _Layer.apply(hidden, self, layer, name)
        return hidden

    def forward(self, layer: int, name: str) -> Tensor:
        """Run a layer on what stands in its place in memory. Returns what the next one reads."""
        if (layer, name) not in self._recorded:
            self._recorded[layer, name] = self._record(layer, name)
        self._recorded[layer, name].forward.replay()
        return self._hidden[layer + 1]

    def backward(self, layer: int, name: str, upstream: Tensor) -> Tensor:
        """Add the gradients of a layer's parameters. Returns that of what the layer read."""
        recorded = self._recorded[layer, name]
        incoming, outgoing = self._upstream[(layer + 1) % 2], self._upstream[layer % 2]
        if upstream.data_ptr() != incoming.data_ptr():
            incoming.copy_(upstream)
        recorded.gradients.attach()
        recorded.backward.replay()
        return outgoing

    def _learning(self, layer: int, name: str) -> list[nn.Parameter]:
        """The parameters that learn in a mixer of a layer."""
        mixer = self.model.model.blocks[layer].mixer_named(name)
        return [parameter for parameter in mixer.parameters() if parameter.requires_grad]

    def _record(self, layer: int, name: str) -> _Recorded:
        block, learning = self.model.model.blocks[layer], self._learning(layer, name)
        read = self._hidden[layer].detach().requires_grad_()
        incoming, outgoing = self._upstream[(layer + 1) % 2], self._upstream[layer % 2]

        def run() -> Tensor:
            # Not cached: a replay has to convert the weights as they are then.
            with torch.enable_grad(), self.precision(cached=False):
                return self.steps.run(block, name, read, self._context)[1]

        with _side_stream():
            for _ in range(WARM_UP):
                tried = torch.autograd.grad(run(), [read, *learning], incoming, allow_unused=True)
        parameters = [parameter for parameter, found in zip(learning, tried[1:], strict=True) if found is not None]
        gradients = JoinedGradients(parameters, self._gradients[layer])
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with _recording(forward, self._pools[layer]):
            made = run()
            self._hidden[layer + 1].copy_(made.detach())
        with _recording(backward, self._backward_pool):
            found = torch.autograd.grad(made, [read, *parameters], incoming)
            outgoing.copy_(found[0])
            gradients.add(found[1:])
        # What `made` held for the backward pass is free again: the layer's next mixer is recorded into the same memory.
        return _Recorded(forward, backward, gradients)


class _Layer(torch.autograd.Function):
    """A recorded layer, as autograd sees it."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, layers: GraphedLayers, layer: int, name: str) -> Tensor:
        ctx.layers, ctx.layer, ctx.name = layers, layer, name
        return layers.forward(layer, name).detach()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.layers.backward(ctx.layer, ctx.name, upstream[0]).detach(), None, None, None


def _most_learning(block: nn.Module) -> int:
    """The most numbers that learn in one of the block's mixers."""
    mixers = (block.mixer_named(name) for name in block.spec.mixers)  # type: ignore[operator, union-attr]
    return max(sum(p.numel() for p in mixer.parameters() if p.requires_grad) for mixer in mixers)


@cache
def _stream(device: int) -> torch.cuda.Stream:
    """One for all recordings on a device, for graphs can only share memory that one stream took."""
    return torch.cuda.Stream(device)


@contextmanager
def _side_stream() -> Iterator[None]:
    """Work on the stream of recordings, between what the current stream did before and what it does afterwards."""
    current, stream = torch.cuda.current_stream(), _stream(torch.cuda.current_device())
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)


@contextmanager
def _recording(graph: torch.cuda.CUDAGraph, pool: Any = None) -> Iterator[None]:
    """Record what is launched within into `graph`, with its memory from `pool`. Nothing is computed.

    RuntimeError that says what to do if something within cannot be recorded.
    """
    stream = _stream(torch.cuda.current_device())
    try:
        # Other threads, such as one that fetches data, may use CUDA meanwhile.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            yield
    except RuntimeError as error:
        raise RuntimeError(f"a step could not be recorded ({error}): set cuda_graphs to false") from error
