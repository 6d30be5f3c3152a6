"""What holds of every model: over random small models, surgeries and placements."""

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gearshift.formats import FORMATS, NativeConfig
from gearshift.formats.base import InexpressibleError
from gearshift.formats.family import FamilyFormat
from gearshift.model import schema
from gearshift.plan import Plan, Schema
from gearshift.plan.execute import MappingSource, materialise
from gearshift.spec import ModelSpec, Placement
from gearshift.surgery import Surgery, operate, prune

ADDED: dict[str, dict[str, Any]] = {
    "window": {"type": "attention", "window": 5},
    "gdn": {"type": "gated_delta_net", "conv_kernel": 3},
    "kda": {"type": "kimi_delta_attention"},
    "random": {"type": "gated_delta_net", "key_heads": 1, "key_dim": 4, "value_dim": 6},
}
Weights = dict[str, torch.Tensor]


@st.composite
def blocks(draw: st.DrawFn) -> dict[str, Any]:
    """A block with plain attention and one of the MLPs."""
    kv_heads = draw(st.sampled_from([1, 2, 4]))
    mixer = {
        "type": "attention",
        "heads": 4,
        "kv_heads": kv_heads,
        "head_dim": draw(st.sampled_from([4, 6])),
        "window": draw(st.sampled_from([None, 3, 7])),
        "qkv_bias": draw(st.booleans()),
        "output_bias": draw(st.booleans()),
        "qk_norm": draw(st.sampled_from([None, {"epsilon": 1e-6}])),
    }
    experts = {"type": "mixture_of_experts", "experts": 4, "experts_per_token": 2, "intermediate_size": 6}
    mlp = draw(st.sampled_from([{"type": "gated", "intermediate_size": 10}, experts]))
    return {"mixer": mixer, "mlp": mlp, "shared_weights": draw(st.booleans())}


@st.composite
def models(draw: st.DrawFn) -> tuple[ModelSpec, Weights]:
    """A model of up to three kinds of block, and random weights."""
    made = draw(st.lists(blocks(), min_size=1, max_size=3))
    names = [f"b{number}" for number in range(len(made))]
    layers = draw(st.integers(len(names), 5))
    pattern = names + draw(st.lists(st.sampled_from(names), max_size=2))
    decoder = {"num_layers": layers, "pattern": pattern, "blocks": dict(zip(names, made, strict=True))}
    spec = ModelSpec.model_validate(
        {
            "vocab_size": 11,
            "hidden_size": 8,
            "max_positions": 32,
            "tie_embeddings": draw(st.booleans()),
            "decoder": decoder,
        }
    )
    return spec, random_weights(schema(spec, "float32"), draw(st.integers(0, 9)))


def random_weights(wanted: Schema, seed: int = 0) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(info.shape, generator=generator) for name, info in wanted.items()}


