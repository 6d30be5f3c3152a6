"""Random expressions and plans for the plan tests, and a NumPy oracle that evaluates them element by element."""

from collections import defaultdict

import numpy as np
import torch
from hypothesis import strategies as st

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
from gearshift.plan.regions import subtract, whole

SHAPES = st.lists(st.integers(1, 4), max_size=3).map(tuple)
WIDER = {"bfloat16": ["float32", "float64"], "float16": ["float32"], "float32": ["float64"], "int8": ["float16"]}


@st.composite
def schemas(draw, dtypes=("float32",)):
    shapes = draw(st.lists(SHAPES, min_size=1, max_size=3))
    return {f"layers.{i}.w": TensorInfo(shape, draw(st.sampled_from(dtypes))) for i, shape in enumerate(shapes)}


def factorisations(elements):
    shapes = [(elements,), (1, elements)]
    for a in range(1, elements + 1):
        if elements % a == 0:
            shapes += [(a, elements // a)]
            shapes += [(a, b, elements // a // b) for b in range(1, elements + 1) if elements // a % b == 0]
    return shapes


def permuted(expression, schema):
    rank = len(infer(expression, schema).shape)
    return st.permutations(range(rank)).map(lambda dims: Permute(expression, tuple(dims)))


def reshaped(expression, schema):
    shapes = factorisations(infer(expression, schema).elements)
    return st.sampled_from(shapes).map(lambda shape: Reshape(expression, shape))


@st.composite
def expressions(draw, schema, steps=5, initialised=False):
    """A chain of random operations from a random tensor, joined with others of its kind on the way."""
    expression = Reference(draw(st.sampled_from(sorted(schema))))
    for _ in range(draw(st.integers(0, steps))):
        info = infer(expression, schema)
        rank = len(info.shape)
        kinds = ["reshape", "permute", "stack", "cast"] + ["slice", "concatenate", "repeat"] * bool(rank)
        dim = draw(st.integers(0, max(rank - 1, 0)))
        match draw(st.sampled_from(kinds)):
            case "slice":
                start = draw(st.integers(0, info.shape[dim] - 1))
                expression = Slice(expression, dim, start, draw(st.integers(start + 1, info.shape[dim])))
            case "repeat":
                expression = Repeat(expression, dim, draw(st.integers(1, 3)))
            case "reshape" if info.elements <= 64:
                expression = draw(reshaped(expression, schema))
            case "permute":
                expression = draw(permuted(expression, schema))
            case "cast":
                expression = Cast(expression, draw(st.sampled_from(["float32", "float64", "bfloat16"])))
            case "concatenate" | "stack" as kind:
                others = [expression]
                if initialised:
                    initialiser = draw(st.sampled_from([Constant(0.5), Normal(0.1)]))
                    others.append(Initialise(initialiser, info.shape, info.dtype))
                if rank and info.shape[dim] > 1:
                    part = Slice(expression, dim, 0, 1)
                    others.append(Repeat(part, dim, info.shape[dim]))
                parts = (expression, *draw(st.lists(st.sampled_from(others), max_size=2)))
                expression = Concatenate(parts, dim) if kind == "concatenate" else Stack(parts, dim)
    return expression


def completed(schema, expressions):
    """The plan of these expressions, everything that they leave out discarded."""
    bare = {name: infer(expression, schema) for name, expression in expressions.items()}
    used = defaultdict(list)
    for name, elements in oracle_uses(expressions, schema).items():
        used[name] = [tuple((i, i + 1) for i in index) for index in elements]
    discards = tuple(
        Discard(name, "not needed", box)
        for name, info in schema.items()
        for box in subtract(whole(info.shape), used[name])
    )
    return Plan(schema, bare, expressions, discards)


@st.composite
def plans(draw, schema, initialised=False):
    count = draw(st.integers(1, 3))
    return completed(
        schema, {f"blocks.{i}.w": draw(expressions(schema, initialised=initialised)) for i in range(count)}
    )


@st.composite
def bijective_plans(draw):
    """Every source tensor cut, joined, reshaped, permuted and widened at random, no element lost or repeated."""
    schema = draw(schemas(dtypes=tuple(WIDER)))
    pool = [Reference(name) for name in schema]
    for _ in range(draw(st.integers(0, 8))):
        item = pool.pop(draw(st.integers(0, len(pool) - 1)))
        info = infer(item, schema)
        match draw(st.sampled_from(["reshape", "permute", "widen", "slice", "concatenate", "stack"])):
            case "reshape":
                item = draw(reshaped(item, schema))
            case "permute":
                item = draw(permuted(item, schema))
            case "widen" if info.dtype in WIDER:
                item = Cast(item, draw(st.sampled_from(WIDER[info.dtype])))
            case "slice" if any(size > 1 for size in info.shape):
                dim = draw(st.sampled_from([dim for dim, size in enumerate(info.shape) if size > 1]))
                cut = draw(st.integers(1, info.shape[dim] - 1))
                pool.append(Slice(item, dim, 0, cut))
                item = Slice(item, dim, cut, info.shape[dim])
            case "concatenate" | "stack" as kind:
                alike = [other for other in pool if infer(other, schema) == info]
                if alike and info.shape:
                    other = draw(st.sampled_from(alike))
                    pool.remove(other)
                    dim = draw(st.integers(0, len(info.shape) - 1))
                    item = (Concatenate if kind == "concatenate" else Stack)((item, other), dim)
        pool.append(item)
    return Plan(
        schema,
        {f"t{i}": infer(item, schema) for i, item in enumerate(pool)},
        {f"t{i}": item for i, item in enumerate(pool)},
    )


def oracle(expression, arrays):
    """The expression over NumPy arrays, initialised elements being -1."""
    match expression:
        case Reference(name):
            return arrays[name]
        case Initialise():
            return np.full(expression.shape, -1)
        case Slice(source, dim, start, stop):
            return oracle(source, arrays).take(range(start, stop), axis=dim)
        case Concatenate(sources, dim):
            return np.concatenate([oracle(source, arrays) for source in sources], dim)
        case Stack(sources, dim):
            return np.stack([oracle(source, arrays) for source in sources], dim)
        case Reshape(source, shape):
            return oracle(source, arrays).reshape(shape)
        case Permute(source, dims):
            return oracle(source, arrays).transpose(dims)
        case Repeat(source, dim, times):
            return oracle(source, arrays).repeat(times, dim)
        case Cast(source):
            return oracle(source, arrays)


def labelled(schema):
    """Arrays in which every element of every tensor has its own number."""
    arrays, offset = {}, 0
    for name, info in schema.items():
        arrays[name] = np.arange(offset, offset + info.elements).reshape(info.shape)
        offset += info.elements
    return arrays


def oracle_uses(expressions, schema):
    """For each source tensor, the indices of its elements that reach a result."""
    arrays = labelled(schema)
    used = {label for expression in expressions.values() for label in oracle(expression, arrays).ravel().tolist()}
    return {
        name: {index for index in np.ndindex(array.shape) if int(array[index]) in used}
        for name, array in arrays.items()
    }


def random_tensors(schema, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randint(-100, 100, info.shape, generator=generator).div(8).to(getattr(torch, info.dtype))
        for name, info in schema.items()
    }


def assert_same(left, right):
    """Equal names, shapes, dtypes and bits."""
    assert list(left) == list(right)
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert tensor.shape == right[name].shape, name
        assert bits(tensor) == bits(right[name]), name


def bits(tensor):
    # A clone: a tensor of one element counts as contiguous whatever its strides.
    return tensor.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8).numpy().tobytes()
