"""What a recipe's stages will take, before anything is loaded.

A few layers are rehearsed (`rehearsal`), one of each block at least; the others add what they hold, layer by layer.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from gearshift.formats import HUB_NAME, NativeConfig, hub_folder, open_checkpoint
from gearshift.formats.checkpoint import SPEC_SUFFIXES
from gearshift.formats.spec_file import read_native
from gearshift.model.schema import skeleton
from gearshift.spec import ModelSpec, Placement
from gearshift.spec.model import shortest_pattern
from gearshift.spec.placement import NAME
from gearshift.train import outlook
from gearshift.train.estimate.rehearsal import LayerCosts, Rehearsal, rehearse
from gearshift.train.optim import learning
from gearshift.train.parallel.processes import mesh_sizes
from gearshift.train.recipe import LayerwiseStage, ParallelSettings, Recipe, Stage
from gearshift.train.run import A_FILE
from gearshift.train.sampling import AllocationSampling

PARTS = ("parameters", "gradients", "optimiser", "activations", "logits")
"""What memory goes to."""
MOST_DRAWN = 2000
"""Steps of a stage whose placements are drawn to find the heaviest one."""
STATE = 8
"""Bytes that AdamW keeps for each number that learns: two moments in float32."""


@dataclass(frozen=True)
class StageEstimate:
    """What the fullest moment of a stage takes on each device."""

    type: str
    parts: Mapping[str, int]
    """Of each of `PARTS`, bytes."""
    tokens: int
    """Tokens a step, on all devices."""
    operations: int
    """Floating-point operations a step, on all devices."""
    unknown: tuple[str, ...] = ()
    """Presets that the stage samples and the model does not have: at each step another placement stood in for them."""

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Ranks:
    """How many processes share the work: `copies` of groups that shard the parameters, split over `tensor` of them."""

    shards: int = 1
    copies: int = 1
    tensor: int = 1

    @property
    def data(self) -> int:
        """Into how many slices a batch is cut."""
        return self.shards * self.copies

    @classmethod
    def of(cls, recipe: Recipe, gpus: int) -> "Ranks":
        """How `recipe` lays out `gpus` processes. ValueError if they do not divide."""
        copies, shards, tensor = mesh_sizes(recipe.parallel or ParallelSettings(), gpus)
        return cls(shards, copies, tensor)


def estimate(recipe: Recipe, gpus: int | None = None) -> list[StageEstimate]:
    """The memory of each stage on each device, from configs alone: `recipe.model` may also be a spec file.

    Args:
        recipe: the run.
        gpus: on how many GPUs, whether or not they are here. None: on one device, the recipe's.

    Raises ValueError for what a run would refuse too.
    """
    native, teacher = _configs(recipe)
    cuda = gpus is not None or recipe.device.startswith("cuda")
    cuda = cuda or (recipe.device == "auto" and torch.cuda.is_available())
    ranks = Ranks.of(recipe, gpus or 1)
    if ranks.tensor > 1:
        recipe = recipe.model_copy(update={"compile": False})  # as a run does
    return [_estimate_stage(native, teacher, recipe, index, cuda, ranks) for index in range(len(recipe.stages))]


def run_remarks(recipe: Recipe) -> list[str]:
    """What a run of `recipe` will warn of, from configs alone."""
    native, teacher = _configs(recipe)
    model = skeleton(native.spec)
    scales = learning(model, recipe, other_teacher=teacher is not None)
    absent = [f"{sentence}; a run needs it" for sentence in outlook.missing(recipe)]
    return [*absent, *outlook.remarks(recipe, model, scales, native.presets, teacher)]


def _configs(recipe: Recipe) -> tuple[NativeConfig, ModelSpec | None]:
    """The model's config, and the teacher's spec, None if it is the model itself."""
    native = model_config(recipe.model, "model")
    return native, None if recipe.teacher == "self" else model_config(recipe.teacher, "teacher").spec


def model_config(name: str, key: str) -> NativeConfig:
    """The config of a folder, of a spec file, of a model on the hub or, of a teacher, of a file of weights.

    No weight is read. ValueError if there is none, which says that a recipe's `key` names it.
    """
    path = Path(name)
    if path.is_file():
        if path.suffix in SPEC_SUFFIXES:
            return read_native(path)
        if key == "model":
            raise ValueError(A_FILE.format(name))
        return open_checkpoint(path).native
    if (path / "config.json").is_file():
        return read_native(path / "config.json")
    why = f"{key}: there is no config of {name!r}"
    if HUB_NAME.fullmatch(name):
        try:
            return read_native(hub_folder(name, "config.json") / "config.json")
        except FileNotFoundError as error:
            why = f"{key}: {error}"
    advice = "make the model first" if key == "model" else "name a model's folder"
    raise ValueError(f"{why}: {advice}, or give its sizes as a spec file ({key}=FILE.yaml)")


def shared_out(parts: Mapping[str, int], units: "Units", residual: int, ranks: Ranks) -> dict[str, int]:
    """What one of several GPUs holds, of what a single one with its share of the rows would.

    FSDP keeps a share of every parameter, gradient and moment, and gathers the root unit, the unit that runs and the
    one that is fetched ahead. Tensor parallelism splits what a layer makes in between, but not the residual stream.

    Args:
        parts: of a single GPU, bytes by `PARTS`.
        units: the sizes of what is gathered.
        residual: bytes of the residual stream among the activations.
        ranks: how many processes share the work.
    """
    everyone = ranks.shards * ranks.tensor
    shared = {name: -(-parts.get(name, 0) // everyone) for name in ("parameters", "gradients", "optimiser")}
    if ranks.shards > 1:
        shared["parameters"] += (units.root + 2 * units.largest) // ranks.tensor
        shared["gradients"] += units.largest // ranks.tensor
    residual = min(residual, parts["activations"])
    shared["activations"] = residual + (parts["activations"] - residual) // ranks.tensor
    return {**shared, "logits": parts.get("logits", 0)}


@dataclass(frozen=True)
class Units:
    """The sizes of FSDP's units when gathered, in bytes."""

    root: int
    """The embeddings, the final norm and the head."""
    largest: int
    """The largest mixer, or all of a block beside its mixers."""


