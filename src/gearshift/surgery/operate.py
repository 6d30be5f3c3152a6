"""Reading a surgery, carrying it out on a spec, and the plan of it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError, model_validator

from gearshift.plan import Cast, Discard, Expression, Plan, Schema, TensorInfo, infer, prevailing_dtype, references
from gearshift.plan.rewrite import simplify
from gearshift.settings import load_settings
from gearshift.spec import ModelSpec, Placement, Spec, StochasticMixerSpec
from gearshift.spec.model import shortest_pattern
from gearshift.surgery.draft import Draft, original
from gearshift.surgery.edits import Add, Change, Drop, Edit, Lay, Replace, Wrap, carried


class Prune(Edit):
    """Keep one mixer a layer, the one a placement names, as a plain mixer."""

    placement: str
    """The placement, in run-length form."""

    def apply(self, draft: Draft) -> Draft:
        return prune_draft(draft, Placement.parse(self.placement))


class Step(Spec):
    """One entry of a surgery: exactly one edit, under its name."""

    wrap: Wrap | None = None
    """Put plain mixers into stochastic ones."""
    add: Add | None = None
    """Add a mixer to stochastic ones."""
    drop: Drop | None = None
    """Take a mixer out of stochastic ones."""
    replace: Replace | None = None
    """Put another mixer in the place of one."""
    change: Change | None = None
    """Change settings that leave the weights alone."""
    layout: Lay | None = None
    """Change the pattern, copy blocks, cut layers."""
    prune: Prune | None = None
    """Keep one mixer a layer."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            known, found = ", ".join(type(self).model_fields), " and ".join(given) or "none"
            raise ValueError(f"each entry of a surgery holds exactly one edit of {known}, not {found}")
        return self

    @property
    def edit(self) -> Edit:
        """The edit."""
        return next(edit for name in type(self).model_fields if (edit := getattr(self, name)) is not None)


class Surgery(Spec):
    """A list of edits, carried out in order."""

    seed: int | None = Field(default=None, ge=0)
    """Settles what new weights are drawn; 0 if no surgery of a conversion names one."""
    edits: tuple[Step, ...] = Field(min_length=1)
    """The edits."""


def load_surgery(path: str | Path) -> Surgery:
    """Read a surgery from a YAML file. ValueError naming the file, the place and what is wrong."""
    return load_settings(Surgery, path)


def describe(error: ValidationError) -> str:
    """A validation error in one line: where, what, and the offending value."""
    problems = []
    for item in error.errors():
        place = ".".join(str(part) for part in item["loc"]) or "the whole"
        what = "unknown key" if item["type"] == "extra_forbidden" else item["msg"].removeprefix("Value error, ")
        problems.append(f"{place}: {what}")
    return "; ".join(problems)


def operate(
    spec: ModelSpec, source: Schema, surgeries: Sequence[Surgery] = (), dtype: str | None = None
) -> tuple[ModelSpec, Plan]:
    """Carry surgeries out on a model with the (native) tensors `source`.

    Returns the new spec, and the plan from `source` to the new model's tensors: in the source's dtype, or in `dtype`.
    ValueError, before anything is read, if an edit does not fit; it names the edit.
    """
    draft = original(spec, source, dtype or prevailing_dtype(source))
    for surgery in surgeries:
        for number, step in enumerate(surgery.edits):
            try:
                draft = step.edit.apply(draft).with_adapters()
            except ValidationError as error:
                raise ValueError(f"edit {number} cannot be carried out: {describe(error)}") from None
            except ValueError as error:
                raise ValueError(f"edit {number} cannot be carried out: {error}") from None
    return draft.spec, _plan(draft, source, dtype)


def prune(spec: ModelSpec, source: Schema, placement: Placement) -> tuple[ModelSpec, Plan]:
    """The model that `placement` makes of a supernet with the tensors `source`: plain mixers only, and its plan."""
    draft = prune_draft(original(spec, source, prevailing_dtype(source)), placement)
    return draft.spec, _plan(draft, source, None)


def prune_draft(draft: Draft, placement: Placement) -> Draft:
    """A draft with one mixer a layer."""
    old = draft.spec.decoder
    placement.validate(draft.spec.choices)
    blocks: dict[str, Any] = {}
    layout = []
    for name, mixer in zip(old.layout, placement, strict=True):
        block = old.blocks[name]
        if not isinstance(block.mixer, StochasticMixerSpec):
            new = name
            blocks[new] = block
        else:
            new = mixer if len(old.blocks) == 1 else f"{name}-{mixer}"
            blocks[new] = block.model_copy(update={"mixer": block.mixer.mixers[mixer]})
        layout.append(new)
    target = draft.with_decoder(
        pattern=shortest_pattern(layout),
        blocks={name: block.model_dump(mode="json") for name, block in blocks.items()},
    )

    def rename(layer: int, rest: str) -> str | None:
        if not rest.startswith("mixer.mixers."):
            return rest
        chosen = f"mixer.mixers.{placement[layer]}."
        return f"mixer.{rest.removeprefix(chosen)}" if rest.startswith(chosen) else None

    return carried(draft, target, rename, "the placement does not use it")


def _plan(draft: Draft, source: Schema, dtype: str | None) -> Plan:
    """The draft as a plan. The target's names and shapes are the model's own; dtypes follow the source, or `dtype`."""
    from gearshift.model import schema

    names = schema(draft.spec, "float32")
    assert names.keys() == draft.tensors.keys(), names.keys() ^ draft.tensors.keys()
    expressions: dict[str, Expression] = {}
    target: dict[str, TensorInfo] = {}
    for name, info in names.items():
        made = simplify(draft.tensors[name], source)
        if dtype and infer(made, source).dtype != dtype:
            made = Cast(made, dtype)
        expressions[name] = made
        target[name] = TensorInfo(info.shape, infer(made, source).dtype)
    used = {tensor for made in expressions.values() for tensor in references(made)}
    discards = tuple(
        Discard(name, draft.reasons[name]) for name in source if name not in used and name in draft.reasons
    )
    return Plan(source, target, expressions, discards)
