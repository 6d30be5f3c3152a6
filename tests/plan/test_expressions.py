import pytest

from gearshift.plan import (
    Cast,
    Concatenate,
    Constant,
    Initialise,
    LastTap,
    LogIndex,
    LogUniform,
    Normal,
    Permute,
    Reference,
    Repeat,
    Reshape,
    Slice,
    Stack,
    TensorInfo,
    Uniform,
    infer,
    references,
)

SCHEMA = {
    "q_proj.weight": TensorInfo((8, 6), "bfloat16"),
    "k_proj.weight": TensorInfo((2, 6), "bfloat16"),
    "norm.weight": TensorInfo((6,), "float32"),
}
Q, K, NORM = (Reference(name) for name in SCHEMA)


def test_a_tensor_knows_its_size():
    info = TensorInfo((8, 6), "bfloat16")
    assert (info.elements, info.bytes) == (48, 96)
    assert (TensorInfo((), "float64").elements, TensorInfo((), "float64").bytes) == (1, 8)


@pytest.mark.parametrize(
    ("expression", "shape", "dtype"),
    [
        (Q, (8, 6), "bfloat16"),
        (Slice(Q, 0, 2, 5), (3, 6), "bfloat16"),
        (Concatenate((Q, K, K), 0), (12, 6), "bfloat16"),
        (Stack((K, K, K), 1), (2, 3, 6), "bfloat16"),
        (Stack((K, K), 2), (2, 6, 2), "bfloat16"),
        (Reshape(Q, (2, 4, 6)), (2, 4, 6), "bfloat16"),
        (Permute(Reshape(Q, (2, 4, 6)), (2, 0, 1)), (6, 2, 4), "bfloat16"),
        (Repeat(K, 0, 4), (8, 6), "bfloat16"),
        (Cast(K, "float32"), (2, 6), "float32"),
        (Initialise(Normal(0.02), (3, 1, 4), "float32"), (3, 1, 4), "float32"),
        (Initialise(Constant(1), (3,), "int64"), (3,), "int64"),
    ],
)
def test_shapes_and_dtypes_are_inferred(expression, shape, dtype):
    assert infer(expression, SCHEMA) == TensorInfo(shape, dtype)


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        (Slice(Q, 2, 0, 1), r"slice: \[8, 6\] bfloat16 has no dimension 2"),
        (Slice(Q, -1, 0, 1), "no dimension -1"),
        (Slice(Q, 0, 3, 3), "3:3 is empty or outside"),
        (Slice(Q, 0, 3, 9), "3:9 is empty or outside dimension 0"),
        (Concatenate((), 0), "no sources"),
        (Concatenate((Q, K), 1), r"\[2, 6\] bfloat16 does not continue \[8, 6\] bfloat16 along dimension 1"),
        (Concatenate((K, Cast(K, "float32")), 0), "does not continue"),
        (Concatenate((K, NORM), 0), "does not continue"),
        (Stack((Q, K), 0), "differs from the first source"),
        (Stack((K,), 3), "dimension 3 is not one of 0 to 2"),
        (Stack((), 0), "no sources"),
        (Reshape(Q, (7, 7)), "has 48 elements, .* has 49"),
        (Reshape(Q, (-1, 6)), "negative size"),
        (Permute(Q, (0, 0)), "does not name each dimension"),
        (Repeat(Q, 0, 0), "times is 0"),
        (Cast(Q, "float31"), "unknown dtype 'float31'; known are"),
        (Initialise(Normal(1.0), (2,), "int8"), "int8 cannot hold"),
        (Initialise(LastTap(0.5), (), "float32"), "LastTap needs at least one dimension"),
        (Initialise(LogIndex(), (), "float32"), "LogIndex needs at least one dimension"),
    ],
)
def test_what_does_not_fit_is_refused(expression, message):
    with pytest.raises(ValueError, match=message):
        infer(expression, SCHEMA)


def test_a_dangling_reference_names_its_neighbours():
    with pytest.raises(ValueError, match=r"no source tensor 'q_prj\.weight'; the nearest names are 'q_proj\.weight'"):
        infer(Slice(Reference("q_prj.weight"), 0, 0, 1), SCHEMA)


def test_references_are_listed_in_order():
    assert list(references(Concatenate((Slice(Q, 0, 0, 1), K, K), 0))) == ["q_proj.weight"] + ["k_proj.weight"] * 2


@pytest.mark.parametrize(
    "make",
    [lambda: Normal(-1.0), lambda: Uniform(1.0, 0.0), lambda: LogUniform(0.0, 1.0), lambda: LogUniform(2.0, 1.0)],
)
def test_initialisers_refuse_impossible_ranges(make):
    with pytest.raises(ValueError, match=r"std is -1\.0|low"):
        make()
