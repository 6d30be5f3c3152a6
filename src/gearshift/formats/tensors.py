"""Tensor names, theirs and ours, as templates: written once, read as a plan in either direction."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from typing import Any, Protocol

from gearshift.formats.leaves import value_at
from gearshift.plan import Discard, Expression, Permute, Plan, Reference, Reshape, Schema, TensorInfo, references
from gearshift.spec import BlockSpec, ModelSpec

KEY = "{layer}"


class Layout(Protocol):
    """How a family lays out a tensor's elements: a bijection that keeps the shape."""

    def read(self, theirs: Expression, shape: tuple[int, ...], block: BlockSpec) -> Expression:
        """Our tensor of `shape` from theirs."""
        ...


@dataclass(frozen=True)
class RotaryPairs:
    """Rows of each head with the two channels of a rotary pair side by side, where ours are half a head apart."""

    heads: str
    """The leaf of the block that says how many heads there are."""

    def read(self, theirs: Expression, shape: tuple[int, ...], block: BlockSpec) -> Expression:
        heads = value_at(block, self.heads)
        pairs = Reshape(theirs, (heads, shape[0] // heads // 2, 2, *shape[1:]))
        halves = Permute(pairs, (0, 2, 1, *range(3, len(pairs.shape))))
        return Reshape(halves, shape)


@dataclass(frozen=True)
class Weight:
    """One tensor under our name and under theirs; `{layer}` stands for the layer's number."""

    ours: str
    theirs: str
    layout: Layout | None = None

    def read(self, theirs: str, shape: tuple[int, ...], block: BlockSpec | None) -> Expression:
        """Our tensor as an expression over theirs."""
        if self.layout is None:
            return Reference(theirs)
        assert block is not None, f"{self.ours}: only a layer's tensor can have a layout"
        return self.layout.read(Reference(theirs), shape, block)


@dataclass(frozen=True)
class Junk:
    """Tensors that some checkpoints hold beside the weights, and why the model does without them."""

    pattern: str
    """A regular expression for the whole name."""
    reason: str


@dataclass(frozen=True)
class Tensors:
    """Every tensor of a family. Raises ValueError where a name stands for two tensors."""

    weights: tuple[Weight, ...]
    junk: tuple[Junk, ...] = ()
    embedding: str = "model.embed_tokens.weight"
    """Our name of what a tied head repeats."""
    head: str = "lm_head.weight"
    """Our name of the head."""

    def __post_init__(self) -> None:
        for side in ("ours", "theirs"):
            names = [getattr(weight, side) for weight in self.weights]
            if twice := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"two tensor templates have the name {twice[0]!r}")

    @cached_property
    def _patterns(self) -> list[tuple[re.Pattern[str], Weight]]:
        def pattern(template: str) -> str:
            return re.escape(template).replace(re.escape(KEY), "([^.]+)")

        return [(re.compile(pattern(weight.ours)), weight) for weight in self.weights]

    def their_name(self, ours: str) -> str | None:
        """Their name of one of our tensors outside the layers, None if they have none."""
        return next((weight.theirs for weight in self.weights if weight.ours == ours), None)

    def plan(self, spec: ModelSpec, target: Schema) -> Plan:
        """The bijection from their tensors to our `target`, which is `spec`'s. ValueError for a tensor they lack."""
        blocks = dict(zip(spec.decoder.weight_keys, spec.decoder.layers, strict=True))
        source: dict[str, TensorInfo] = {}
        expressions: dict[str, Expression] = {}
        for name, info in target.items():
            weight, key = self._find(name)
            theirs = weight.theirs if key is None else weight.theirs.replace(KEY, key)
            source[theirs] = info
            expressions[name] = weight.read(theirs, info.shape, None if key is None else blocks[key])
        return Plan(source, target, expressions)

    def _find(self, name: str) -> tuple[Weight, str | None]:
        for pattern, weight in self._patterns:
            if match := pattern.fullmatch(name):
                return weight, match[1] if pattern.groups else None
        raise ValueError(f"the format has no tensor for {name!r}: a template for it is missing")

    def import_plan(self, spec: ModelSpec, target: Schema, source: Schema) -> Plan:
        """The plan from a checkpoint that holds `source` to our `target`, every tensor keeping its dtype.

        Raises ValueError for a missing, a misshapen or an extra tensor.
        """
        plan = self.plan(spec, target)
        expressions = dict(plan.expressions)
        wanted = dict(plan.source)
        embedding, head = self.their_name(self.embedding), self.their_name(self.head)
        if spec.tie_embeddings and head is not None and embedding not in source and head in source:
            # A tied checkpoint may have kept the shared tensor under the head's name alone.
            wanted = {head if name == embedding else name: info for name, info in wanted.items()}
            expressions[self.embedding] = Reference(head)
        check_present(wanted, source)
        discards = tuple(self._discards(spec, wanted, source))
        kept = {
            name: TensorInfo(info.shape, source[next(references(expressions[name]))].dtype)
            for name, info in target.items()
        }
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
