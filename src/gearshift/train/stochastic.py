"""The stages in which a sampled placement learns end to end: to predict what the teacher predicts, or what is said.

Where a batch marks the tokens that count, the losses on next-token distributions are means over these alone.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gearshift.data import Batch
from gearshift.mixers.base import MixContext
from gearshift.model import GearshiftForCausalLM
from gearshift.spec import Placement, resolve_placement
from gearshift.train.engine import Engine
from gearshift.train.graphs import Graphed, GraphedLayers
from gearshift.train.losses import activation_error, head_losses, next_tokens
from gearshift.train.noise import is_noisy
from gearshift.train.recipe import SampledStage
from gearshift.train.stage import StageRun, Terms, gradients_of

Visit = Callable[[int, Tensor], None]
"""Called with a layer's number and its mixer's output."""


class Taught(NamedTuple):
    """What the student needs of the teacher's forward."""

    final: Tensor
    """[batch, tokens, hidden], the final hidden states."""
    outputs: list[Tensor]
    """Of each layer, its mixer's output. Empty if the activation loss does not ask for them."""


class StochasticRun(StageRun):
    """The stochastic or the sft stage at work."""

    stage: SampledStage

    def __init__(
        self,
        model: GearshiftForCausalLM,
        teacher: GearshiftForCausalLM,
        engine: Engine,
        stage: SampledStage,
        seed: int,
        loss_chunk: int,
    ):
        super().__init__(model, teacher, engine, stage, seed)
        self.loss_chunk = loss_chunk
        self.noisy = is_noisy(model)
        self.layer_graphs = engine.layer_graphs
        stage.sampling.check(self.choices, self.presets)
        if stage.steps and not self._can_learn:
            raise ValueError(
                f"the {stage.type} stage has nothing to do: under none of the placements that it samples does anything"
                " learn; let it sample other mixers than the main ones"
            )
        self._layers: GraphedLayers | None = None
        self._teach: Callable[[Batch], Taught] = self._taught
        if self.graphs:
            self._teach = Graphed(self._taught, self.frozen)

    def learn(self, batch: Batch, step: int, share: float) -> Terms | None:
        placement = self.placement(step)
        if not self._learns(placement):
            return None
        weights = self.stage.losses.model_dump()
        taught = self._teach(batch) if self.stage.needs_teacher else None
        loss, terms = self._judge(batch, placement, weights, taught, self.stage.temperature)
        (loss * share).backward()
        return {"loss": loss.detach(), **terms}

    @property
    def through_depth(self) -> bool:
        return True

    def close(self) -> None:
        self._layers, self._teach = None, self._taught
        super().close()

    @torch.no_grad()
    def measure(self, batch: Batch) -> Terms:
        """The held-out loss of each placement with one mixer wherever it is offered, and of those the stage names.

        Where its mixer is not offered, a placement has the main one. The stage's temperature is for learning alone.
        """
        main, loss = self.model.spec.main, self.stage.held_out_loss
        names = dict.fromkeys(name for offered in self.choices for name in offered)
        placements = {
            name: Placement(name if name in offered else main[layer] for layer, offered in enumerate(self.choices))
            for name in names
        }
        for name in self.stage.held_out_placements:
            placements[name] = resolve_placement(name, self.presets, self.choices)
        taught = None if loss == "cross_entropy" else self._teach(batch)
        judged = {name: self._judge(batch, placement, {loss: 1.0}, taught) for name, placement in placements.items()}
        return {name: terms[loss] for name, (_, terms) in judged.items()}

    def _learns(self, placement: Placement) -> bool:
        """Whether any parameter that runs under `placement` learns."""
        own = any(name in students for name, students in zip(placement, self.students, strict=True))
        return own or self._shared_learn

    @property
    def _can_learn(self) -> bool:
        """Whether any parameter learns that runs under a placement of the stage's sampling."""
        drawn = self.stage.sampling.possible(self.choices, self.presets)
        pairs = zip(drawn, self.students, strict=True)
        return self._shared_learn or any(names & students.keys() for names, students in pairs)

    @cached_property
    def _shared_learn(self) -> bool:
        """Whether any parameter outside the mixers learns: not where the main placement, which it is of, teaches."""
        return any(parameter.requires_grad for parameter in _shared(self.model))

    def _judge(
        self,
        batch: Batch,
        placement: Placement,
        weights: Mapping[str, float],
        taught: Taught | None,
        temperature: float = 1.0,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted loss of `placement` on `batch`, and its terms."""
        body = self.model.model
        activation = weights.get("activation", 0.0)
        recompute = self.stage.recompute and torch.is_grad_enabled()
        errors: list[Tensor] = []

        def compare(layer: int, output: Tensor) -> None:
            if activation > 0 and taught is not None:
                errors.append(activation_error(batch.by_row(output), batch.by_row(taught.outputs[layer])))

        with self.precision():
            hidden = self.precision.embed(self.model, batch.inputs)
            context = body.context(hidden, cu_seqlens=batch.cu_seqlens)
            plain = recompute or activation > 0 or batch.starts is not None
            recorded = None if plain else self._recorded_layers(hidden)
            if recorded is not None:
                hidden = recorded.run(hidden, placement)
            else:
                hidden = self._run_layers(self.model, hidden, context, placement, compare, recompute)
            loss, terms = head_losses(
                _targeted(body.norm(hidden), batch),
                None if taught is None else _targeted(taught.final, batch),
                _targeted(next_tokens(batch.inputs, context.cu_seqlens), batch),
                self.model.lm_head.weight,
                None if taught is None else self.teacher.lm_head.weight,
                weights,
                temperature,
                self.loss_chunk,
                (self.model.spec.logit_softcap, self.teacher.spec.logit_softcap),
                self.steps.compiled,
                ragged=batch.counted is not None,
                followed=len(batch) * (batch.tokens.shape[1] - 1),
            )
        if activation > 0:
            error = torch.stack(errors).mean()
            loss = loss + activation * error
            terms["activation"] = error.detach()
        return loss, terms

    @torch.no_grad()
    def _taught(self, batch: Batch) -> Taught:
        """The teacher's forward over `batch`. What it keeps does not grow with the vocabulary."""
        outputs: list[Tensor] = []

        def keep(layer: int, output: Tensor) -> None:
            if self.stage.compares_layers:
                outputs.append(output)

        with self.precision():
            hidden = self.precision.embed(self.teacher, batch.inputs)
            context = self.teacher.model.context(hidden, cu_seqlens=batch.cu_seqlens)
            hidden = self._run_layers(self.teacher, hidden, context, self.teacher.spec.main, keep)
            return Taught(self.teacher.model.norm(hidden), outputs)

    def _recorded_layers(self, hidden: Tensor) -> GraphedLayers | None:
        """The layers as CUDA graphs, where only mixers learn and no two layers share theirs."""
        keys = self.model.spec.decoder.weight_keys
        if not (self.layer_graphs and self.own_teacher and torch.is_grad_enabled()) or len(set(keys)) < len(keys):
            return None
        if self._shared_learn:
            return None
        if self._layers is None:
            self._layers = GraphedLayers(self.model, self.steps, self.precision, self.frozen, hidden)
        return self._layers if self._layers.fits(hidden) else None

    def _run_layers(
        self,
        model: GearshiftForCausalLM,
        hidden: Tensor,
        context: MixContext,
        placement: Placement,
        visit: Visit,
        recompute: bool = False,
    ) -> Tensor:
        """All layers over `hidden` [batch, tokens, hidden], up to the final norm; `visit` sees each mixer's output.

        With `recompute`, of each layer only its input and its mixer's output are kept for the backward pass.
        """
        for layer, (block, name) in enumerate(zip(model.model.blocks, placement, strict=True)):
            if recompute:
                # What is computed again must drop the same inputs.
                made = checkpoint(
                    self.steps.run,
                    block,
                    name,
                    hidden,
                    context,
                    use_reentrant=False,
                    preserve_rng_state=self.noisy,
                )
            else:
                made = self.steps.run(block, name, hidden, context)
            visit(layer, made[0])
            hidden = made[1]
        return hidden

    def describe(self, values: Mapping[Any, float]) -> dict[str, Any]:
        """`loss`: the weighted sum; `terms`: each loss. Of a measurement: placement -> its loss."""
        if "loss" not in values:
            return {self.stage.held_out_loss: dict(values)}
        return {"loss": values["loss"], "terms": {name: value for name, value in values.items() if name != "loss"}}

    def describe_step(self, step: int) -> dict[str, Any]:
        return {"placement": self.placement(step)}

    def gradients(self) -> Iterator[list[Tensor]]:
        yield gradients_of(self.learning)


def _targeted(values: Tensor, batch: Batch) -> Tensor:
    """Of `values` [batch, tokens, ...], those at positions whose next token counts, [1, positions, ...]; or all."""
    if batch.targeted is None:
        return values
    return values.flatten(0, 1).index_select(0, batch.targeted.to(values.device, non_blocking=True))[None]


def _shared(model: GearshiftForCausalLM) -> Iterator[nn.Parameter]:
    """The parameters outside the mixers, which every placement runs."""
    mixers = {id(p) for block in model.model.blocks for p in block.mixer.parameters()}
    return (parameter for parameter in model.parameters() if id(parameter) not in mixers)
