"""Distilling a model in memory: the stages, one after another, a step at a time."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gearshift.data import TokenSequences
from gearshift.mixers.base import Mixer
from gearshift.model import GearshiftForCausalLM
from gearshift.train.layerwise import LayerwiseRun
from gearshift.train.metrics import CalibrationRecord, Callback, Record, StageEndRecord, StepRecord
from gearshift.train.noise import seeded, set_modes
from gearshift.train.optim import clip, learning_rate_scales, make_optimiser, schedule, set_learning_rate
from gearshift.train.parallel import ALONE, Parallel
from gearshift.train.recipe import DistillationSettings, LayerwiseStage
from gearshift.train.stage import Precision, StageRun
from gearshift.train.stochastic import StochasticRun


class TrainingDivergedError(RuntimeError):
    """The loss is no number any more."""


@dataclass
class Progress:
    """How far a run is: `step` steps of stage `stage` are done, and all stages before it."""

    stage: int = 0
    step: int = 0


class Distiller:
    """A distillation of a model in memory.

    `run()` goes on from `progress`. Between two of its records, the run is exactly what the model's parameters that
    learn, `progress` and `optimiser` say: whoever saves and restores the three resumes it.
    """

    def __init__(
        self,
        model: GearshiftForCausalLM,
        sequences: TokenSequences,
        settings: DistillationSettings,
        teacher: GearshiftForCausalLM | None = None,
        held_out: TokenSequences | None = None,
        parallel: Parallel = ALONE,
    ):
        """Prepare, and change nothing yet.

        Args:
            model: the supernet, in float32 where it is to learn. It is changed in place.
            sequences: what it learns from.
            settings: how.
            teacher: a reference model of the same shape, whose main placement teaches. None: the model's own.
            held_out: what each stage is judged on at its end.
            parallel: the processes that share the work, where both models lie already. By itself, this one alone.

        Raises ValueError if the settings do not fit the model.
        """
        self.model = model
        self.sequences = sequences
        self.settings = settings
        self.teacher = model if teacher is None else teacher
        self.held_out = held_out
        self.parallel = parallel
        self.parallel.check(settings)
        self.progress = Progress()
        self.optimiser: torch.optim.AdamW | None = None
        self.device = model.lm_head.weight.device
        self.precision = Precision(settings.autocast, self.device)
        for module in model.modules():
            if isinstance(module, Mixer):
                module.check_device(self.device, learning=True)
        own = teacher is None
        self.scales = learning_rate_scales(model, settings.learning_rate_scales, settings.freeze, own)
        """Name -> factor on the learning rate, of the parameters that learn."""
        if teacher is not None:
            _check_teacher(model, teacher, settings)
        with self._learning():
            for index in range(len(settings.stages)):
                self._stage_run(index)

    def run(self) -> Iterator[Record]:
        """Do what is left, yielding a record after every step, every calibration and every stage."""
        with self._learning():
            while self.progress.stage < len(self.settings.stages):
                yield from self._run_stage(self.progress.stage)

    @property
    def global_step(self) -> int:
        """Steps done, over all stages."""
        return self._steps_before(self.progress.stage) + self.progress.step

    def make_optimiser(self) -> torch.optim.AdamW:
        """A new optimiser for the parameters that learn."""
        return make_optimiser(self.model, self.scales, self.settings.optimiser)

    @contextmanager
    def _learning(self) -> Iterator[None]:
        """Let the parameters in `scales`, and no others, have gradients. Puts everything back at the end."""
        before = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        training = self.model.training
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in self.scales)
        set_modes(self.model)
        try:
            yield
        finally:
            self.model.train(training)
            for parameter, required in before:
                parameter.requires_grad_(required)
                parameter.grad = None

    def _run_stage(self, index: int) -> Iterator[Record]:
        stage, run = self.settings.stages[index], self._stage_run(index)
        if self.progress.step == 0 and stage.steps and run.calibration_sequences():
            yield self._calibrate(index, run)
        if self.optimiser is None:
            self.optimiser = self.make_optimiser()
        while self.progress.step < stage.steps:
            yield self._step(index, run)
        held_out = self._measure(index, run)
        ended = self.global_step
        self.progress, self.optimiser = Progress(index + 1), None
        yield StageEndRecord(stage=index, type=stage.type, step=stage.steps, global_step=ended, held_out=held_out)

    def _calibrate(self, index: int, run: StageRun) -> CalibrationRecord:
        started = time.perf_counter()
        self.parallel.expect(self.model, self.teacher, None)
        errors = run.calibrate(self._batch(index, 0, run.calibration_sequences()))
        seconds = time.perf_counter() - started
        kind = self.settings.stages[index].type
        return CalibrationRecord(
            stage=index, type=kind, step=0, global_step=self.global_step, seconds=seconds, **errors
        )

    def _step(self, index: int, run: StageRun) -> StepRecord:
        started = time.perf_counter()
        stage, settings, step = self.settings.stages[index], self.settings, self.progress.step
        global_step = self._steps_before(index) + step
        assert self.optimiser is not None
        rate = stage.learning_rate * schedule(step, stage.steps, stage.schedule or settings.schedule)
        set_learning_rate(self.optimiser, rate)
        batch = self._batch(index, step, settings.batch_size_of(index))
        described = run.describe_step(global_step)
        self.parallel.expect(self.model, self.teacher, described.get("placement"))
        parts = [self.parallel.slice(part) for part in batch.chunk(settings.parts_of(index))]
        with seeded(self.model, self.device, settings.seed, global_step):
            values = self._average(parts, lambda part, share: run.learn(part, global_step, share))
        self.parallel.finish(self.model)
        norm = clip(run.clip_groups(), settings.optimiser.clip_norm, self.parallel)
        if values:
            self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        said = {"loss": None, "terms": {}} if values is None else run.describe(values)
        if values is not None and not math.isfinite(said["loss"]):
            raise TrainingDivergedError(
                f"the loss became {said['loss']} at step {step} of stage {index} ({stage.type}): lower its rate"
            )
        self.progress.step += 1
        return StepRecord(
            stage=index,
            type=stage.type,
            step=step,
            global_step=global_step,
            total_steps=settings.total_steps,
            learning_rate=rate,
            gradient_norm=float(norm),
            tokens=batch.numel(),
            seconds=time.perf_counter() - started,
            **said,
            **described,
        )

    def _measure(self, index: int, run: StageRun) -> dict[str, Any] | None:
        """What held-out text says of the model now, in parts of the stage's size."""
        if self.held_out is None:
            return None
        size = self.settings.batch_size_of(index) // self.settings.parts_of(index)
        tokens = self.held_out.tokens.to(self.device)
        self.model.eval()
        values = self._average(self.parallel.deal(tokens, size), lambda part, share: run.measure(part))
        set_modes(self.model)
        assert values is not None
        return run.describe(values)

    def _average(
        self, batches: Sequence[Tensor], judge: Callable[[Tensor, float], dict[Any, Tensor] | None]
    ) -> dict[Any, float] | None:
        """The mean of `judge(part, share)` over all parts on all processes, weighted by their sequences.

        None if there was nothing to judge.
        """
        total: dict[Any, Tensor] = {}
        sequences = sum(len(batch) for batch in batches)
        for index, batch in enumerate(batches):
            share = len(batch) / sequences
            self.parallel.sync(index == len(batches) - 1)
            terms = judge(batch, share)
            if terms is None:
                return None
            for key, value in terms.items():
                total[key] = total[key] + share * value if key in total else share * value
        # One stack and one copy: on a GPU, reading each term by itself would wait for it.
        mean = self.parallel.average(torch.stack(list(total.values())))
        return dict(zip(total, mean.tolist(), strict=True))

    def _stage_run(self, index: int) -> StageRun:
        stage, settings = self.settings.stages[index], self.settings
        if isinstance(stage, LayerwiseStage):
            size = settings.batch_size_of(index)
            part = size // settings.parts_of(index)
            return LayerwiseRun(self.model, self.teacher, self.precision, stage, size, part, self.parallel)
        chunk = settings.loss_chunk or (256 if self.device.type == "cpu" else 2048)
        return StochasticRun(self.model, self.teacher, self.precision, stage, settings.seed, chunk)

    def _batch(self, index: int, step: int, count: int) -> Tensor:
        """`count` sequences from where step `step` of stage `index` begins, [count, tokens]. Stages share one order."""
        sizes = [self.settings.batch_size_of(stage) for stage in range(index + 1)]
        before = sum(size * stage.steps for size, stage in zip(sizes, self.settings.stages[:index], strict=False))
        first = before + step * sizes[index]
        drawn = [self.sequences.batch(number, 1, self.settings.seed) for number in range(first, first + count)]
        return torch.cat(drawn).to(self.device)

    def _steps_before(self, index: int) -> int:
        return sum(stage.steps for stage in self.settings.stages[:index])


