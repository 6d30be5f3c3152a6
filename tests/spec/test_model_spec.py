import json
from pathlib import Path

import pytest
from pydantic import ValidationError
from tests.models import ATTENTION, supernet_spec

from gearshift.model import cost_table
from gearshift.spec import MIXERS, ModelSpec, Placement

MLP = {"type": "gated", "intermediate_size": 8}


def described(**decoder) -> dict:
    decoder = {
        "num_layers": 5,
        "pattern": ["a", "b", "b"],
        "blocks": {
            "a": {"mixer": {"type": "attention", "heads": 2}, "mlp": MLP},
            "b": {
                "mixer": {"type": "attention", "heads": 2, "kv_heads": 1, "window": 4},
                "mlp": MLP,
                "shared_weights": True,
            },
        },
        **decoder,
    }
    return {"vocab_size": 11, "hidden_size": 8, "max_positions": 32, "decoder": decoder}


def test_pattern_repeats_and_is_cut_short() -> None:
    decoder = ModelSpec.model_validate(described()).decoder
    assert decoder.layout == ("a", "b", "b", "a", "b")
    assert decoder.weight_keys == ("0", "b", "b", "3", "b")


def test_a_spec_is_always_resolved_and_survives_json() -> None:
    spec = ModelSpec.model_validate(described())
    mixer = spec.decoder.blocks["a"].mixer
    assert (mixer.kv_heads, mixer.head_dim) == (2, 4)
    assert ModelSpec.model_validate_json(spec.model_dump_json()) == spec
    assert json.loads(spec.model_dump_json())["decoder"]["blocks"]["a"]["mixer"]["head_dim"] == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pattern": ["a", "c"]}, "names a block 'c'"),
        ({"pattern": ["a"]}, "no layer uses the block 'b'"),
        ({"nonsense": 1}, "Extra inputs"),
        ({"blocks": {"a": {"mixer": {"type": "attentoin"}, "mlp": MLP}}}, "did you mean attention"),
        ({"blocks": {"a": {"mixer": {"type": "attention", "heads": 3}, "mlp": MLP}}, "pattern": ["a"]}, "set head_dim"),
        (
            {"blocks": {"a": {"mixer": {"type": "attention", "heads": 2, "x": 1}, "mlp": MLP}}, "pattern": ["a"]},
            "Extra",
        ),
    ],
)
def test_what_does_not_fit_is_named(change: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ModelSpec.model_validate(described(**change))


def test_every_field_is_described_and_the_schema_names_every_mixer() -> None:
    schema = ModelSpec.model_json_schema()
    for definition in [schema, *schema["$defs"].values()]:
        for name, field in definition.get("properties", {}).items():
            assert "description" in field, f"{definition['title']}.{name} has no description"
    offered = json.dumps(schema["$defs"]["BlockSpec"]["properties"]["mixer"])
    for name in MIXERS.names():
        assert MIXERS[name].spec.__name__ in offered


def test_state_is_declared_and_costs_follow_it() -> None:
    spec = supernet_spec(layers=2, mixers={"attention": ATTENTION, "window": {**ATTENTION, "window": 6}})
    full, windowed = Placement(["attention"] * 2), Placement(["window"] * 2)
    token = 2 * 2 * 8 * 2 * 2  # keys and values, heads, channels, layers, bytes
    assert spec.state_bytes(full, 100, "bfloat16") == 100 * token
    assert spec.state_bytes(windowed, 100, "bfloat16") == 5 * token
    table = cost_table(spec, "bfloat16", context=100)
    assert table.of(full) - table.of(windowed) == 95 * token
    assert table.cheapest == windowed
    assert table.span == (table.of(windowed), table.of(full))
    assert table.at(0.5) == sum(table.span) / 2
    with pytest.raises(ValueError, match=r"outside the cost span: 0 is .*window\*2.*1 is .*attention\*2"):
        table.at(1.5)


def test_only_mixers_and_formats_name_a_mixer() -> None:
    """Adding a mixer touches one folder: nothing else in the source may know one by its type."""
    root = Path(__file__).parents[2] / "src" / "gearshift"
    kinds = [name for name in MIXERS.names() if name != "attention"]
    for file in root.rglob("*.py"):
        if file.relative_to(root).parts[0] not in ("mixers", "formats"):
            text = file.read_text()
            for kind in kinds:
                assert kind not in text, f"{file} names {kind}"
            assert '"attention"' not in text, f"{file} names attention"
