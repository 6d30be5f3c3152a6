"""A plan: for every target tensor an expression over source tensors, checked before a byte is read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from gearshift.plan.expressions import Expression, Reference, Schema, infer, lookup
from gearshift.plan.inverse import inverse_expressions
from gearshift.plan.regions import Box, coalesce, describe_box, intersect, reads, subtract, whole
from gearshift.plan.rewrite import bind, simplify, substitute

_NAMED_IN_ERRORS = 5


@dataclass(frozen=True, slots=True)
class Discard:
    """Elements of a source tensor that the target does without, and why: `box`, or all of them where it is None."""

    name: str
    reason: str
    box: Box | None = None


@dataclass(frozen=True)
class Plan:
    """How every tensor of `target` is made from the tensors of `source`.

    Building one checks it: the expressions are for exactly the target's tensors, each yields the shape and dtype that
    the target states, and each element of each source tensor is either used or discarded with a reason, never both.
    Raises ValueError, naming the tensors concerned, where one of these does not hold.
    """

    source: Schema
    target: Schema
    expressions: Mapping[str, Expression]
    discards: tuple[Discard, ...] = ()

    def __post_init__(self) -> None:
        # Copies, so that no caller's later change to a dictionary can undo the checks.
        for field in ("source", "target", "expressions"):
            object.__setattr__(self, field, dict(getattr(self, field)))
        object.__setattr__(self, "discards", tuple(self.discards))
        _check_names(self.expressions, self.target)
        _check_yields(self.expressions, self.source, self.target)
        _check_coverage(self)

    def compose(self, then: Plan) -> Plan:
        """The plan that does what this one and `then` do one after the other, without the tensors in between.

        What `then` discards is traced back to the source, and stays discarded where nothing else uses it. Raises
        ValueError where this plan's target is not the source of `then`.
        """
        if problem := difference(self.target, then.source):
            raise ValueError(
                f"the plans do not compose; of the first one's target and the second one's source {problem}"
            )
        definitions = {name: bind(expression, name) for name, expression in self.expressions.items()}
        expressions = {
            name: simplify(substitute(bind(expression, name), definitions), self.source)
            for name, expression in then.expressions.items()
        }
        used = _used(expressions, self.source, then.target)
        discards = list(self.discards)
        for discard in then.discards:
            box = discard.box or whole(self.target[discard.name].shape)
            traced: dict[str, list[Box]] = defaultdict(list)
            for name, region in reads(definitions[discard.name], box, self.source):
                traced[name] += subtract(region, used[name])
            for name, regions in traced.items():
                used[name].update(regions)
                everything = whole(self.source[name].shape)
                discards += [
                    Discard(name, discard.reason, None if region == everything else region)
                    for region in coalesce(regions)
                ]
        return Plan(self.source, then.target, expressions, tuple(discards))

    def invert(self) -> Plan:
        """The plan from target to source that undoes this one, bit for bit.

        Only a plan that loses, repeats and adds nothing has one: references, reshapes, permutations, concatenations,
        stacks, slices that partition what they cut, and casts to a wider dtype. Raises ValueError otherwise, with the
        target and the reason.
        """
        if self.discards:
            discard = self.discards[0]
            raise ValueError(
                f"the plan cannot be inverted: it discards {discard.name!r} ({discard.reason}), which no target holds"
            )
        return Plan(self.target, self.source, inverse_expressions(self.source, self.target, self.expressions))


def difference(left: Schema, right: Schema) -> str | None:
    """The first thing in which two schemas differ, for the end of a sentence; None where they agree."""
    if missing := [name for name in left if name not in right]:
        return f"the latter lacks {_listed(missing)}"
    if extra := [name for name in right if name not in left]:
        return f"the former lacks {_listed(extra)}"
    for name, info in left.items():
        if right[name] != info:
            return f"the former has {name!r} as {info}, the latter as {right[name]}"
    return None


def _check_names(expressions: Mapping[str, Expression], target: Schema) -> None:
    if missing := [name for name in target if name not in expressions]:
        raise ValueError(f"the plan has no expression for {_listed(missing)}, which the target holds")
    if extra := [name for name in expressions if name not in target]:
        raise ValueError(f"the plan has an expression for {_listed(extra)}, which the target does not hold")


def _check_yields(expressions: Mapping[str, Expression], source: Schema, target: Schema) -> None:
    for name, expression in expressions.items():
        try:
            info = infer(expression, source)
        except ValueError as error:
            raise ValueError(f"target {name!r}: {error}") from error
        if info != target[name]:
            raise ValueError(f"target {name!r} is {target[name]}, but its expression yields {info}")


def _used(expressions: Mapping[str, Expression], source: Schema, target: Schema) -> dict[str, set[Box]]:
    """For each source tensor, the boxes of it that reach a target."""
    used: dict[str, set[Box]] = {name: set() for name in source}
    for name, expression in expressions.items():
        everything = whole(target[name].shape)
        if isinstance(expression, Reference):
            used[expression.name].add(everything)
        else:
            for read, box in reads(expression, everything, source):
                used[read].add(box)
    return used


def _check_coverage(plan: Plan) -> None:
    covered = _used(plan.expressions, plan.source, plan.target)
    discarded: dict[str, list[Box]] = defaultdict(list)
    for discard in plan.discards:
        discarded[discard.name].append(_discarded_box(discard, plan, covered))
    for name, boxes in discarded.items():
        covered[name].update(boxes)
    gaps = []
    for name, info in plan.source.items():
        everything = whole(info.shape)
        if everything not in covered[name] and (left := subtract(everything, covered[name])):
            gaps.append(f"{name!r}" if left[0] == everything else f"{name!r} at [{describe_box(left[0])}] of {info}")
    if gaps:
        raise ValueError(
            f"the plan neither uses nor discards {_listed(gaps, quote=False)}; use it in an expression, "
            "or add a Discard that says why the target does without it"
        )


def _discarded_box(discard: Discard, plan: Plan, used: Mapping[str, set[Box]]) -> Box:
    """The box that a discard stands for, checked against the tensor it names and against what is used of it."""
    try:
        info = lookup(discard.name, plan.source)
    except ValueError as error:
        raise ValueError(f"a discard ({discard.reason}) names a tensor that is not there: {error}") from error
    if not discard.reason.strip():
        raise ValueError(f"the discard of {discard.name!r} gives no reason; say why the target does without it")
    if discard.box is None:
        box = whole(info.shape)
    else:
        box = discard.box
        inside = len(box) == len(info.shape) and intersect(box, whole(info.shape)) == box
        if not inside:
            raise ValueError(f"the discard of {discard.name!r}: [{describe_box(box)}] is empty or outside {info}")
    for other in used[discard.name]:
        if (common := intersect(box, other)) is not None:
            raise ValueError(
                f"{discard.name!r} is discarded ({discard.reason}) and used at [{describe_box(common)}]; "
                "drop the discard, or limit its box to what is not used"
            )
    return box


def _listed(names: Iterable[str], quote: bool = True) -> str:
    names = [repr(name) if quote else name for name in names]
    more = f" and {len(names) - _NAMED_IN_ERRORS} more" if len(names) > _NAMED_IN_ERRORS else ""
    return ", ".join(names[:_NAMED_IN_ERRORS]) + more