def distil(
    model: GearshiftForCausalLM,
    sequences: TokenSequences,
    settings: DistillationSettings,
    on_record: Callable[[Record], None] | None = None,
    callbacks: Sequence[Callback] = (),
    teacher: GearshiftForCausalLM | None = None,
    held_out: TokenSequences | None = None,
) -> None:
    """Distil a model in memory, in place, from start to end. No files: see `train` for checkpoints and resuming.

    `on_record` and the callbacks get each record as it is made; for the rest see `Distiller`.
    """
    try:
        for record in Distiller(model, sequences, settings, teacher, held_out).run():
            if on_record is not None:
                on_record(record)
            for callback in callbacks:
                callback.on_record(record)
    finally:
        for callback in callbacks:
            callback.close()


def _check_teacher(model: GearshiftForCausalLM, teacher: GearshiftForCausalLM, settings: DistillationSettings) -> None:
    """ValueError if the teacher cannot teach this model."""
    ours, theirs = model.spec, teacher.spec
    if ours.vocab_size != theirs.vocab_size:
        raise ValueError(f"the teacher's vocabulary has {theirs.vocab_size} tokens, the model's {ours.vocab_size}")
    compares = any(isinstance(stage, LayerwiseStage) or stage.losses.activation > 0 for stage in settings.stages)
    shapes = [(spec.decoder.num_layers, spec.hidden_size) for spec in (ours, theirs)]
    if compares and shapes[0] != shapes[1]:
        raise ValueError(
            f"layer by layer, a teacher of {shapes[1][0]} layers of {shapes[1][1]} channels cannot teach a model of"
            f" {shapes[0][0]} layers of {shapes[0][1]}: use stochastic stages without the activation loss"
        )
