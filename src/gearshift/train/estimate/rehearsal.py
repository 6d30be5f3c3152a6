"""A stage's first steps on tensors without data: the code of the run itself, and every byte that it would take."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers.initialization import no_init_weights

from gearshift.data import Batch
from gearshift.mixers.attention_footprint import standing_in_for
from gearshift.mixers.attention_function import FLEX
from gearshift.mixers.footprint import standing_in
from gearshift.model import GearshiftConfig, GearshiftForCausalLM
from gearshift.spec import ModelSpec, Placement
from gearshift.train import losses
from gearshift.train.estimate.compiled import Compiled
from gearshift.train.estimate.tracker import Tracker
from gearshift.train.loop import Distiller
from gearshift.train.recipe import Recipe
from gearshift.train.sampling import AllocationSampling, PresetSampling

CUDA_ALIGNMENT = 512
"""Bytes that CUDA's allocator rounds up to."""


@dataclass(frozen=True, order=True)
class LayerCost:
    """What a layer costs under one of its mixers. Ordered by what it keeps, then by what it takes at most."""

    kept: int
    """Bytes from its forward to its backward pass."""
    most: int
    """Bytes at the fullest moment of both passes."""
    forward: int
    """Floating-point operations of its forward pass."""
    both: int
    """Those of both passes."""


@dataclass(frozen=True)
class Rehearsal:
    """What a stage's calibration and steps take."""

    fullest: tuple[Mapping[str, int], ...]
    """For each calibration and each step, what lived at its fullest moment: kind of tensor -> bytes. The loss over the
    vocabulary is apart."""
    at_loss: Mapping[str, int]
    """What lived at the fullest moment of that loss. Empty if there is none."""
    operations: int
    """Floating-point operations of the last step."""
    layers: "LayerCosts"
    """Those of each layer."""
    placement: Placement | None
    """What was chosen for a stochastic stage."""
    residual: int
    """Bytes of a number in the hidden states between layers."""


LayerCosts = Mapping[tuple[str, str], LayerCost]
"""(block, mixer) -> its costs."""


def rehearse(
    spec: ModelSpec,
    teacher: ModelSpec | None,
    recipe: Recipe,
    cuda: bool,
    choose: Callable[[LayerCosts], Placement] | None = None,
) -> Rehearsal:
    """The memory of the first of `recipe`'s stages on a GPU or a CPU. No weight is loaded, and nothing is computed.

    Args:
        spec: the model, learning in float32.
        teacher: a reference model, None for the model itself.
        recipe: how; of its stages the first one's first two steps are done. The second finds the optimiser's state.
        cuda: for a GPU, whether or not there is one here.
        choose: what a stochastic stage runs, by the layers' costs; None for a stage whose placements cost the same.
    """
    tracker = Tracker(CUDA_ALIGNMENT if cuda else 1)
    settings = _two_steps(recipe)
    if cuda:
        settings = _as_on_cuda(settings)
    with ExitStack() as within:
        # What torch says of slow kernels is no news of tensors that nothing is computed on.
        within.enter_context(warnings.catch_warnings(action="ignore"))
        within.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        within.enter_context(tracker)
        within.enter_context(_pretending(cuda))
        within.enter_context(standing_in(tracker.count))
        if cuda:
            name = within.enter_context(standing_in_for(settings.attn_implementation or FLEX))
            settings = settings.model_copy(update={"attn_implementation": name})
        if settings.compile:
            within.enter_context(_compiling(tracker))
        with tracker.labelled("parameters"):
            model = _build(spec)
            reference = None if teacher is None else _build(teacher).requires_grad_(False)
        blank = _blank(settings)
        distiller = Distiller(model, blank, settings, reference, chats=blank)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in distiller.scales)
        layers = _probe(distiller, tracker)
        placement = choose and choose(layers)
        if placement is not None:
            distiller = Distiller(model, blank, _two_steps(settings, placement), reference, chats=blank)
        with _loss_apart(tracker) as at_loss:
            fullest, operations = _run(distiller, tracker)
        residual = distiller.engine.precision.residual or torch.float32
        return Rehearsal(fullest, at_loss, operations, layers, placement, residual.itemsize)


def _two_steps(recipe: Recipe, placement: Placement | None = None) -> Recipe:
    """The recipe's first stage alone, for two steps, on one placement if it is given.

    Without it on any, for those that the recipe names do not fit a part of the layers.
    """
    fitting = AllocationSampling() if placement is None else PresetSampling(probabilities={str(placement): 1.0})
    update = {"steps": 2, "sampling": fitting}
    return recipe.model_copy(update={"stages": (recipe.stages[0].model_copy(update=update),)})


