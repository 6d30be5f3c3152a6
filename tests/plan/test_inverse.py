import pytest
from hypothesis import given, settings
from plan_cases import assert_same, bijective_plans, random_tensors

from gearshift.plan import (
    Cast,
    Concatenate,
    Constant,
    Discard,
    Initialise,
    Permute,
    Plan,
    Reference,
    Repeat,
    Reshape,
    Slice,
    Stack,
    TensorInfo,
    infer,
)
from gearshift.plan.execute import MappingSource, materialise

W = TensorInfo((6, 4), "bfloat16")
w = Reference("w")


def plan_of(source, expressions, discards=()):
    return Plan(source, {name: infer(e, source) for name, e in expressions.items()}, expressions, discards)


@given(bijective_plans())
@settings(max_examples=250, deadline=None)
def test_there_and_back_is_the_identity_bit_for_bit(plan):
    tensors = random_tensors(plan.source)
    there = materialise(plan, MappingSource(tensors))
    back = plan.invert()
    assert_same(materialise(back, MappingSource(there)), tensors)
    assert_same(materialise(plan.compose(back), MappingSource(tensors)), tensors)


def test_joined_tensors_come_apart_and_parts_together():
    source = {name: TensorInfo((2, 3), "float32") for name in "qkv"} | {"gate_up": TensorInfo((8, 3), "float32")}
    gate_up = Reference("gate_up")
    plan = plan_of(
        source,
        {
            "qkv": Concatenate(tuple(map(Reference, "qkv")), 0),
            "up": Slice(gate_up, 0, 4, 8),
            "gate": Slice(gate_up, 0, 0, 4),
        },
    )
    assert plan.invert().expressions == {
        "q": Slice(Reference("qkv"), 0, 0, 2),
        "k": Slice(Reference("qkv"), 0, 2, 4),
        "v": Slice(Reference("qkv"), 0, 4, 6),
        "gate_up": Concatenate((Reference("gate"), Reference("up")), 0),
    }
    assert plan.invert().invert() == plan


def test_slices_of_a_reshape_are_put_together_first():
    heads = Reshape(Reference("qkv"), (4, 3, 2, 5))
    parts = {name: Reshape(Slice(heads, 1, index, index + 1), (8, 5)) for index, name in enumerate(("q", "k", "v"))}
    plan = plan_of({"qkv": TensorInfo((24, 5), "float32")}, parts)
    tensors = random_tensors(plan.source)
    there = materialise(plan, MappingSource(tensors))
    assert_same(materialise(plan.invert(), MappingSource(there)), tensors)
    assert plan.compose(plan.invert()).expressions == {"qkv": Reference("qkv")}


@pytest.mark.parametrize(
    ("expressions", "message"),
    [
        ({"t": w, "new": Initialise(Constant(0), (2,), "float32")}, "at target 'new': it is initialised"),
        ({"t": Repeat(w, 0, 2)}, "at target 't': it repeats"),
        ({"t": Cast(w, "float16")}, "at target 't': the cast from bfloat16 to float16 rounds"),
        ({"t": w, "again": Permute(w, (1, 0))}, "at target 'again': it uses elements of 'w' that 't' uses too"),
        ({"t": Slice(w, 0, 0, 4), "u": Slice(w, 0, 3, 6)}, "at target 'u': it uses elements of 'w' that 't' uses too"),
        ({"t": Stack((w, w), 0)}, "at target 't': it uses elements of 'w' that 't' uses too"),
    ],
)
def test_what_cannot_be_undone_is_named(expressions, message):
    with pytest.raises(ValueError, match=message):
        plan_of({"w": W}, expressions).invert()


def test_discards_cannot_be_undone():
    plan = plan_of({"w": W}, {"t": Slice(w, 0, 0, 5)}, (Discard("w", "padding", ((5, 6), (0, 4))),))
    with pytest.raises(ValueError, match=r"it discards 'w' \(padding\)"):
        plan.invert()


def test_slices_that_leave_out_part_of_what_they_cut_are_refused():
    joined = Concatenate((w, Reference("x")), 0)
    source = {"w": W, "x": W}
    plan = plan_of(source, {"t": Slice(joined, 0, 0, 7), "rest": Slice(Reference("x"), 0, 1, 6)})
    with pytest.raises(ValueError, match="at target 't': its slices, with those of other targets, leave out part"):
        plan.invert()


def test_interlocking_slices_are_refused():
    def cut(rows, columns):
        return Slice(Slice(Reference("s"), 0, *rows), 1, *columns)

    pinwheel = {
        "north": cut((0, 1), (0, 2)),
        "east": cut((0, 2), (2, 3)),
        "south": cut((2, 3), (1, 3)),
        "west": cut((1, 3), (0, 1)),
        "centre": cut((1, 2), (1, 2)),
    }
    with pytest.raises(ValueError, match="interlock, with no straight cut"):
        plan_of({"s": TensorInfo((3, 3), "float32")}, pinwheel).invert()
