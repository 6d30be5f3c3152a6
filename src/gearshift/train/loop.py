"""Distilling a model in memory: the stages, one after another, a step at a time."""

import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gearshift.data import Batch, Sequences, TokenSequences
from gearshift.mixers.base import Mixer
from gearshift.model import GearshiftForCausalLM
from gearshift.plan.ahead import made_ahead
from gearshift.spec import Placement
from gearshift.train.ema import Average
from gearshift.train.engine import Engine, make_engine
from gearshift.train.guard import TrainingDivergedError, first_bad_tensor, guarded_step
from gearshift.train.layerwise import LayerwiseRun
from gearshift.train.metrics import CalibrationRecord, Callback, Record, StageEndRecord, StepRecord, close
from gearshift.train.noise import is_noisy, seeded, set_modes
from gearshift.train.optim import clip, learning, make_optimiser, schedule, set_learning_rate
from gearshift.train.parallel import ALONE, Parallel
from gearshift.train.recipe import DistillationSettings, LayerwiseStage
from gearshift.train.stage import StageRun
from gearshift.train.stochastic import StochasticRun

AHEAD = 3
"""Batches in memory: the one of this step, and those made while it runs."""


@dataclass
class Progress:
    """How far a run is: `step` steps of stage `stage` are done, and all stages before it."""

    stage: int = 0
    step: int = 0


