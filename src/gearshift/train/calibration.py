"""A start at the right scale: each new mixer's output projection, fitted to the main mixer's output.

A mixer with a normalised output starts at a scale of its own, an order of magnitude off. One pass of the teacher over
a few sequences gives the statistics of a least-squares fit; nothing is differentiated.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gearshift.data import Batch
from gearshift.mixers.base import MixContext, Mixer
from gearshift.model import GearshiftForCausalLM
from gearshift.train.engine import Precision
from gearshift.train.parallel import ALONE, Parallel
from gearshift.train.stage import LayerErrors


class Fit:
    """What the least-squares fit of one output projection needs to know of its inputs and targets, in float64.

    Sequences weigh in by 1 / ||target||^2, so that what is minimised is the stages' own `activation_error`.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        """Of the projection with `weight` [outputs, inputs] and `bias` [outputs]."""
        self.weight = weight.detach().double()
        self.bias = bias
        outputs, inputs = weight.shape
        device = weight.device
        self.gram = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)
        self.cross = torch.zeros(outputs, inputs, dtype=torch.float64, device=device)
        self.power = torch.zeros((), dtype=torch.float64, device=device)
        self.sequences = 0

    def add(self, features: Tensor, target: Tensor) -> None:
        """Count in `features` [batch, tokens, inputs], whose projection should be `target` [batch, tokens, outputs]."""
        features, target = features.float(), target.float()
        weight = target.square().sum((1, 2), keepdim=True).clamp_min(torch.finfo(torch.float).tiny).rsqrt()
        if self.bias is not None:
            target = target - self.bias
        features, target = (features * weight).flatten(0, 1), (target * weight).flatten(0, 1)
        self.gram += features.T @ features
        self.cross += target.T @ features
        self.power += target.square().sum()
        self.sequences += len(weight)

    def add_others(self, parallel: Parallel) -> None:
        """Count in what the other processes have seen."""
        self.gram, self.cross, self.power = map(parallel.total, (self.gram, self.cross, self.power))
        self.sequences *= parallel.data_ranks

    def error(self, weight: Tensor) -> Tensor:
        """The normalised activation error of a projection with `weight` [outputs, inputs], float64."""
        wrong = self._energy(weight) - 2 * self._agreement(weight) + self.power
        return wrong.clamp_min(0) / self.sequences

    def scaled(self) -> Tensor:
        """The projection's weight times the one factor that fits best, [outputs, inputs], float64."""
        energy = self._energy(self.weight)
        return self.weight * torch.where(energy > 0, self._agreement(self.weight) / energy, 1.0)

    def ridge(self, strength: float) -> Tensor:
        """The best weight, drawn towards `scaled` with `strength` times the features' mean square. As `scaled`.

        In one solve of the normal equations for the change. A strength of 1 lets the directions that the features use
        more than on average move, and holds the rest, of which a few sequences say too little.

        ValueError if `strength` is lost in the rounding of the features' products.
        """
        scaled = self.scaled()
        pull = strength * self.gram.diagonal().mean()
        if pull == 0:
            return scaled
        pulled = self.gram + pull * torch.eye(len(self.gram), dtype=torch.float64, device=self.gram.device)
        factor, failed = torch.linalg.cholesky_ex(pulled)
        if failed and pulled.isfinite().all():
            raise ValueError(
                f"a ridge of {strength:g} holds the calibration too weakly: raise it, or calibrate on more sequences"
            )
        change = torch.cholesky_solve((self.cross - scaled @ self.gram).T, factor)
        return scaled + change.T

    def _energy(self, weight: Tensor) -> Tensor:
        return ((weight @ self.gram) * weight).sum()

    def _agreement(self, weight: Tensor) -> Tensor:
        return (weight * self.cross).sum()


