"""The layerwise stage: every mixer learns the main mixer's output on the teacher's hidden states.

One forward of the teacher serves all layers. Nothing flows back through depth, so each mixer is a problem of its own:
its loss is its own error, and the memory of one mixer's backward pass is all that is needed at a time.

What mixers read is either the teacher's stream of hidden states too, or that of a student: a sampled placement, through
which a second stream runs beside the first. All mixers of a layer run on it in any case, so that the placement is no
more than a number a layer, which picks one of their outputs: the step stays one CUDA graph whatever is sampled.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from gearshift.data import Batch
from gearshift.mixers.base import MixContext, Mixer
from gearshift.model import GearshiftForCausalLM
from gearshift.train.calibration import calibrate
from gearshift.train.engine import Engine
from gearshift.train.gradients import JoinedGradients
from gearshift.train.graphs import Graphed
from gearshift.train.parallel import ALONE, Parallel
from gearshift.train.recipe import LayerwiseStage
from gearshift.train.stage import LayerErrors, StageRun, Terms, gradients_of


class LayerwiseRun(StageRun):
    """The layerwise stage at work. Its placements are its students'."""

    stage: LayerwiseStage

    def __init__(
        self,
        model: GearshiftForCausalLM,
        teacher: GearshiftForCausalLM,
        engine: Engine,
        stage: LayerwiseStage,
        seed: int,
        batch_size: int,
        part_size: int,
        parallel: Parallel = ALONE,
    ):
        super().__init__(model, teacher, engine, stage, seed)
        self.batch_size = batch_size
        self.part_size = part_size
        self._graphed: dict[float, Graphed[Terms]] = {}
        self._gradients: dict[Mixer, JoinedGradients] = {}
        self.parallel = parallel
        if not any(self.students):
            raise ValueError("the layerwise stage has nothing to do: no parameter of any mixer learns")
        if self.has_student:
            stage.sampling.check(self.choices, self.presets)
        self._sampled = torch.zeros(len(self.choices), 1, dtype=torch.int64, device=model.lm_head.weight.device)
        """[layers, 1]: which of a layer's choices the student runs. On the device, where a recorded step reads it."""

    @property
    def has_student(self) -> bool:
        """Whether mixers learn on a student's stream."""
        return self.stage.stream == "student"

    def calibration_sequences(self) -> int:
        return 0 if self.stage.calibration == "none" else self.stage.calibration_sequences or self.batch_size

    def calibrate(self, batch: Batch) -> dict[str, LayerErrors]:
        return calibrate(
            self.teacher,
            self.model,
            self.students,
            self.parallel.deal(batch, self.part_size),
            self.stage.calibration,
            self.stage.ridge,
            self.precision,
            self.parallel,
        )

    def learn(self, batch: Batch, step: int, share: float) -> Terms | None:
        if self.has_student:
            pairs = zip(self.choices, self.placement(step), strict=True)
            self._sampled.copy_(torch.tensor([[offered.index(name)] for offered, name in pairs]))
        if share not in self._graphed:
            weight = torch.full((), share, device=self._sampled.device)
            self._graphed[share] = Graphed(lambda part: self._judge(part, weight), self.frozen)
        graphed = self._graphed[share]
        return graphed(batch) if self.graphs else graphed.function(batch)

    @property
    def joins_gradients(self) -> bool:
        """Whether a mixer's gradients lie in one tensor and stay there, as what is recorded needs it."""
        return self.graphs

    def close(self) -> None:
        self._graphed.clear()
        self._gradients.clear()
        super().close()

    def measure(self, batch: Batch) -> Terms:
        """The errors on the teacher's stream, whatever was learnt on: runs of both kinds compare."""
        return self._judge(batch, None)

    def _judge(self, batch: Batch, weight: Tensor | None) -> Terms:
        """The error of each mixer of each layer, under (name, layer). Adds its gradient times the scalar `weight`."""
        teacher, student = self.teacher.model, self.model.model
        main, has_student = self.teacher.spec.main, self.has_student and weight is not None
        errors: Terms = {}
        with torch.no_grad():
            hidden = self.precision.embed(self.teacher, batch.inputs)
            stream = self.precision.embed(self.model, batch.inputs) if has_student else hidden
        context = teacher.context(hidden, cu_seqlens=batch.cu_seqlens)
        own = context if self.own_teacher else student.context(hidden, cu_seqlens=batch.cu_seqlens)
        own.recompute = False  # one mixer at a time waits for its backward pass
        pairs = zip(teacher.blocks, student.blocks, self.students, strict=True)
        for layer, (block, student_block, mixers) in enumerate(pairs):
            with torch.no_grad(), self.precision():
                normed = self.steps.norm(block, hidden)
                read = normed if self.own_teacher and not has_student else self.steps.norm(student_block, stream)
                target, hidden = self.steps.teach(block, main[layer], hidden, normed, context)
            outputs: dict[str, Tensor] = {}
            for name, mixer in mixers.items():
                with torch.set_grad_enabled(weight is not None), self.precision():
                    output = self.steps.mix(mixer, read, own)
                    error = self.steps.error(output, target, len(batch))
                if weight is not None:
                    self._learn_from(mixer, error, weight)
                errors[name, layer] = error.detach()
                if has_student:
                    outputs[name] = output.detach()
            stream = self._follow(layer, stream, read, own, outputs) if has_student else hidden
        return errors

    def _learn_from(self, mixer: Mixer, error: Tensor, weight: Tensor) -> None:
        """Add the gradient of the scalar `error`, times `weight`, to those of the mixer's parameters."""
        if not self.joins_gradients:
            error.backward(weight)
            return
        learning = [parameter for parameter in mixer.parameters() if parameter.requires_grad]
        tried = torch.autograd.grad(error, learning, weight, allow_unused=True)
        found = {p: gradient for p, gradient in zip(learning, tried, strict=True) if gradient is not None}
        if mixer not in self._gradients:
            self._gradients[mixer] = JoinedGradients(list(found))
        self._gradients[mixer].attach()
        self._gradients[mixer].add(list(found.values()))

    @torch.no_grad()
    def _follow(
        self, layer: int, stream: Tensor, read: Tensor, context: MixContext, outputs: Mapping[str, Tensor]
    ) -> Tensor:
        """What the next layer reads of the student's stream, [batch, tokens, hidden].

        Args:
            layer: the layer.
            stream: [batch, tokens, hidden], what the layer reads of it.
            read: the same, normed for its mixers.
            context: of the student.
            outputs: those of the layer's mixers that are known. The others run here.
        """
        block = self.model.model.blocks[layer]
        with self.precision():
            every = torch.stack(
                [
                    outputs[name] if name in outputs else self.steps.mix(block.mixer_named(name), read, context)
                    for name in self.choices[layer]
                ]
            )
            return self.steps.feed(block, stream, every.index_select(0, self._sampled[layer])[0])

    def describe_step(self, step: int) -> dict[str, Any]:
        return {"placement": self.placement(step)} if self.has_student else {}

    def describe(self, values: Mapping[Any, float]) -> dict[str, Any]:
        """`layers`: mixer -> error of each layer, None where it does not learn; `mixers` and `loss`: means of them."""
        layers = range(len(self.students))
        names = dict.fromkeys(name for mixers in self.students for name in mixers)
        by_layer = {name: [values.get((name, layer)) for layer in layers] for name in names}
        mixers = {name: _mean([error for error in errors if error is not None]) for name, errors in by_layer.items()}
        loss = _mean(list(values.values()))
        return {"loss": loss, "terms": {"activation": loss}, "mixers": mixers, "layers": by_layer}

    def gradients(self) -> Iterator[list[Tensor]]:
        """Each mixer's by themselves: a spike in one must not slow the others."""
        if self.joins_gradients:
            return ([joined.whole] for joined in self._gradients.values())
        students = dict.fromkeys(mixer for mixers in self.students for mixer in mixers.values())
        return (gradients_of(mixer.parameters()) for mixer in students)

    def forget_gradients(self) -> None:
        if self.joins_gradients:
            torch._foreach_zero_([joined.whole for joined in self._gradients.values()])
        else:
            super().forget_gradients()


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