def _estimate_stage(
    native: NativeConfig, teacher: ModelSpec | None, recipe: Recipe, index: int, cuda: bool, ranks: Ranks
) -> StageEstimate:
    stage, spec = recipe.stages[index], native.spec
    size, parts = recipe.batch_size_of(index), recipe.parts_of(index)
    if size % (ranks.data * parts):
        raise ValueError(f"{size} sequences a step cannot be split over {ranks.data} groups of GPUs in {parts} parts")
    alone = recipe.model_copy(update={"stages": (stage.model_copy(update={"batch_size": size // ranks.data}),)})
    layers = _rehearsed(spec, recipe, index)
    small = _cut(spec, layers)
    whole = _Whole(spec, teacher, recipe, index, layers)
    if isinstance(stage, LayerwiseStage):
        made = rehearse(small, teacher, alone, cuda)
        found = whole.layerwise(made)
    else:
        every = _drawn(native, recipe, index)
        drawn = [one for one in every if whole.learns(one)] or every  # the others are skipped by the run
        made = rehearse(small, teacher, alone, cuda, lambda costs: whole.sample_of(whole.heaviest(drawn, costs), costs))
        found = whole.stochastic(made, drawn)
    found_parts, operations = found
    if ranks != Ranks():
        rows = size // ranks.data // parts
        states = 2 * spec.decoder.num_layers + 2
        stream = made.residual * rows * recipe.sequence_length * spec.hidden_size * states
        found_parts = shared_out(found_parts, whole.units(), stream, ranks)
    tokens = size * recipe.sequence_length
    return StageEstimate(stage.type, found_parts, tokens, operations * ranks.data, _unknown(native, stage))


def _rehearsed(spec: ModelSpec, recipe: Recipe, index: int) -> list[int]:
    """The layers to rehearse: the first of each block, two at least; all where equal blocks are not alike."""
    stage = recipe.stages[index]
    globs = (*recipe.learning_rate_scales, *recipe.freeze)
    singled_out = any("layers." in glob and "layers.*" not in glob for glob in globs)
    shared = any(block.shared_weights for block in spec.decoder.blocks.values())
    compares = not isinstance(stage, LayerwiseStage) and stage.compares_layers
    if singled_out or shared or compares or recipe.teacher != "self":
        return list(range(spec.decoder.num_layers))
    first = {name: layer for layer, name in reversed(list(enumerate(spec.decoder.layout)))}
    return sorted({*first.values(), *range(min(2, spec.decoder.num_layers))})


def _cut(spec: ModelSpec, layers: Sequence[int]) -> ModelSpec:
    """The model with these layers alone."""
    layout = [spec.decoder.layout[layer] for layer in layers]
    blocks = {name: block for name, block in spec.decoder.blocks.items() if name in layout}
    update = {"num_layers": len(layout), "pattern": tuple(shortest_pattern(layout)), "blocks": blocks}
    return spec.model_copy(update={"decoder": spec.decoder.model_copy(update=update)})


def _drawn(native: NativeConfig, recipe: Recipe, index: int) -> list[Placement]:
    """The placements of the stage's steps, as the run will draw them.

    A preset that the model does not have yet may be any placement: it is drawn anew at each step.
    """
    stage, before = recipe.stages[index], sum(stage.steps for stage in recipe.stages[:index])
    assert not isinstance(stage, LayerwiseStage)
    steps = range(before, before + max(1, min(stage.steps, MOST_DRAWN)))
    choices, unknown, drawn = native.spec.choices, _unknown(native, stage), []
    for step in steps:
        anything = {name: AllocationSampling().sample(choices, {}, recipe.seed, step) for name in unknown}
        drawn.append(stage.sampling.sample(choices, {**native.presets, **anything}, recipe.seed, step))
    return drawn


def _unknown(native: NativeConfig, stage: Stage) -> tuple[str, ...]:
    """The presets that a stage samples by name and the model does not have."""
    known = {*native.presets, *(mixer for offered in native.spec.choices for mixer in offered)}
    named = dict.fromkeys(stage.sampling.named)
    return tuple(name for name in named if NAME.fullmatch(name) and name not in known)


class _Whole:
    """A model of which only some layers were rehearsed."""

    def __init__(self, spec: ModelSpec, teacher: ModelSpec | None, recipe: Recipe, index: int, layers: Sequence[int]):
        self.spec = spec
        self.parts = recipe.parts_of(index)
        self.layers = layers
        self.moments = STATE if recipe.ema is None else STATE + 4
        scales = learning(skeleton(spec), recipe, other_teacher=teacher is not None)
        self.sizes = _sizes(spec)
        self.learning = {name: self.sizes[name] for name in scales}
        self.learners = {_mixer(name) for name in self.learning}
        self.parameters = sum(self.sizes.values()) + (0 if teacher is None else sum(_sizes(teacher).values()))

    def layerwise(self, made: Rehearsal) -> tuple[dict[str, int], int]:
        """A layer's activations are gone before the next one's come; gradients stay."""
        learning = sum(self.learning.values())
        held = {"gradients": learning, "optimiser": learning // 4 * self.moments}
        step = {**made.fullest[-1], "parameters": self.parameters, **held}
        # The calibration comes before both.
        others = [{**moment, "parameters": self.parameters} for moment in made.fullest[:-2]]
        operations = made.operations * self.spec.decoder.num_layers // len(self.layers)
        return max([step, *others], key=lambda parts: sum(parts.values())), operations

    def stochastic(self, made: Rehearsal, drawn: Sequence[Placement]) -> tuple[dict[str, int], int]:
        """Fullest in the loss, when all layers' activations are there, or in some layer's backward pass."""
        step, chosen, heaviest = made.fullest[-1], made.placement, self.heaviest(drawn, made.layers)
        assert chosen is not None
        held = {
            "parameters": self.parameters,
            "optimiser": self._learning(set().union(*map(self.pairs, drawn))) // 4 * self.moments,
        }
        whole = self._learning(set(self.pairs(heaviest))) if self.parts > 1 else 0
        rehearsed, _ = self._in_backward(made.layers, chosen, self.layers)
        activations, gradients = self._in_backward(made.layers, heaviest)
        in_backward = {
            **step,
            **held,
            "gradients": max(gradients, whole),
            "activations": max(step.get("activations", 0) - rehearsed, 0) + activations,
        }
        kept = self.kept(made.layers, heaviest) - self.kept(made.layers, chosen, self.layers)
        at_loss = {
            **made.at_loss,
            **held,
            "gradients": whole,
            "activations": made.at_loss.get("activations", 0) + kept,
        }
        mean = sum(self._operations(made.layers, placement) for placement in drawn) / len(drawn)
        others = mean - self._operations(made.layers, chosen, self.layers)
        operations = made.operations + round(self.parts * others)
        return max(in_backward, at_loss, key=lambda parts: sum(parts.values())), operations

    def places(self, placement: Iterable[str], layers: Sequence[int] | None = None) -> list[tuple[str, str]]:
        """(block, mixer) of each layer."""
        layers = range(self.spec.decoder.num_layers) if layers is None else layers
        return [(self.spec.decoder.layout[layer], name) for layer, name in zip(layers, placement, strict=True)]

    def pairs(self, placement: Iterable[str], layers: Sequence[int] | None = None) -> list[tuple[str, str]]:
        """(key of its weights, mixer) of each of these layers or all."""
        keys = self.spec.decoder.weight_keys
        return list(zip(keys if layers is None else [keys[layer] for layer in layers], placement, strict=True))

    def kept(self, costs: LayerCosts, placement: Placement, layers: Sequence[int] | None = None) -> int:
        """Bytes between the passes, of these layers or all."""
        return sum(costs[place].kept for place in self.places(placement, layers))

    def _in_backward(
        self, costs: LayerCosts, placement: Placement, layers: Sequence[int] | None = None
    ) -> tuple[int, int]:
        """Bytes of activations and of gradients at the fullest moment of the backward pass of these layers or all.

        While a layer's runs, the layers before it wait for theirs, and those behind it have their gradients.
        """
        pairs, moments, kept = self.pairs(placement, layers), [], 0
        for index, place in enumerate(self.places(placement, layers)):
            cost = costs[place]
            moments.append((kept + cost.most, self._learning(set(pairs[index + 1 :]))))
            kept += cost.kept
        return max(moments, key=sum)

    def heaviest(self, drawn: Sequence[Placement], costs: LayerCosts) -> Placement:
        """The placement that keeps most, and of equals the one that takes most."""
        takes = {place: cost.most for place, cost in costs.items()}
        return max(drawn, key=lambda one: (self.kept(costs, one), sum(takes[place] for place in self.places(one))))

    def learns(self, placement: Iterable[str], layers: Sequence[int] | None = None) -> bool:
        """Whether anything that runs under `placement` does, in these layers or all."""
        return None in self.learners or not self.learners.isdisjoint(self.pairs(placement, layers))

    def sample_of(self, placement: Placement, costs: LayerCosts) -> Placement:
        """For each rehearsed layer, the heaviest mixer that its block runs under `placement`; one learns at least."""
        if len(self.layers) == len(placement):
            return placement
        runs: dict[str, set[str]] = {}
        for block, name in self.places(placement):
            runs.setdefault(block, set()).add(name)
        blocks = [self.spec.decoder.layout[layer] for layer in self.layers]
        sample = Placement(max(sorted(runs[block]), key=lambda name: costs[block, name]) for block in blocks)
        others = (sample.replace(place, name) for place, block in enumerate(blocks) for name in sorted(runs[block]))
        return next((one for one in (sample, *others) if self.learns(one, self.layers)), sample)

    def units(self) -> Units:
        """FSDP's units: each mixer, each block's rest, and what stands outside the blocks."""
        sizes: Counter[str] = Counter()
        for name, size in self.sizes.items():
            head, mixers, rest = name.partition(".mixer.mixers.")
            inside = name.startswith("model.layers.")
            unit = f"{head}{mixers}{rest.partition('.')[0]}" if mixers else ".".join(name.split(".")[:3])
            sizes[unit if inside else ""] += size
        root = sizes.pop("", 0)
        return Units(root, max(sizes.values()))

    def _operations(
        self,
        costs: LayerCosts,
        placement: Placement,
        layers: Sequence[int] | None = None,
    ) -> int:
        """Of the student's two passes and the teacher's one, of these layers or all."""
        student = sum(costs[place].both for place in self.places(placement, layers))
        main = [self.spec.main[layer] for layer in layers] if layers is not None else self.spec.main
        return student + sum(costs[place].forward for place in self.places(main, layers))

    def _learning(self, pairs: set[tuple[str, str]]) -> int:
        """Bytes of what learns in these mixers, and outside of all mixers."""
        return sum(size for name, size in self.learning.items() if (mixer := _mixer(name)) is None or mixer in pairs)


def _sizes(spec: ModelSpec) -> dict[str, int]:
    """Name -> bytes of each parameter in float32. A tied head is the embedding table."""
    return {name: 4 * value.numel() for name, value in skeleton(spec).named_parameters()}


def _mixer(name: str) -> tuple[str, str] | None:
    """(key of the layer's weights, mixer) that a parameter belongs to; None for those that every placement uses."""
    head, mixers, rest = name.partition(".mixer.mixers.")
    return (head.removeprefix("model.layers."), rest.partition(".")[0]) if mixers else None
