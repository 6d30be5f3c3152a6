import pytest
from rich.console import Console

from gearshift.plan import (
    Cast,
    Concatenate,
    Constant,
    Discard,
    Initialise,
    InverseSoftplusLogUniform,
    Normal,
    Permute,
    Plan,
    Reference,
    Repeat,
    Reshape,
    Slice,
    Stack,
    describe,
    infer,
    render,
)
from gearshift.plan import TensorInfo as Info

A = Reference("a")


@pytest.mark.parametrize(
    ("expression", "text"),
    [
        (Repeat(Reference("k_proj.weight"), 0, 3), "repeat(k_proj.weight, dim 0, x3)"),
        (Slice(A, 1, 2, 4), "slice(a, dim 1, 2:4)"),
        (Concatenate((A, A), 0), "concatenate(a, a, dim 0)"),
        (Stack((A, A), 1), "stack(a, a, dim 1)"),
        (Permute(Reshape(A, (2, 3)), (1, 0)), "permute(reshape(a, [2, 3]), [1, 0])"),
        (Cast(A, "bfloat16"), "cast(a, bfloat16)"),
        (Initialise(Constant(0.5), (2,), "float32"), "initialise constant(0.5)"),
        (Initialise(Normal(0.02), (2,), "float32"), "initialise normal(std 0.02, mean 0.0)"),
        (
            Initialise(InverseSoftplusLogUniform(0.001, 0.1, 1e-4), (2,), "float32"),
            "initialise inverse_softplus_log_uniform(low 0.001, high 0.1, floor 0.0001)",
        ),
    ],
)
def test_expressions_are_described_in_a_line(expression, text):
    assert describe(expression) == text


def printed(source, expressions, discards=()):
    target = {name: infer(expression, source) for name, expression in expressions.items()}
    console = Console(width=120)
    with console.capture() as capture:
        console.print(render(Plan(source, target, expressions, discards)))
    return capture.get()


def test_equal_layers_collapse():
    source, expressions = {"embed.weight": Info((8, 4), "float32")}, {"embed.weight": Reference("embed.weight")}
    for layer in range(12):
        source[f"model.layers.{layer}.k.weight"] = Info((2, 4), "float32")
        k = Reference(f"model.layers.{layer}.k.weight")
        width = 3 if layer == 5 else 2
        expressions[f"blocks.{layer}.mixer.k.weight"] = Repeat(k, 0, width)
        for expert in range(3):
            expressions[f"blocks.{layer}.experts.{expert}"] = k
    assert printed(source, expressions).splitlines() == [
        "13 tensors, 512 bytes → 49 tensors, 2.1 kB",
        "├── embed.weight  [8, 4] float32 ← embed.weight",
        "└── blocks",
        "    ├── 0-4,6-11.mixer.k.weight  [4, 4] float32 ← repeat(model.layers.*.k.weight, dim 0, x2)",
        "    ├── 0-11.experts.0-2  [2, 4] float32 ← model.layers.*.k.weight",
        "    └── 5.mixer.k.weight  [6, 4] float32 ← repeat(model.layers.5.k.weight, dim 0, x3)",
    ]


def test_equal_names_collapse():
    shapes = {"q": (4, 4), "k": (2, 4), "v": (2, 4), "o": (4, 4)}
    source = {f"{name}.weight": Info(shape, "float32") for name, shape in shapes.items()}
    expressions = {f"{mixer}.{name}.weight": Reference(f"{name}.weight") for mixer in "ab" for name in "qkvo"}
    expressions["b.v.weight"] = Reference("k.weight")
    assert printed(source, expressions).splitlines()[1:] == [
        "├── {a, b}",
        "│   ├── {q, o}.weight  [4, 4] float32 ← *.weight",
        "│   └── k.weight  [2, 4] float32 ← k.weight",
        "├── a.v.weight  [2, 4] float32 ← v.weight",
        "└── b.v.weight  [2, 4] float32 ← k.weight",
    ]


def test_a_part_that_differs_leaves_the_rest_together():
    names = ("mixers.gdn.q.weight", "mixers.gdn.A", "mixers.kda.q.weight", "mixers.kda.b", "mlp.up.weight")
    source = {f"{layer}.{name}": Info((2,), "float32") for layer in range(4) for name in names}
    expressions = {f"layers.{name}": Reference(name) for name in source}
    expressions |= {
        f"layers.{layer}.mixers.kda.b": Cast(Reference(f"{layer}.mixers.kda.b"), "bfloat16") for layer in (1, 3)
    }
    assert printed(source, expressions).splitlines()[1:] == [
        "└── layers",
        "    ├── 0-3",
        "    │   ├── mixers.gdn",
        "    │   │   ├── q.weight  [2] float32 ← *.mixers.gdn.q.weight",
        "    │   │   └── A  [2] float32 ← *.mixers.gdn.A",
        "    │   └── mlp.up.weight  [2] float32 ← *.mlp.up.weight",
        "    ├── 0,2.mixers.kda",
        "    │   ├── q.weight  [2] float32 ← *.mixers.kda.q.weight",
        "    │   └── b  [2] float32 ← *.mixers.kda.b",
        "    └── 1,3.mixers.kda",
        "        ├── q.weight  [2] float32 ← *.mixers.kda.q.weight",
        "        └── b  [2] bfloat16 ← cast(*.mixers.kda.b, bfloat16)",
    ]


def test_numbers_are_told_apart_by_where_they_stand():
    names = [f"layers.{layer}.experts.{expert}.w" for layer in range(4) for expert in range(4)]
    source = {f"old.{name}": Info((2,), "float32") for name in names}
    text = printed(source, {f"new.{name}": Reference(f"old.{name}") for name in names})
    assert "└── new.layers.0-3.experts.0-3.w  [2] float32 ← old.layers.*.experts.*.w" in text


def test_discards_have_a_branch_with_their_reasons():
    source = {f"layers.{layer}.inv_freq": Info((4,), "float32") for layer in range(4)} | {"w": Info((4, 2), "float32")}
    discards = tuple(Discard(f"layers.{layer}.inv_freq", "recomputed [always]") for layer in range(4))
    padding = Discard("w", "padding", ((3, 4), (0, 2)))
    text = printed(source, {"w": Slice(Reference("w"), 0, 0, 3)}, (*discards, padding))
    assert text.splitlines()[2:] == [
        "└── discarded",
        "    ├── layers.0-3.inv_freq  (recomputed [always])",
        "    └── w  [3:4, 0:2] (padding)",
    ]


def test_a_name_may_be_both_a_tensor_and_a_group():
    source = {"a": Info((2,), "float32"), "a.b": Info((2,), "float32")}
    text = printed(source, {name: Reference(name) for name in source})
    assert "a  [2] float32 ← a\n" in text
    assert "b  [2] float32 ← a.b" in text
