"""The stochastic stage: a sampled placement learns, end to end, to predict what the teacher predicts."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gearshift.data import Batch
from gearshift.mixers.base import MixContext
from gearshift.model import GearshiftForCausalLM
from gearshift.model.block import Block
from gearshift.spec import Placement
from gearshift.train.losses import activation_error, head_losses, next_tokens
from gearshift.train.noise import is_noisy
from gearshift.train.recipe import StochasticStage
from gearshift.train.stage import Precision, StageRun, Terms

Visit = Callable[[int, Tensor, Tensor], None]
"""Called with a layer's number, its hidden states and its mixer's output."""


class Taught(NamedTuple):
    """What the student needs of the teacher's forward."""

    final: Tensor
    """[batch, tokens, hidden], the final hidden states."""
    start: Tensor
    """[batch, tokens, hidden], what the first layer to differ from the teacher reads; before the norm if none does."""
    outputs: dict[int, Tensor]
    """Layer -> its mixer's output, of the layers from there on. Empty if the activation loss does not ask for them."""


class StochasticRun(StageRun):
    """The stochastic stage at work."""

    def __init__(
        self,
        model: GearshiftForCausalLM,
        teacher: GearshiftForCausalLM,
        precision: Precision,
        stage: StochasticStage,
        seed: int,
        loss_chunk: int,
    ):
        super().__init__(model, teacher, precision)
        self.stage = stage
        self.seed = seed
        self.loss_chunk = loss_chunk
        self.choices = model.spec.choices
        self.presets = model.presets
        self.noisy = is_noisy(model)
        stage.sampling.check(self.choices, self.presets)

    def placement(self, step: int) -> Placement:
        """The placement of step `step`, counted over all stages."""
        return self.stage.sampling.sample(self.choices, self.presets, self.seed, step)

    def learn(self, batch: Batch, step: int, share: float) -> Terms | None:
        placement = self.placement(step)
        if not self._learns(placement):
            return None
        loss, terms = self._judge(batch, placement, self.stage.losses.model_dump())
        (loss * share).backward()
        return {"loss": loss.detach(), **terms}

    @torch.no_grad()
    def measure(self, batch: Batch) -> Terms:
        """Forward KL of each placement that has one mixer wherever it is offered, and the main one elsewhere."""
        names = dict.fromkeys(name for offered in self.choices for name in offered)
        main = self.model.spec.main
        divergences: Terms = {}
        for name in names:
            pure = Placement(name if name in offered else main[layer] for layer, offered in enumerate(self.choices))
            divergences[name] = self._judge(batch, pure, {"forward_kl": 1.0})[1]["forward_kl"]
        return divergences

    def _learns(self, placement: Placement) -> bool:
        """Whether any parameter that runs under `placement` learns."""
        mixers = (block.mixer_named(name) for block, name in zip(self.model.model.blocks, placement, strict=True))
        own = any(parameter.requires_grad for mixer in mixers for parameter in mixer.parameters())
        # With a teacher of its own, nothing outside the mixers learns: it belongs to the main placement.
        return own or (not self.own_teacher and any(parameter.requires_grad for parameter in _shared(self.model)))

    def _judge(
        self, batch: Batch, placement: Placement, weights: Mapping[str, float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted loss of `placement` on `batch`, and its terms."""
        body = self.model.model
        first = self._first_difference(placement)
        activation = weights.get("activation", 0.0)
        recompute = self.stage.recompute and torch.is_grad_enabled()
        taught, context = self._teach(batch, first, activation > 0)
        errors: list[Tensor] = []

        def compare(layer: int, hidden: Tensor, output: Tensor) -> None:
            if taught.outputs:
                # A pop, so that each target is freed once it has been read.
                errors.append(activation_error(batch.by_row(output), batch.by_row(taught.outputs.pop(layer))))

        with self.precision():
            if self.own_teacher:
                hidden = taught.start
            else:
                hidden = body.embed(batch.inputs)
                context = body.context(hidden, cu_seqlens=batch.cu_seqlens)
            final = body.norm(run_layers(self.model, hidden, context, placement, first, compare, recompute, self.noisy))
            loss, terms = head_losses(
                final,
                taught.final,
                next_tokens(batch.inputs, context.cu_seqlens),
                self.model.lm_head.weight,
                self.teacher.lm_head.weight,
                weights,
                self.stage.temperature,
                self.loss_chunk,
                (self.model.spec.logit_softcap, self.teacher.spec.logit_softcap),
            )
        if activation > 0:
            error = torch.stack(errors).sum() / len(placement) if errors else loss.new_zeros(())
            loss = loss + activation * error
            terms["activation"] = error.detach()
        return loss, terms

    def _first_difference(self, placement: Placement) -> int:
        """The first layer that does not do what the teacher does. Up to there the teacher's hidden states serve."""
        if not self.own_teacher:
            return 0
        pairs = enumerate(zip(placement, self.model.spec.main, strict=True))
        return next((layer for layer, (name, main) in pairs if name != main), len(placement))

    @torch.no_grad()
    def _teach(self, batch: Batch, first: int, keep_outputs: bool) -> tuple[Taught, MixContext]:
        """The teacher's forward over `batch`. What it keeps does not grow with the vocabulary."""
        start: list[Tensor] = []
        outputs: dict[int, Tensor] = {}

        def keep(layer: int, hidden: Tensor, output: Tensor) -> None:
            if layer == first:
                start.append(hidden)
            if keep_outputs and layer >= first:
                outputs[layer] = output

        with self.precision():
            hidden = self.teacher.model.embed(batch.inputs)
            context = self.teacher.model.context(hidden, cu_seqlens=batch.cu_seqlens)
            hidden = run_layers(self.teacher, hidden, context, self.teacher.spec.main, 0, keep)
            final = self.teacher.model.norm(hidden)
        return Taught(final, start[0] if start else hidden, outputs), context

    def describe(self, values: Mapping[Any, float]) -> dict[str, Any]:
        """`loss`: the weighted sum; `terms`: each loss. Of a measurement: mixer -> forward KL of its pure placement."""
        if "loss" not in values:
            return {"forward_kl": dict(values)}
        return {"loss": values["loss"], "terms": {name: value for name, value in values.items() if name != "loss"}}

    def describe_step(self, step: int) -> dict[str, Any]:
        return {"placement": self.placement(step)}

    def clip_groups(self) -> Iterator[list[nn.Parameter]]:
        return iter([list(self.model.parameters())])


def run_layers(
    model: GearshiftForCausalLM,
    hidden: Tensor,
    context: MixContext,
    placement: Placement,
    first: int,
    visit: Visit,
    recompute: bool = False,
    noisy: bool = False,
) -> Tensor:
    """Layers `first` and on over `hidden` [batch, tokens, hidden], up to the final norm; `visit` sees each layer.

    With `recompute`, of each layer only its input and its mixer's output are kept for the backward pass. `noisy` says
    that layers drop inputs at random: what is computed again must then drop the same ones.
    """

    def run_layer(block: Block, name: str, hidden: Tensor) -> tuple[Tensor, Tensor]:
        output = block.mixer_named(name)(block.mixer_norm(hidden), context)
        return output, block.feed(block.add_mixed(hidden, output))

    for layer, (block, name) in enumerate(zip(model.model.blocks, placement, strict=True)):
        if layer >= first:
            if recompute:
                made = checkpoint(run_layer, block, name, hidden, use_reentrant=False, preserve_rng_state=noisy)
            else:
                made = run_layer(block, name, hidden)
            visit(layer, hidden, made[0])
            hidden = made[1]
    return hidden


def _shared(model: GearshiftForCausalLM) -> Iterator[nn.Parameter]:
    """The parameters outside the mixers, which every placement runs."""
    mixers = {id(p) for block in model.model.blocks for p in block.mixer.parameters()}
    return (parameter for parameter in model.parameters() if id(parameter) not in mixers)