@st.composite
def additions(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Edits that add mixers to stochastic ones."""
    names = draw(st.lists(st.sampled_from(sorted(ADDED)), min_size=1, max_size=4, unique=True))
    inits = {name: "random" if name == "random" else draw(st.sampled_from(["transfer", "random"])) for name in names}
    sized = {"heads": 4, "head_dim": 4}
    more = {"window": sized, "kda": sized, "gdn": {"key_heads": 2, "key_dim": 4, "value_dim": 4}}
    return [
        {
            "add": {
                "name": name,
                "mixer": ADDED[name] | (more.get(name, {}) if inits[name] == "random" else {}),
                "init": inits[name],
            }
        }
        for name in names
    ]


def carried_out(spec: ModelSpec, weights: Weights, *edits: dict[str, Any]) -> tuple[ModelSpec, Weights]:
    spec, plan = operate(spec, MappingSource(weights).schema, [Surgery.model_validate({"edits": list(edits)})])
    return spec, materialise(plan, MappingSource(weights))


def assert_equal(one: Weights, other: Weights) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype
        assert torch.equal(tensor, other[name]), name


WRAP = {"wrap": {"main": "main"}}
few = settings(max_examples=25, deadline=None)


@few
@given(models(), additions())
def test_composition_is_one_plan_after_the_other(model: tuple[ModelSpec, Weights], edits: list[Any]) -> None:
    spec, weights = model
    wrapped, first = operate(spec, MappingSource(weights).schema, [Surgery.model_validate({"edits": [WRAP]})])
    _, second = operate(wrapped, first.target, [Surgery.model_validate({"edits": edits})])
    between = materialise(first, MappingSource(weights))
    assert_equal(
        materialise(first.compose(second), MappingSource(weights)), materialise(second, MappingSource(between))
    )


@few
@given(models(), additions())
def test_two_surgeries_equal_both_at_once(model: tuple[ModelSpec, Weights], edits: list[Any]) -> None:
    spec, weights = model
    cut = len(edits) // 2
    at_once = carried_out(spec, weights, WRAP, *edits)
    in_turn = carried_out(*carried_out(spec, weights, WRAP, *edits[:cut]), *edits[cut:])
    assert at_once[0] == in_turn[0]
    assert_equal(at_once[1], in_turn[1])


@few
@given(models(), additions(), st.data())
def test_pruning_commutes_with_adding(model: tuple[ModelSpec, Weights], edits: list[Any], data: st.DataObject) -> None:
    spec, weights = model
    whole, grown = carried_out(spec, weights, WRAP, *edits)
    kept = [edit for edit in edits if data.draw(st.booleans())]
    part, smaller = carried_out(spec, weights, WRAP, *kept)
    placement = Placement(data.draw(st.sampled_from(offered)) for offered in part.choices)
    results = []
    for supernet, tensors in ((whole, grown), (part, smaller)):
        pruned, plan = prune(supernet, MappingSource(tensors).schema, placement)
        results.append((pruned, materialise(plan, MappingSource(tensors))))
    assert results[0][0] == results[1][0]
    assert_equal(results[0][1], results[1][1])


@few
@given(models(), st.data())
def test_pruning_commutes_with_a_change_of_dtype(model: tuple[ModelSpec, Weights], data: st.DataObject) -> None:
    spec, weights = model
    supernet, tensors = carried_out(spec, weights, WRAP, {"add": {"name": "gdn", "mixer": ADDED["gdn"]}})
    placement = Placement(data.draw(st.sampled_from(offered)) for offered in supernet.choices)
    _, narrow = operate(supernet, MappingSource(tensors).schema, dtype="bfloat16")
    _, before = prune(supernet, narrow.target, placement)
    pruned, after = prune(supernet, narrow.source, placement)
    _, narrowed = operate(pruned, after.target, dtype="bfloat16")
    source = MappingSource(tensors)
    assert_equal(
        materialise(narrow.compose(before), source),
        materialise(after.compose(narrowed), source),
    )


@few
@given(models())
def test_pruning_to_main_takes_wrapping_back(model: tuple[ModelSpec, Weights]) -> None:
    spec, weights = model
    wrapped, tensors = carried_out(spec, weights, WRAP, {"add": {"name": "gdn", "mixer": ADDED["gdn"]}})
    pruned, plan = prune(wrapped, MappingSource(tensors).schema, wrapped.main)
    main = {f"{name}-main" if len(spec.decoder.blocks) > 1 else "main": b for name, b in spec.decoder.blocks.items()}
    assert pruned.decoder.blocks == main
    renamed = {
        name.replace(f"layers.{block}.", f"layers.{new}."): tensor
        for block, new in zip(spec.decoder.blocks, main, strict=True)
        for name, tensor in weights.items()
    }
    back = materialise(plan, MappingSource(tensors))
    assert_equal(back, {name: renamed[name] for name in back})


@few
@given(models())
def test_a_family_that_can_express_a_model_gives_it_back(model: tuple[ModelSpec, Weights]) -> None:
    spec, weights = model
    for name, format in FORMATS.items():
        if not isinstance(format, FamilyFormat) or not format.writable:
            continue
        try:
            format.express(NativeConfig(spec))
        except InexpressibleError:
            continue
        plan = format.plan(spec, MappingSource(weights).schema)
        theirs = materialise(plan.invert(), MappingSource(weights))
        assert_equal(materialise(plan, MappingSource(theirs)), weights)
        assert_identity(plan.invert().compose(plan), weights, name)


def assert_identity(plan: Plan, weights: Weights, what: str) -> None:
    """A plan that gives back what it gets, bit for bit."""
    assert plan.source == plan.target, what
    assert_equal(materialise(plan, MappingSource(weights)), weights)
