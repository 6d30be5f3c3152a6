import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_cases import expressions, oracle, oracle_uses, schemas

from gearshift.plan import Reference, Repeat, Reshape, Slice, TensorInfo, infer
from gearshift.plan.regions import coalesce, intersect, peel, reads, subtract, volume, whole


def indices(box):
    return {
        tuple(start + i for (start, _), i in zip(box, index, strict=True))
        for index in np.ndindex(*(stop - start for start, stop in box))
    }


def boxes(shape):
    intervals = [
        st.tuples(st.integers(0, size - 1), st.integers(1, size)).filter(lambda i: i[0] < i[1]) for size in shape
    ]
    return st.tuples(*intervals)


@given(st.data(), st.lists(st.integers(1, 5), max_size=3))
@settings(max_examples=150, deadline=None)
def test_subtraction_leaves_exactly_the_rest_without_overlap(data, shape):
    box = data.draw(boxes(shape))
    others = data.draw(st.lists(boxes(shape), max_size=5))
    left = subtract(box, others)
    expected = indices(box) - set().union(*map(indices, others))
    assert set().union(*map(indices, left)) == expected
    assert sum(map(volume, left)) == len(expected)


@given(st.data(), st.lists(st.integers(1, 5), max_size=3))
@settings(max_examples=100, deadline=None)
def test_coalescing_keeps_the_elements(data, shape):
    some = data.draw(st.lists(boxes(shape), max_size=6))
    fewer = coalesce(some)
    assert len(fewer) <= len(set(some))
    assert set().union(*map(indices, fewer)) == set().union(*map(indices, some))


def test_touching_boxes_join():
    assert coalesce([((0, 2), (0, 3)), ((2, 4), (0, 3)), ((0, 4), (3, 5))]) == [((0, 4), (0, 5))]


def test_boxes_that_only_touch_do_not_intersect():
    assert intersect(((0, 2),), ((2, 4),)) is None
    assert intersect((), ()) == ()


@given(st.data())
@settings(max_examples=400, deadline=None)
def test_reads_agree_with_an_oracle_that_labels_every_element(data):
    schema = data.draw(schemas())
    expression = data.draw(expressions(schema, steps=6, initialised=True))
    shape = infer(expression, schema).shape
    assert shape == oracle(expression, {name: np.zeros(info.shape) for name, info in schema.items()}).shape
    found = {name: set() for name in schema}
    for name, box in reads(expression, whole(shape), schema):
        assert intersect(box, whole(schema[name].shape)) == box
        found[name] |= indices(box)
    assert found == oracle_uses({"t": expression}, schema)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_reads_of_a_part_agree_with_the_oracle(data):
    schema = data.draw(schemas())
    expression = data.draw(expressions(schema, steps=4))
    box = data.draw(boxes(infer(expression, schema).shape))
    part = expression
    for dim, (start, stop) in enumerate(box):
        part = Slice(part, dim, start, stop)
    found = {name: set() for name in schema}
    for name, region in reads(expression, box, schema):
        found[name] |= indices(region)
    assert found == oracle_uses({"t": part}, schema)


def test_matched_dimensions_stay_one_box_whatever_their_size():
    schema = {"w": TensorInfo((32 * 128, 4096), "bfloat16")}
    heads = Reshape(Reference("w"), (32, 128, 4096))
    assert list(reads(Slice(heads, 0, 4, 8), whole((4, 128, 4096)), schema)) == [("w", ((512, 1024), (0, 4096)))]
    assert list(reads(Slice(heads, 2, 0, 7), whole((32, 128, 7)), schema)) == [("w", ((0, 4096), (0, 7)))]


def test_repeats_floor_and_ceil():
    schema = {"w": TensorInfo((4,), "float32")}
    assert list(reads(Repeat(Reference("w"), 0, 3), ((4, 7),), schema)) == [("w", ((1, 3),))]


def test_a_chain_of_slices_is_one_box():
    schema = {"w": TensorInfo((10, 6), "float32")}
    chain = Slice(Slice(Slice(Reference("w"), 0, 2, 9), 1, 1, 4), 0, 3, 5)
    assert peel(chain, schema) == (Reference("w"), ((5, 7), (1, 4)))


def test_a_flat_range_becomes_few_boxes():
    schema = {"w": TensorInfo((100, 100, 100), "float32")}
    part = Slice(Reshape(Reference("w"), (1_000_000,)), 0, 12_345, 987_654)
    boxes = [box for _, box in reads(part, ((0, 975_309),), schema)]
    assert len(boxes) <= 5
    assert sum(map(volume, boxes)) == 975_309 == math.prod(infer(part, schema).shape)
