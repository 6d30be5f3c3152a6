"""Tensor names, theirs and ours, as templates: written once, read as a plan in either direction."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import combinations
from typing import Any, Protocol

from gearshift.formats.leaves import value_at
from gearshift.plan import (
    Concatenate,
    Discard,
    Expression,
    Permute,
    Plan,
    Reference,
    Reshape,
    Schema,
    Slice,
    Stack,
    TensorInfo,
    infer,
)
from gearshift.spec import BlockSpec, ModelSpec

KEY = "{layer}"
EXPERT = "{expert}"

HEAD = "{head}"
NEXT_HEAD = "{head+1}"

Placed = tuple[Schema, Mapping[str, Expression]]
"""Tensors of theirs, and ours as expressions over them."""


@dataclass(frozen=True)
class Place:
    """Where tensors lie: in a layer, in a prediction head, or (without a block) outside of both."""

    key: str | None = None
    """What stands for the place in a template."""
    values: Mapping[str, str] = field(default_factory=dict)
    """What is put for each placeholder."""
    block: BlockSpec | None = None
    kind: str | None = None
    """The block's kind, where the family has several."""

    def fill(self, template: str) -> str:
        """The template with its placeholders filled in, but for those of experts."""
        for placeholder, value in self.values.items():
            template = template.replace(placeholder, value)
        return template

    def is_for(self, template: "Template") -> bool:
        """Whether the template speaks of this place."""
        first = template.names[0]
        key = next((key for key in (KEY, HEAD) if key in first), None)
        return key == self.key and (self.kind is None or not template.kinds or self.kind in template.kinds)


class Layout(Protocol):
    """How a family lays out a tensor's elements: a bijection."""

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of their tensor, where ours is `shape`."""
        ...

    def read(self, theirs: Expression, shape: tuple[int, ...], block: BlockSpec) -> Expression:
        """Our tensor of `shape` from theirs."""
        ...


@dataclass(frozen=True)
class RotaryPairs:
    """Rows of each head with the two channels of a rotary pair side by side, where ours are half a head apart."""

    heads: str
    """The leaf of the block that says how many heads there are."""

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape

    def read(self, theirs: Expression, shape: tuple[int, ...], block: BlockSpec) -> Expression:
        heads = value_at(block, self.heads)
        pairs = Reshape(theirs, (heads, shape[0] // heads // 2, 2, *shape[1:]))
        halves = Permute(pairs, (0, 2, 1, *range(3, len(pairs.shape))))
        return Reshape(halves, shape)


@dataclass(frozen=True)
class Shaped:
    """The same elements in the same order under another shape: -1 stands for what is left."""

    theirs: tuple[int, ...]

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        known = math.prod(size for size in self.theirs if size != -1)
        return tuple(math.prod(shape) // known if size == -1 else size for size in self.theirs)

    def read(self, theirs: Expression, shape: tuple[int, ...], block: BlockSpec) -> Expression:
        return Reshape(theirs, shape)


class Template(Protocol):
    """Some of our tensors and those of theirs that hold them; `{layer}` in a name stands for the layer's number,
    `{head}` and `{head+1}` for a prediction head's, from 0 and from 1."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of block that it is for; empty for all."""
        ...

    @property
    def names(self) -> tuple[str, ...]:
        """The names of ours."""
        ...

    def place(self, ours: Mapping[str, TensorInfo], place: Place) -> Placed:
        """Of the tensors `ours`, all of `names`: theirs, and ours as expressions over them."""
        ...


@dataclass(frozen=True)
class Weight:
    """One tensor under our name and under theirs."""

    ours: str
    theirs: str
    layout: Layout | None = None
    kinds: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return (self.ours,)

    def place(self, ours: Mapping[str, TensorInfo], place: Place) -> Placed:
        ((name, info),) = ours.items()
        theirs = place.fill(self.theirs)
        if self.layout is None:
            return {theirs: info}, {name: Reference(theirs)}
        assert place.block is not None, f"{self.ours}: only a block's tensor can have a layout"
        source = TensorInfo(self.layout.shape(info.shape), info.dtype)
        return {theirs: source}, {name: self.layout.read(Reference(theirs), info.shape, place.block)}


