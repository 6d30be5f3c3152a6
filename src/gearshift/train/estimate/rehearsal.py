"""A stage's first steps on tensors without data: the code of the run itself, and every byte that it would take."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers.initialization import no_init_weights

from gearshift.data import Batch
from gearshift.mixers.attention_footprint import standing_in_for
from gearshift.mixers.footprint import standing_in
from gearshift.model import GearshiftConfig, GearshiftForCausalLM
from gearshift.spec import ModelSpec
from gearshift.train import losses
from gearshift.train.estimate.compiled import Compiled
from gearshift.train.estimate.tracker import Tracker
from gearshift.train.loop import Distiller
from gearshift.train.metrics import CalibrationRecord
from gearshift.train.recipe import Recipe

CUDA_ALIGNMENT = 512
"""Bytes that CUDA's allocator rounds up to."""


@dataclass(frozen=True)
class Usage:
    """What a step takes."""

    peak: int
    """Bytes, at the fullest moment of the calibration and the steps."""
    parts: Mapping[str, int]
    """What the peak is made of."""
    operations: int
    """Floating-point operations of the last step."""
    learning: Mapping[str, int] = field(default_factory=dict)
    """Name -> bytes, of the parameters that learn."""
    touched: frozenset[str] = frozenset()
    """Those that the steps moved."""


def rehearse(spec: ModelSpec, teacher: ModelSpec | None, recipe: Recipe, cuda: bool) -> Usage:
    """The memory of the first of `recipe`'s stages on a GPU or a CPU. No weight is loaded, and nothing is computed.

    Args:
        spec: the model, learning in float32.
        teacher: a reference model, None for the model itself.
        recipe: how; of its stages the first one's first two steps are done. The second finds the optimiser's state.
        cuda: for a GPU, whether or not there is one here.
    """
    tracker = Tracker(CUDA_ALIGNMENT if cuda else 1)
    stage = recipe.stages[0].model_copy(update={"steps": 2})
    settings = recipe.model_copy(update={"stages": (stage,)})
    if cuda:
        settings = _as_on_cuda(settings)
    with ExitStack() as within:
        within.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        within.enter_context(tracker)
        within.enter_context(_pretending(cuda))
        within.enter_context(standing_in(tracker.count))
        if cuda:
            name = within.enter_context(standing_in_for(settings.attention or "flex_attention"))
            settings = settings.model_copy(update={"attention": name})
        if settings.compile:
            within.enter_context(_compiling(tracker))
        with tracker.labelled("parameters"):
            model = _build(spec)
            reference = None if teacher is None else _build(teacher).requires_grad_(False)
        counts = {settings.batch_size_of(0), getattr(stage, "calibration_sequences", None) or 1}
        shapes = {count: (count, settings.sequence_length) for count in counts}
        blank = _Blank({count: Batch(torch.zeros(shape, dtype=torch.int64)) for count, shape in shapes.items()})
        distiller = Distiller(model, blank, settings, reference)
        with _loss_apart(tracker):
            return _run(distiller, tracker)


def _run(distiller: Distiller, tracker: Tracker) -> Usage:
    learning = {name: value for name, value in distiller.model.named_parameters() if name in distiller.scales}
    touched: set[str] = set()
    hooks = []
    for name, parameter in learning.items():

        def mark(parameter: Tensor, name: str = name) -> None:
            touched.add(name)
            if parameter.grad is not None:
                tracker.label(parameter.grad, "gradients")

        parameter.requires_grad_()
        hooks.append(parameter.register_post_accumulate_grad_hook(mark))
    tracker.start()
    peak, parts = 0, dict(tracker.at_peak)
    for record in distiller.run():
        assert distiller.optimiser is not None or isinstance(record, CalibrationRecord)
        if tracker.peak > peak:
            peak, parts = tracker.peak, dict(tracker.at_peak)
        operations = tracker.operations
        if distiller.optimiser is not None:
            for state in distiller.optimiser.state.values():
                for value in state.values():
                    tracker.label(value, "optimiser")
            if distiller.average is not None:
                for value in distiller.average.averages.values():
                    tracker.label(value, "optimiser")
            if distiller.progress.step == 2:
                break
        tracker.start()
    for hook in hooks:
        hook.remove()
    sizes = {name: value.numel() * value.element_size() for name, value in learning.items()}
    return Usage(peak, parts, operations, sizes, frozenset(touched))


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
    """Text without letters, made beforehand: a run draws in a thread of its own, where nothing may be computed."""

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


@contextmanager
def _compiling(tracker: Tracker) -> Iterator[None]:
    """Within, torch.compile gives functions that take the memory of compiled ones."""
    chunk_terms = Compiled(losses._chunk_terms, tracker)
    with (
        patch.object(torch, "compile", lambda function, **how: Compiled(function, tracker)),
        patch.object(losses, "_compiled_chunk_terms", lambda: chunk_terms),
    ):
        yield


@contextmanager
def _loss_apart(tracker: Tracker) -> Iterator[None]:
    """Within, what the loss over the vocabulary takes is called "logits"."""
    judge = losses._HeadLosses.forward

    def labelled(*args: Any) -> Any:
        with tracker.labelled("logits"):
            return judge(*args)

    with patch.object(losses._HeadLosses, "forward", staticmethod(labelled)):
        yield
