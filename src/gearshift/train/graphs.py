"""CUDA graphs: work whose kernels are known beforehand, launched at once.

A small model's step is bound by how fast its thousands of kernels are launched. What is the same at every step is
recorded whole (`Graphed`); a student, whose layers run another mixer at each step, in a pair of graphs for each mixer
of each layer (`GraphedLayers`).
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from gearshift.data import Batch
from gearshift.mixers.base import MixContext
from gearshift.model import GearshiftForCausalLM
from gearshift.spec import Placement
from gearshift.train.engine import FrozenWeights, Precision
from gearshift.train.gradients import JoinedGradients
from gearshift.train.recording import Arena, Kept, Pool, recording, side_stream
from gearshift.train.steps import BlockSteps

T = TypeVar("T")
WARM_UP = 3
"""Calls before a graph is recorded: kernels are compiled and tuned in them, and gradients get their memory."""


class Graphed(Generic[T]):
    """A function of a batch on CUDA that becomes one CUDA graph.

    The function must launch the same kernels at every call and read nothing back. Gradients that it adds stay where
    they are from the first call on: set them to zero, never to None. What it returns is overwritten by the next call.
    """

    def __init__(self, function: Callable[[Batch], T], within: Callable[[], AbstractContextManager[Any]] = nullcontext):
        """`within` gives the context to record in."""
        self.function = function
        self.within = within
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
            with side_stream(), self.within():
                return self.function(self._batch)
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            with recording(self._graph), self.within():
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

    All are recorded into the same memory. What a mixer's backward pass will read is copied out of it, into memory of
    the layer; one mixer of a layer runs at a time, so they share that, and the memory of their gradients. Of the MLP
    nothing is kept: the backward pass runs it again.
    """

    def __init__(
        self,
        model: GearshiftForCausalLM,
        steps: BlockSteps,
        precision: Precision,
        frozen: FrozenWeights,
        hidden: Tensor,
    ):
        """`hidden` [batch, tokens, hidden] is like what the first layer will read."""
        self.model = model
        self.steps = steps
        self.precision = precision
        self.frozen = frozen
        layers = len(model.model.blocks)
        with torch.no_grad():
            self._context: MixContext = model.model.context(hidden)
            self._hidden = [torch.zeros_like(hidden) for _ in range(layers + 1)]
            self._upstream = [torch.zeros_like(hidden) for _ in range(2)]
            self._gradients = [torch.zeros(_most_learning(block), device=hidden.device) for block in model.model.blocks]
        self._pool: Pool = torch.cuda.graph_pool_handle()
        self._arenas = [Arena(hidden.device) for _ in range(layers)]
        self._sizes: dict[tuple[str, str, tuple[bool, ...]], list[int]] = {}
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
        spec = self.model.spec.decoder
        trial = torch.cuda.CUDAGraph()  # holds the pool until another one does
        with torch.enable_grad(), self.frozen():
            work = _Work(self, layer, name)
            with side_stream():
                for _ in range(WARM_UP):
                    parameters = work.rehearse()
            # What is kept depends on which of its parameters learn, and these may be frozen in one layer alone.
            kind = spec.layout[layer], name, tuple(parameter.requires_grad for parameter in work.mixer.parameters())
            if kind not in self._sizes:
                self._sizes[kind] = work.sizes(trial, self._pool)
            gradients = JoinedGradients(parameters, self._gradients[layer])
            forward = work.record_forward(self._pool, self._arenas[layer].pieces(self._sizes[kind]))
            backward = work.record_backward(self._pool, gradients)
        return _Recorded(forward, backward, gradients)


class _Work:
    """What a layer does under one of its mixers, to be recorded."""

    def __init__(self, layers: GraphedLayers, layer: int, name: str):
        self.steps, self.precision, self.context = layers.steps, layers.precision, layers._context
        self.block = layers.model.model.blocks[layer]
        self.mixer = self.block.mixer_named(name)
        self.learning = layers._learning(layer, name)
        self.read = layers._hidden[layer].detach().requires_grad_()
        self.written = layers._hidden[layer + 1]
        self.incoming, self.outgoing = layers._upstream[(layer + 1) % 2], layers._upstream[layer % 2]

    def rehearse(self) -> list[nn.Parameter]:
        """Do it all as it is. Returns the parameters that get a gradient."""
        mixed = self._mix()
        self._feed(mixed)
        found = torch.autograd.grad(mixed, [self.read, *self.learning], self._pull_back(mixed), allow_unused=True)
        return [parameter for parameter, one in zip(self.learning, found[1:], strict=True) if one is not None]

    def sizes(self, trial: torch.cuda.CUDAGraph, pool: Pool) -> list[int]:
        """The bytes that have to be kept for the backward pass, piece by piece."""
        kept = Kept(pool)
        with recording(trial, pool), kept.noticing():
            mixed = self._mix()
        return kept.sizes(mixed)

    def record_forward(self, pool: Pool, pieces: Sequence[Tensor]) -> torch.cuda.CUDAGraph:
        """What the backward pass reads comes into `pieces`, of the sizes that `sizes` gives."""
        graph, kept = torch.cuda.CUDAGraph(), Kept(pool)
        with recording(graph, pool):
            with kept.noticing():
                mixed = self._mix()
            self._mixed = kept.moved(mixed, pieces)
            del mixed
            self._feed(self._mixed)
        kept.check()
        return graph

    def record_backward(self, pool: Pool, gradients: JoinedGradients) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with recording(graph, pool):
            upstream = self._pull_back(self._mixed)
            found = torch.autograd.grad(self._mixed, [self.read, *gradients.parameters], upstream)
            self.outgoing.copy_(found[0])
            gradients.add(found[1:])
        return graph

    def _mix(self) -> Tensor:
        """What the MLP's half of the block reads."""
        # Not cached: a replay has to convert the weights as they are then.
        with self.precision(cached=False):
            entered = self.steps.enter(self.block, self.mixer, self.read, self.context)
            result = self.mixer.core(entered, self.context, None)
            return self.steps.leave(self.block, self.mixer, self.read, result)

    @torch.no_grad()
    def _feed(self, mixed: Tensor) -> None:
        with self.precision(cached=False):
            self.written.copy_(self.steps.second_half(self.block, mixed))

    @torch.no_grad()
    def _pull_back(self, mixed: Tensor) -> Tensor:
        """The gradient of `mixed`, for which the MLP runs again."""
        with self.precision(cached=False):
            return self.steps.pull_back(self.block, mixed, self.incoming)


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