class Distiller:
    """A distillation of a model in memory.

    `run()` goes on from `progress`. Between two of its records, the run is exactly what the model's parameters that
    learn, `progress`, `optimiser` and `average` say: whoever saves and restores the four resumes it.
    """

    def __init__(
        self,
        model: GearshiftForCausalLM,
        sequences: Sequences | None,
        settings: DistillationSettings,
        teacher: GearshiftForCausalLM | None = None,
        held_out: TokenSequences | None = None,
        chats: Sequences | None = None,
        held_out_chats: TokenSequences | None = None,
        parallel: Parallel = ALONE,
    ):
        """Prepare, and change nothing yet.

        Args:
            model: the supernet, in float32 where it is to learn. It is changed in place.
            sequences: what it learns from. None if all stages learn from chats, or until `read_from` says.
            settings: how.
            teacher: a reference model of the same shape, whose main placement teaches. None: the model's own.
            held_out: what each stage is judged on at its end.
            chats: what sft stages learn from, with the tokens that count marked.
            held_out_chats: what sft stages are judged on.
            parallel: the processes that share the work, where both models lie already. By itself, this one alone.

        Raises ValueError if the settings do not fit the model.
        """
        self.model = model
        self.settings = settings
        self.teacher = model if teacher is None else teacher
        self.parallel = parallel
        self.parallel.check(settings)
        self.read_from(sequences, held_out, chats, held_out_chats)
        self.progress = Progress()
        self.optimiser: torch.optim.AdamW | None = None
        self.average: Average | None = None
        self.device = model.lm_head.weight.device
        self.noisy = is_noisy(model)
        self.engine = make_engine(settings, {self.model, self.teacher}, self.device, parallel)
        for module in model.modules():
            if isinstance(module, Mixer):
                module.check_device(self.device, learning=True)
        self.scales = learning(model, settings, other_teacher=teacher is not None)
        """Name -> factor on the learning rate, of the parameters that learn."""
        if teacher is not None:
            _check_teacher(model, teacher, settings)
        with self._learning():
            for index in range(len(settings.stages)):
                self._stage_run(index)

    def read_from(
        self,
        sequences: Sequences | None,
        held_out: TokenSequences | None = None,
        chats: Sequences | None = None,
        held_out_chats: TokenSequences | None = None,
    ) -> None:
        """What to learn from and to be judged on, where that is there only once the settings have been checked."""
        self._sequences = {False: sequences, True: chats}
        self._held_out = {False: held_out, True: held_out_chats}

    def run(self) -> Iterator[Record]:
        """Do what is left, yielding a record after every step, every calibration and every stage.

        ValueError if there is nothing that a stage can learn from.
        """
        for index, stage in enumerate(self.settings.stages):
            if self._sequences[stage.reads_chats] is None:
                what = "chats" if stage.reads_chats else "text"
                raise ValueError(f"stage {index} is {stage.type} and learns from {what}, but got none")
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

    def make_average(self) -> Average | None:
        """New averages of the parameters that learn, if the settings ask for them."""
        if self.settings.ema is None:
            return None
        learning = ((name, value) for name, value in self.model.named_parameters() if name in self.scales)
        return Average(learning, self.settings.ema)

    @contextmanager
    def _learning(self) -> Iterator[None]:
        """Let the parameters in `scales`, and no others, have gradients. Puts everything back at the end."""
        before = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        modes = {model: model.training for model in (self.model, self.teacher)}
        functions = {model: model.config._attn_implementation for model in (self.model, self.teacher)}
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in self.scales)
        self.teacher.eval()
        set_modes(self.model)
        for model, function in functions.items():
            model.set_attn_implementation(self.engine.attn_implementation or function)
        try:
            with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
                yield
        finally:
            for model, training in modes.items():
                model.train(training)
            for model, function in functions.items():
                model.set_attn_implementation(function)
            for parameter, required in before:
                parameter.requires_grad_(required)
                parameter.grad = None

    def _run_stage(self, index: int) -> Iterator[Record]:
        stage, run = self.settings.stages[index], self._stage_run(index)
        if self.progress.step == 0 and stage.steps and run.calibration_sequences():
            yield self._calibrate(index, run)
        if self.optimiser is None:
            self.optimiser, self.average = self.make_optimiser(), self.make_average()
        with closing(self._batches(index)) as batches:
            started = time.perf_counter()
            for batch in batches:
                yield self._step(index, run, batch, started)
                started = time.perf_counter()
        if self.average is not None:
            self.average.apply()
        held_out = self._measure(index, run)
        run.close()
        self.model.zero_grad(set_to_none=True)  # a stage may leave its gradients where they are, at zero
        ended = self.global_step
        self.progress, self.optimiser, self.average = Progress(index + 1), None, None
        yield StageEndRecord(stage=index, type=stage.type, step=stage.steps, global_step=ended, held_out=held_out)

    def _calibrate(self, index: int, run: StageRun) -> CalibrationRecord:
        started = time.perf_counter()
        batch = self._batch(index, 0, run.calibration_sequences()).to(self.device)
        self.parallel.expect(self.model, self.teacher, self.model.spec.main, deep=True)
        self.model.eval()  # what is fitted must not depend on what dropout leaves of it
        try:
            errors = run.calibrate(batch)
        except torch.linalg.LinAlgError:
            parts = self.parallel.deal(batch, self.settings.part_size_of(index))
            plain = self._stage_run(index, self.engine.plain)
            what = "the calibration found numbers that are not finite"
            raise self._diverged(what, lambda: [plain.measure(part) for part in parts]) from None
        set_modes(self.model)
        seconds = time.perf_counter() - started
        kind = self.settings.stages[index].type
        return CalibrationRecord(
            stage=index, type=kind, step=0, global_step=self.global_step, seconds=seconds, **errors
        )

    def _step(self, index: int, run: StageRun, batch: Batch, started: float) -> StepRecord:
        """Learn from `batch`, which has been waited for since `started`."""
        stage, settings, step = self.settings.stages[index], self.settings, self.progress.step
        global_step = self._steps_before(index) + step
        assert self.optimiser is not None
        rate = stage.learning_rate * schedule(step, stage.steps, stage.schedule or settings.schedule)
        set_learning_rate(self.optimiser, rate)
        described = run.describe_step(global_step)
        self.parallel.expect(self.model, self.teacher, described.get("placement"), run.through_depth)
        parts = self._parts(index, batch.to(self.device))
        with self._seeded(global_step):
            terms = self._average(batch, parts, lambda part, share: run.learn(part, global_step, share))
        gradients = list(run.gradients())
        self.parallel.finish(gradients)
        norm = clip(gradients, settings.optimiser.clip_norm, self.parallel)
        if terms:
            guarded_step(self.optimiser, norm, *terms.values())
        if self.average is None:  # which looks at them, once the step has proved good
            run.forget_gradients()
        # Nothing was read back before this: on a GPU, all of the step has been launched, and what comes is waited for.
        said = {"loss": None, "terms": {}} if terms is None else run.describe(_read(terms))
        if terms:
            self._check(said["loss"], "loss", batch, parts)
        self._check(float(norm), "norm of the gradients", batch, parts)
        if self.average is not None:
            self.average.update()
            run.forget_gradients()
        self.progress.step += 1
        return StepRecord(
            stage=index,
            type=stage.type,
            step=step,
            global_step=global_step,
            total_steps=settings.total_steps,
            learning_rate=rate,
            gradient_norm=float(norm),
            tokens=batch.tokens.numel(),
            seconds=time.perf_counter() - started,
            **said,
            **described,
        )

    def _seeded(self, step: int) -> AbstractContextManager[None]:
        """Within, what is random depends on the step, counted over all stages, and this process's slice alone."""
        return seeded(self.device, self.settings.seed, step, self.parallel.data_rank) if self.noisy else nullcontext()

    def _check(self, value: float, what: str, batch: Batch, parts: Sequence[Batch]) -> None:
        """TrainingDivergedError if a number of the present step is not finite."""
        if math.isfinite(value):
            return
        step = self.global_step
        plain = self._stage_run(self.progress.stage, self.engine.plain)

        def learn_again() -> None:
            with self._seeded(step):
                self._average(batch, parts, lambda part, share: plain.learn(part, step, share))
            self.parallel.finish(plain.gradients())  # what another process's slice has lost shows here too

        raise self._diverged(f"the {what} became {value}", learn_again, plain.describe_step(step).get("placement"))

    def _diverged(
        self, what: str, again: Callable[[], object], placement: Placement | None = None
    ) -> TrainingDivergedError:
        """What to raise in a step that has changed nothing and must not; `again` repeats it."""
        kind = self.settings.stages[self.progress.stage].type
        where = kind if placement is None else f"{kind}, placement {placement}"
        tensor = first_bad_tensor(self.model, self.teacher, again, self.parallel)
        return TrainingDivergedError(
            f"{what} at step {self.progress.step} of stage {self.progress.stage} ({where}). The first bad tensor:"
            f" {tensor}. Nothing of the step is kept, and no checkpoint has any of it. If the model came with bad"
            " values, mend it; else begin a run with a lower learning rate"
        )

    def _measure(self, index: int, run: StageRun) -> dict[str, Any] | None:
        """What held-out text says of the model now, in parts of the stage's size."""
        held_out = self._held_out[self.settings.stages[index].reads_chats]
        if held_out is None:
            return None
        self.parallel.expect(self.model, self.teacher, self.model.spec.main, deep=True)
        whole = held_out.all.to(self.device)
        parts = self.parallel.deal(whole, self.settings.part_size_of(index))
        self.model.eval()
        terms = self._average(whole, parts, lambda part, share: run.measure(part))
        set_modes(self.model)
        assert terms is not None
        return run.describe(_read(terms))

    def _average(
        self, whole: Batch, parts: Sequence[Batch], judge: Callable[[Batch, float], dict[Any, Tensor] | None]
    ) -> dict[Any, Tensor] | None:
        """The mean of `judge(part, share)` over all parts of `whole` on all processes, by what they count for.

        `parts` are this process's. None if there was nothing to judge.
        """
        keys: list[Any] = []
        total: Tensor | float = 0.0
        weight = whole.weight * sum(map(len, parts)) / len(whole)
        if not weight:
            return None
        for index, part in enumerate(parts):
            share = part.weight / weight
            self.parallel.sync(index == len(parts) - 1)
            terms = judge(part, share)
            if terms is None:
                return None
            keys = list(terms)
            total = total + share * torch.stack(list(terms.values()))
        assert isinstance(total, Tensor), "there are parts"
        return dict(zip(keys, self.parallel.average(total).unbind(), strict=True))

    def _stage_run(self, index: int, engine: Engine | None = None) -> StageRun:
        stage, settings, engine = self.settings.stages[index], self.settings, engine or self.engine
        if isinstance(stage, LayerwiseStage):
            size, part = settings.batch_size_of(index), settings.part_size_of(index)
            return LayerwiseRun(self.model, self.teacher, engine, stage, settings.seed, size, part, self.parallel)
        chunk = settings.loss_chunk or (256 if self.device.type == "cpu" else 2048)
        return StochasticRun(self.model, self.teacher, engine, stage, settings.seed, chunk)

    def _parts(self, index: int, batch: Batch) -> list[Batch]:
        """This process's shares of the parts that a step of stage `index` is processed in."""
        return [self.parallel.slice(part) for part in batch.split(self.settings.part_size_of(index))]

    def _batches(self, index: int) -> Generator[Batch, None, None]:
        """The batches of the steps that are left of stage `index`, made in the background. To be closed."""
        steps = range(self.progress.step, self.settings.stages[index].steps)
        size = self.settings.batch_size_of(index)
        return made_ahead(steps, lambda step: self._batch(index, step, size), lambda step: 1, AHEAD)

    def _batch(self, index: int, step: int, count: int) -> Batch:
        """`count` sequences from where step `step` of stage `index` begins, not yet on the device.

        Stages that learn from text share one order, and so do those that learn from chats.
        """
        stages, size_of = self.settings.stages, self.settings.batch_size_of
        chats = stages[index].reads_chats
        before = sum(size_of(i) * stages[i].steps for i in range(index) if stages[i].reads_chats == chats)
        first = before + step * size_of(index)
        sequences = self._sequences[chats]
        assert sequences is not None
        batch = sequences.draw(range(first, first + count), self.settings.seed)
        return batch.pin_memory() if self.device.type == "cuda" else batch

    def _steps_before(self, index: int) -> int:
        return sum(stage.steps for stage in self.settings.stages[:index])


