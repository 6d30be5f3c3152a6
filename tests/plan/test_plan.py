import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_cases import assert_same, completed, expressions, oracle_uses, plans, random_tensors, schemas

from gearshift.plan import (
    Cast,
    Concatenate,
    Constant,
    Discard,
    Initialise,
    Normal,
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

A = TensorInfo((4, 6), "float32")
B = TensorInfo((6,), "float32")


def plan_of(source, expressions, discards=()):
    return Plan(source, {name: infer(e, source) for name, e in expressions.items()}, expressions, discards)


def test_missing_and_extra_targets_are_named():
    with pytest.raises(ValueError, match="no expression for 'b'"):
        Plan({"a": A}, {"a": A, "b": B}, {"a": Reference("a")})
    with pytest.raises(ValueError, match="an expression for 'b', which the target does not hold"):
        Plan({"a": A}, {"a": A}, {"a": Reference("a"), "b": Reference("a")})


def test_many_names_are_cut_short():
    with pytest.raises(ValueError, match="'t4' and 5 more"):
        Plan({}, {f"t{i}": A for i in range(10)}, {})


def test_a_wrong_shape_or_dtype_is_named():
    with pytest.raises(ValueError, match=r"target 'a' is \[4, 6\] float32, but its expression yields \[6\] float32"):
        Plan({"b": B}, {"a": A}, {"a": Reference("b")})
    with pytest.raises(ValueError, match=r"yields .* bfloat16"):
        Plan({"a": A}, {"a": A}, {"a": Cast(Reference("a"), "bfloat16")})


def test_a_dangling_reference_cannot_be_built():
    with pytest.raises(ValueError, match="target 'a': there is no source tensor 'aa'; the nearest names are 'a'"):
        Plan({"a": A}, {"a": A}, {"a": Reference("aa")})


def test_uncovered_elements_are_named():
    with pytest.raises(ValueError, match="neither uses nor discards 'b'; use it"):
        plan_of({"a": A, "b": B}, {"t": Reference("a")})
    with pytest.raises(ValueError, match=r"'a' at \[3:4, 0:6\] of \[4, 6\] float32"):
        plan_of({"a": A}, {"t": Slice(Reference("a"), 0, 0, 3)})


def test_discards_cover():
    rest = Discard("a", "padding", ((3, 4), (0, 6)))
    plan = plan_of({"a": A, "b": B}, {"t": Slice(Reference("a"), 0, 0, 3)}, (rest, Discard("b", "unused buffer")))
    assert plan.discards[0] is rest


@pytest.mark.parametrize(
    ("discard", "message"),
    [
        (Discard("c", "gone"), r"a discard \(gone\) names a tensor that is not there: .* 'c'"),
        (Discard("b", " "), "gives no reason"),
        (Discard("b", "x", ((0, 7),)), r"\[0:7\] is empty or outside"),
        (Discard("b", "x", ((0, 6), (0, 1))), "outside"),
        (Discard("b", "x", ((3, 3),)), "empty"),
        (Discard("a", "x", ((0, 1), (2, 3))), r"'a' is discarded \(x\) and used at \[0:1, 2:3\]"),
    ],
)
def test_wrong_discards_are_refused(discard, message):
    with pytest.raises(ValueError, match=message):
        plan_of({"a": A, "b": B}, {"t": Reference("a")}, (discard,))


def test_a_plan_keeps_its_own_copy():
    expressions = {"a": Reference("a")}
    plan = plan_of({"a": A}, expressions)
    expressions.clear()
    assert plan.expressions == {"a": Reference("a")}


def test_scalars_and_empty_tensors_are_covered():
    source = {"scalar": TensorInfo((), "float32"), "empty": TensorInfo((0, 3), "float32")}
    plan_of(source, {"s": Reshape(Reference("scalar"), (1,))})
    with pytest.raises(ValueError, match="neither uses nor discards 'scalar'"):
        plan_of(source, {})


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_coverage_refuses_exactly_what_the_oracle_finds_unused(data):
    schema = data.draw(schemas())
    targets = {f"t{i}": data.draw(expressions(schema)) for i in range(data.draw(st.integers(0, 2)))}
    unused = [name for name, used in oracle_uses(targets, schema).items() if len(used) < schema[name].elements]
    if unused:
        with pytest.raises(ValueError, match=f"neither uses nor discards '{unused[0]}'"):
            plan_of(schema, targets)
    else:
        plan_of(schema, targets)
    completed(schema, targets)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_composition_equals_one_after_the_other(data):
    first = data.draw(schemas().flatmap(lambda schema: plans(schema, initialised=True)))
    then = data.draw(plans(first.target, initialised=True))
    tensors = random_tensors(first.source)
    between = materialise(first, MappingSource(tensors), seed=3)
    one_by_one = materialise(then, MappingSource(between), seed=3)
    together = first.compose(then)
    assert together.target == then.target
    assert_same(materialise(together, MappingSource(tensors), seed=3), one_by_one)


def test_composition_refuses_schemas_that_disagree():
    first = plan_of({"a": A}, {"b": Reference("a")})
    with pytest.raises(ValueError, match=r"the former has 'b' as \[4, 6\] float32, the latter as \[6\] float32"):
        first.compose(plan_of({"b": B}, {"c": Reference("b")}))
    with pytest.raises(ValueError, match="the latter lacks 'b'"):
        first.compose(plan_of({"a": A}, {"c": Reference("a")}))
    with pytest.raises(ValueError, match="the former lacks 'x'"):
        first.compose(plan_of({"b": A, "x": B}, {"c": Reference("b")}, (Discard("x", "unused"),)))


def test_discards_are_traced_to_the_source_where_nothing_else_uses_it():
    source = {"qkv": TensorInfo((6, 2), "float32"), "old": B}
    split = plan_of(
        source,
        {
            "q": Slice(Reference("qkv"), 0, 0, 2),
            "k": Slice(Reference("qkv"), 0, 2, 4),
            "k_again": Slice(Reference("qkv"), 0, 2, 4),
            "v": Slice(Reference("qkv"), 0, 4, 6),
            "gate": Initialise(Normal(1.0), (3,), "float32"),
        },
        (Discard("old", "a buffer"),),
    )
    then = plan_of(
        split.target,
        {"q": Reference("q"), "k": Reference("k")},
        (Discard("k_again", "a copy"), Discard("v", "no values"), Discard("gate", "no gate")),
    )
    assert split.compose(then).discards == (
        Discard("old", "a buffer"),
        Discard("qkv", "no values", ((4, 6), (0, 2))),
    )


def test_composition_takes_out_what_cancels():
    source = {name: TensorInfo((4, 6), "bfloat16") for name in ("a", "b")}
    a, b = Reference("a"), Reference("b")
    first = plan_of(
        source,
        {
            "joined": Concatenate((a, b), 0),
            "stacked": Stack((a, b), 0),
            "wide": Cast(a, "float32"),
            "flat": Reshape(a, (24,)),
            "turned": Permute(a, (1, 0)),
            "same": Permute(Repeat(Slice(Reshape(Cast(a, "bfloat16"), (4, 6)), 0, 0, 4), 0, 1), (0, 1)),
        },
    )
    then = plan_of(
        first.target,
        {
            "joined": Slice(Reference("joined"), 0, 4, 8),
            "rejoined": Concatenate((Slice(Reference("joined"), 0, 0, 3), Slice(Reference("joined"), 0, 3, 8)), 0),
            "stacked": Reshape(Slice(Reference("stacked"), 0, 1, 2), (4, 6)),
            "rest": Slice(Reference("stacked"), 0, 0, 1),
            "wide": Cast(Reference("wide"), "bfloat16"),
            "flat": Reshape(Reference("flat"), (4, 6)),
            "turned": Permute(Reference("turned"), (1, 0)),
            "same": Reference("same"),
        },
    )
    assert first.compose(then).expressions == {
        "joined": b,
        "rejoined": Concatenate((a, b), 0),
        "stacked": b,
        "rest": Stack((a,), 0),
        "wide": a,
        "flat": a,
        "turned": a,
        "same": a,
    }


def test_a_cast_that_rounds_stays():
    first = plan_of({"a": A}, {"a": Cast(Reference("a"), "bfloat16")})
    then = plan_of(first.target, {"a": Cast(Reference("a"), "float32")})
    assert first.compose(then).expressions["a"] == Cast(Cast(Reference("a"), "bfloat16"), "float32")


def test_a_large_plan():
    weight, small = TensorInfo((4096, 4096), "bfloat16"), TensorInfo((1024, 4096), "bfloat16")
    source, expressions = {}, {}
    for layer in range(48):
        old = f"model.layers.{layer}."
        source |= {f"{old}{name}": weight for name in ("q", "o", "gate", "up", "down")} | {f"{old}k": small}
        repeated = Reshape(Repeat(Reshape(Reference(f"{old}k"), (8, 128, 4096)), 0, 4), (4096, 4096))
        for mixer in range(4):
            new = f"model.blocks.{layer}.mixers.{mixer}."
            expressions |= {f"{new}{name}": Reference(f"{old}{name}") for name in ("q", "o", "gate", "up", "down")}
            expressions |= {f"{new}k": repeated, f"{new}bias": Initialise(Constant(0.0), (4096,), "bfloat16")}
            expressions |= {f"{new}{i}": Reference(f"{old}q") for i in range(10)}
    plan = plan_of(source, expressions)
    assert len(plan.target) == 48 * 4 * 17