def _probe(distiller: Distiller, tracker: Tracker) -> dict[tuple[str, str], LayerCost]:
    """The costs of each block under each of its mixers, in a step's part of the batch."""
    settings, model = distiller.settings, distiller.model
    assert isinstance(settings, Recipe)
    rows = settings.batch_size_of(0) // settings.parts_of(0)
    recompute = getattr(settings.stages[0], "recompute", False)
    shape, dtype = (rows, settings.sequence_length, model.spec.hidden_size), distiller.engine.precision.residual
    hidden = torch.zeros(shape, dtype=dtype, requires_grad=True)
    model.set_attn_implementation(settings.attn_implementation or model.config._attn_implementation)
    context = model.model.context(hidden)
    costs = {}
    for name, block in dict(zip(model.spec.decoder.layout, model.model.blocks, strict=True)).items():
        for mixer in block.spec.mixers:
            # Tables that layers share, and traces, are made the first time.
            for _ in range(2):
                before, counted = tracker.total, tracker.operations
                tracker.peak = before
                with distiller.engine.precision():
                    made = distiller.engine.steps.run(block, mixer, hidden, context)[1]
                kept = hidden.nbytes if recompute else tracker.total - before
                forward = tracker.operations - counted
                made.backward(torch.empty_like(made))
                both = tracker.operations - counted + (forward if recompute else 0)
                del made
                hidden.grad = None
                model.zero_grad(set_to_none=True)
            costs[name, mixer] = LayerCost(kept, tracker.peak - before, forward, both)
    return costs


def _run(distiller: Distiller, tracker: Tracker) -> tuple[tuple[Mapping[str, int], ...], int]:
    """What lived at the fullest moments, and the operations of the last step."""

    def mark(parameter: Tensor) -> None:
        if parameter.grad is not None:
            tracker.label(parameter.grad, "gradients")

    for parameter in distiller.model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(mark)
    fullest: list[Mapping[str, int]] = []
    operations = 0
    tracker.start()
    for _ in distiller.run():
        fullest.append(tracker.at_peak)
        operations = tracker.operations
        if distiller.progress.step == 2:
            break
        for value in _state(distiller):
            tracker.label(value, "optimiser")
        tracker.start()
    return tuple(fullest), operations


def _state(distiller: Distiller) -> Iterator[Tensor]:
    """What the optimiser and the averages hold."""
    if distiller.optimiser is not None:
        for state in distiller.optimiser.state.values():
            yield from state.values()
    if distiller.average is not None:
        yield from distiller.average.averages.values()


def _as_on_cuda(settings: Recipe) -> Recipe:
    """The settings with what a GPU decides spelled out, for the tensors of a rehearsal lie on no GPU."""
    return settings.model_copy(
        update={
            "autocast": "bfloat16" if settings.autocast == "auto" else settings.autocast,
            "compile": settings.compile is not False,
            "cuda_graphs": False,
            "loss_chunk": settings.loss_chunk or 2048,
        }
    )


def _build(spec: ModelSpec) -> GearshiftForCausalLM:
    with no_init_weights():
        model = GearshiftForCausalLM(GearshiftConfig(spec))
    model.tie_weights()
    return model.eval()


@dataclass(frozen=True)
class _Blank:
    """Text without letters, made beforehand: a run draws in a thread of its own, where nothing may be computed.

    As chats, the assistant says all of it.
    """

    batches: Mapping[int, Batch]
    """By their number of sequences."""

    def draw(self, numbers: Iterable[int], seed: int = 0) -> Batch:
        return self.batches[len(list(numbers))]


def _pretending(cuda: bool) -> AbstractContextManager[Any]:
    """Within, tensors without data say that they are on CUDA where `cuda`, and give zeros where numbers are read."""
    return patch.multiple(
        FakeTensor,
        is_cuda=property(lambda tensor: cuda),
        tolist=lambda tensor: [0.0] * len(tensor) if tensor.ndim else 0.0,
        __float__=lambda tensor: 0.0,
        __bool__=lambda tensor: False,
        create=True,
    )


def _blank(settings: Recipe) -> _Blank:
    counts = {settings.batch_size_of(0), getattr(settings.stages[0], "calibration_sequences", None) or 1}
    shapes = {count: (count, settings.sequence_length) for count in counts}
    return _Blank({count: Batch(torch.zeros(shape, dtype=torch.int64)) for count, shape in shapes.items()})


@contextmanager
def _compiling(tracker: Tracker) -> Iterator[None]:
    """Within, torch.compile gives functions that take the memory of compiled ones."""
    compiled = cache(lambda function: Compiled(function, tracker))
    with (
        patch.object(torch, "compile", lambda function, **how: compiled(function)),
        patch.object(losses, "_compiled_chunk_terms", lambda: compiled(losses._chunk_terms)),
    ):
        yield


@contextmanager
def _loss_apart(tracker: Tracker) -> Iterator[dict[str, int]]:
    """Within, what the loss over the vocabulary takes is called "logits". Gives what lives at its fullest moment."""
    judge = losses._HeadLosses.forward
    at_loss: dict[str, int] = {}

    def labelled(*args: Any) -> Any:
        elsewhere = tracker.peak, tracker.at_peak
        tracker.peak = 0
        with tracker.labelled("logits"):
            made = judge(*args)
        at_loss.update(tracker.at_peak)
        tracker.peak, tracker.at_peak = elsewhere
        return made

    with patch.object(losses._HeadLosses, "forward", staticmethod(labelled)):
        yield at_loss