def distil(
    model: GearshiftForCausalLM,
    sequences: Sequences | None,
    settings: DistillationSettings,
    on_record: Callable[[Record], None] | None = None,
    callbacks: Sequence[Callback] = (),
    teacher: GearshiftForCausalLM | None = None,
    held_out: TokenSequences | None = None,
    chats: Sequences | None = None,
    held_out_chats: TokenSequences | None = None,
) -> None:
    """Distil a model in memory, in place, from start to end. No files: see `train` for checkpoints and resuming.

    `on_record` and the callbacks get each record as it is made; for the rest see `Distiller`.
    """
    try:
        for record in Distiller(model, sequences, settings, teacher, held_out, chats, held_out_chats).run():
            if on_record is not None:
                on_record(record)
            for callback in callbacks:
                callback.on_record(record)
    finally:
        close(callbacks)


def _read(terms: Mapping[Any, Tensor]) -> dict[Any, float]:
    """The terms as numbers: one stack and one copy, for on a GPU each term read by itself would wait for it."""
    return dict(zip(terms, torch.stack(list(terms.values())).tolist(), strict=True))


def _check_teacher(model: GearshiftForCausalLM, teacher: GearshiftForCausalLM, settings: DistillationSettings) -> None:
    """ValueError if the teacher cannot teach this model."""
    ours, theirs = model.spec, teacher.spec
    if ours.vocab_size != theirs.vocab_size:
        raise ValueError(f"the teacher's vocabulary has {theirs.vocab_size} tokens, the model's {ours.vocab_size}")
    compares = any(stage.compares_layers for stage in settings.stages)
    shapes = [(spec.decoder.num_layers, spec.hidden_size) for spec in (ours, theirs)]
    if compares and shapes[0] != shapes[1]:
        raise ValueError(
            f"layer by layer, a teacher of {shapes[1][0]} layers of {shapes[1][1]} channels cannot teach a model of"
            f" {shapes[0][0]} layers of {shapes[0][1]}: use stochastic stages without the activation loss"
        )