@torch.no_grad()
def calibrate(
    teacher: GearshiftForCausalLM,
    model: GearshiftForCausalLM,
    students: Sequence[Mapping[str, Mixer]],
    batches: Sequence[Batch],
    method: str,
    ridge: float,
    precision: Precision,
    parallel: Parallel = ALONE,
) -> dict[str, LayerErrors]:
    """Fit the output projection of every mixer in `students` (one mapping a layer) to the main mixer's output.

    A mixer of a block with shared weights is fitted to all of its layers at once. Frozen projections stay as they are.

    Args:
        teacher: whose main placement gives hidden states and targets. May be the model itself.
        model: holds the mixers.
        students: for every layer, the mixers to fit, by name.
        batches: the text.
        method: `scale` (one factor) or `ridge` (the whole projection).
        ridge: see `Fit.ridge`.
        precision: of the forward passes.
        parallel: the processes that share the text, a slice each.

    Returns the normalised activation error of each mixer, layer by layer: {"before", "scaled", "after"}.
    """
    main = teacher.spec.main
    own = teacher is model
    hiddens = [precision.embed(teacher, batch.inputs) for batch in batches]
    contexts = _contexts(teacher, hiddens, batches)
    student_contexts = contexts if own else _contexts(model, hiddens, batches)
    last_use = {mixer: layer for layer, mixers in enumerate(students) for mixer in mixers.values()}
    fits: dict[Mixer, Fit] = {}
    errors: dict[Mixer, dict[str, float]] = {}
    for layer, (block, student_block) in enumerate(zip(teacher.model.blocks, model.model.blocks, strict=True)):
        mixers = [mixer for mixer in students[layer].values() if _parameter(mixer, "weight").requires_grad]
        for index, (hidden, context, seen) in enumerate(zip(hiddens, contexts, student_contexts, strict=True)):
            with precision():
                normed = block.mixer_norm(hidden)
                target = block.mixer_named(main[layer])(normed, context)
                read = normed if own else student_block.mixer_norm(hidden)
                hiddens[index] = block.feed(block.add_mixed(hidden, target))
            for mixer in mixers:
                with precision():
                    features = parallel.channels(_features(mixer, read, seen))
                if mixer not in fits:
                    weight, bias = _parameter(mixer, "weight"), _parameter(mixer, "bias")
                    fits[mixer] = Fit(parallel.whole(weight), None if bias is None else parallel.whole(bias))
                fits[mixer].add(batches[index].by_row(features), batches[index].by_row(target))
        for mixer in mixers:
            if last_use[mixer] == layer:
                errors[mixer] = _apply(fits.pop(mixer), _parameter(mixer, "weight"), method, ridge, parallel)
    names = dict.fromkeys(name for mixers in students for name in mixers)

    def by_layer(name: str, when: str) -> list[float | None]:
        return [errors[mixers[name]][when] if mixers.get(name) in errors else None for mixers in students]

    return {when: {name: by_layer(name, when) for name in names} for when in ("before", "scaled", "after")}


def _contexts(model: GearshiftForCausalLM, hiddens: Sequence[Tensor], batches: Sequence[Batch]) -> list[MixContext]:
    pairs = zip(hiddens, batches, strict=True)
    return [model.model.context(hidden, cu_seqlens=batch.cu_seqlens) for hidden, batch in pairs]


def _parameter(mixer: Mixer, name: str) -> Any:
    """The weight or the bias of a mixer's output projection as the optimiser has it, perhaps a shard; None without."""
    layer: nn.Module = getattr(mixer.o_proj, "base_layer", mixer.o_proj)  # beside an adapter, PEFT's layer holds it
    return layer._parameters[name]


def _features(mixer: Mixer, hidden: Tensor, context: MixContext) -> Tensor:
    """What the output projection of a mixer reads in a forward, [batch, tokens, features]."""
    read: list[Tensor] = []
    with mixer.o_proj.register_forward_pre_hook(lambda _, given: read.append(given[0])):
        mixer(hidden, context)
    return read[0]


def _apply(fit: Fit, weight: nn.Parameter, method: str, ridge: float, parallel: Parallel) -> dict[str, float]:
    """Give a projection its fitted weight. Returns the error as it was, with the best factor, and as it is now.

    LinAlgError, and the weight as it was, if one of them is not finite.
    """
    fit.add_others(parallel)
    scaled = fit.scaled()
    chosen = fit.ridge(ridge) if method == "ridge" else scaled
    errors = torch.stack([fit.error(candidate) for candidate in (fit.weight, scaled, chosen)]).tolist()
    if not all(map(math.isfinite, errors)):
        raise torch.linalg.LinAlgError("features, targets or weights are not finite")
    parallel.assign(weight, chosen)
    return dict(zip(("before", "scaled", "after"), errors, strict=True))