@dataclass(frozen=True)
class Fused:
    """Several tensors of ours, one after another along `dim` in one of theirs."""

    ours: tuple[str, ...]
    theirs: str
    dim: int = 0
    kinds: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return self.ours

    def place(self, ours: Mapping[str, TensorInfo], place: Place) -> Placed:
        theirs = place.fill(self.theirs)
        start, made = 0, {}
        for name, info in ours.items():
            stop = start + info.shape[self.dim]
            made[name] = Slice(Reference(theirs), self.dim, start, stop)
            start = stop
        first = next(iter(ours.values()))
        shape = (*first.shape[: self.dim], start, *first.shape[self.dim + 1 :])
        return {theirs: TensorInfo(shape, first.dtype)}, made


@dataclass(frozen=True)
class EvenlySplit:
    """Several tensors of ours, one after another along dimension 0, cut into as many of theirs as `torch.chunk` cuts.

    Transformers cuts what it has fused in memory like this when it saves, whatever the sizes were when it read them.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    kinds: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return self.ours

    def place(self, ours: Mapping[str, TensorInfo], place: Place) -> Placed:
        first = next(iter(ours.values()))
        rows = sum(info.shape[0] for info in ours.values())
        size = -(-rows // len(self.theirs))
        sizes = [min(size, rows - start) for start in range(0, rows, size)]
        if len(sizes) < len(self.theirs):
            return {}, {}
        source = {
            place.fill(theirs): TensorInfo((size, *first.shape[1:]), first.dtype)
            for theirs, size in zip(self.theirs, sizes, strict=True)
        }
        whole = Concatenate(tuple(Reference(theirs) for theirs in source), 0)
        start, made = 0, {}
        for name, info in ours.items():
            made[name] = Slice(whole, 0, start, start + info.shape[0])
            start += info.shape[0]
        return source, made


@dataclass(frozen=True)
class Experts:
    """One tensor of ours, [experts, ...]: of each expert some of theirs (`{expert}`), one after another."""

    ours: str
    theirs: tuple[str, ...]
    kinds: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return (self.ours,)

    def place(self, ours: Mapping[str, TensorInfo], place: Place) -> Placed:
        ((name, info),) = ours.items()
        experts, rows, *rest = info.shape
        part = TensorInfo((rows // len(self.theirs), *rest), info.dtype)
        source: dict[str, TensorInfo] = {}
        stacked: list[Expression] = []
        for expert in range(experts):
            names = [place.fill(theirs).replace(EXPERT, str(expert)) for theirs in self.theirs]
            source |= dict.fromkeys(names, part)
            parts = tuple(Reference(theirs) for theirs in names)
            stacked.append(parts[0] if len(parts) == 1 else Concatenate(parts, 0))
        return source, {name: Stack(tuple(stacked), 0)}


@dataclass(frozen=True)
class Junk:
    """Tensors that some checkpoints hold beside the weights, and why the model does without them."""

    pattern: str
    """A regular expression for the whole name."""
    reason: str


@dataclass(frozen=True)
class Tensors:
    """Every tensor of a family. Raises ValueError where a name stands for two tensors."""

    weights: tuple[Template, ...]
    junk: tuple[Junk, ...] = ()
    others: tuple[Template, ...] = ()
    """Other layouts of some tensors: read where a checkpoint has all that they ask for, never written."""
    embedding: str = "model.embed_tokens.weight"
    """Our name of what a tied head repeats."""
    head: str = "lm_head.weight"
    """Our name of the head."""

    def __post_init__(self) -> None:
        for one, other in combinations(self.weights, 2):
            if one.kinds and other.kinds and not set(one.kinds) & set(other.kinds):
                continue
            # What one template has several of together, a later one may have alone, for models without the rest.
            ours = set() if set(other.names) < set(one.names) else set(one.names) & set(other.names)
            for twice in ours | (set(_theirs(one)) & set(_theirs(other))):
                raise ValueError(f"two tensor templates have the name {twice!r}")

    def their_name(self, ours: str) -> str | None:
        """Their name of one of our tensors outside the layers, None if they have none."""
        return next(
            (weight.theirs for weight in self.weights if isinstance(weight, Weight) and weight.ours == ours), None
        )

    def places(self, spec: ModelSpec, kinds: Mapping[str, str]) -> Iterator[Place]:
        """Where tensors lie in a model."""
        yield Place()
        for layer, name in dict(zip(spec.decoder.weight_keys, spec.decoder.layout, strict=True)).items():
            yield Place(KEY, {KEY: layer}, spec.decoder.blocks[name], kinds[name])
        for number, head in enumerate(spec.prediction_heads):
            yield Place(HEAD, {HEAD: str(number), NEXT_HEAD: str(number + 1)}, head.block)

    def plan(self, spec: ModelSpec, target: Schema, kinds: Mapping[str, str]) -> Plan:
        """The bijection from their tensors to our `target`, which is `spec`'s. ValueError for a tensor they lack.

        `kinds` is the kind of each block, by the block's name.
        """
        return self._plan(spec, target, kinds, None)

    def _plan(self, spec: ModelSpec, target: Schema, kinds: Mapping[str, str], given: Schema | None) -> Plan:
        """As `plan`; with the `given` tensors of a checkpoint, its layout of those that have several."""
        source: dict[str, TensorInfo] = {}
        made: dict[str, Expression] = {}
        templates = self.weights if given is None else (*self.others, *self.weights)
        for place in self.places(spec, kinds):
            for template in templates:
                names = [place.fill(ours) for ours in template.names]
                if place.is_for(template) and all(ours in target and ours not in made for ours in names):
                    theirs, expressions = template.place({ours: target[ours] for ours in names}, place)
                    if template in self.others and given is not None and not _holds(given, theirs):
                        continue
                    source |= theirs
                    made |= expressions
        if missing := [name for name in target if name not in made]:
            raise ValueError(f"the format has no tensor for {missing[0]!r}: a template for it is missing")
        return Plan(source, target, {name: made[name] for name in target})

    def import_plan(self, spec: ModelSpec, target: Schema, source: Schema, kinds: Mapping[str, str]) -> Plan:
        """The plan from a checkpoint that holds `source` to our `target`, every tensor keeping its dtype.

        Raises ValueError for a missing, a misshapen or an extra tensor.
        """
        plan = self._plan(spec, target, kinds, source)
        expressions = dict(plan.expressions)
        wanted = dict(plan.source)
        embedding, head = self.their_name(self.embedding), self.their_name(self.head)
        if spec.tie_embeddings and head is not None and embedding not in source and head in source:
            # A tied checkpoint may have kept the shared tensor under the head's name alone.
            wanted = {head if name == embedding else name: info for name, info in wanted.items()}
            expressions[self.embedding] = Reference(head)
        check_present(wanted, source)
        discards = tuple(self._discards(spec, wanted, source))
        kept = {name: infer(expressions[name], source) for name in target}
        return Plan(source, kept, expressions, discards)

    def tied_copy(self, spec: ModelSpec, source: Schema) -> tuple[str, str] | None:
        """Their names of the embeddings and of the head, where a tied checkpoint holds both."""
        embedding, head = self.their_name(self.embedding), self.their_name(self.head)
        if spec.tie_embeddings and embedding in source and head in source:
            return str(embedding), str(head)
        return None

    def _discards(self, spec: ModelSpec, wanted: Mapping[str, Any], source: Schema) -> Iterable[Discard]:
        head = self.their_name(self.head)
        for name in source:
            if name in wanted:
                continue
            reasons = [junk.reason for junk in self.junk if re.fullmatch(junk.pattern, name)]
            if spec.tie_embeddings and name == head:
                reasons = ["the head is tied to the embeddings, and this is a copy of them"]
            if not reasons:
                raise ValueError(
                    f"the checkpoint holds a tensor {name!r} that its config has no place for{_nearest(name, wanted)}"
                )
            yield Discard(name, reasons[0])


def _theirs(template: Template) -> tuple[str, ...]:
    theirs = getattr(template, "theirs", ())
    return (theirs,) if isinstance(theirs, str) else tuple(theirs)


def _holds(source: Schema, wanted: Schema) -> bool:
    """Whether `source` has all tensors of `wanted`, in their shapes."""
    return all(name in source and source[name].shape == info.shape for name, info in wanted.items())


def check_present(wanted: Schema, source: Schema) -> None:
    """ValueError if `source` lacks a tensor of `wanted`, or has it in another shape."""
    for name, info in wanted.items():
        if name not in source:
            raise ValueError(
                f"the checkpoint lacks the tensor {name!r}, which its config asks for{_nearest(name, source)}"
            )
        if source[name].shape != info.shape:
            raise ValueError(
                f"the tensor {name!r} has the shape {list(source[name].shape)}, but the config asks for "
                f"{list(info.shape)}: config and weights are not of the same model"
            )


def _nearest(name: str, others: Iterable[str]) -> str:
    near = get_close_matches(name, others, n=1)
    return f" (the nearest name is {near[0]!r})" if near else ""
