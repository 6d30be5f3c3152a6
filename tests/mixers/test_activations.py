"""Activations go by transformers' names, and an unknown one is refused when a model is built."""

import pytest

from gearshift.spec import MIXERS


@pytest.mark.parametrize(
    ("kind", "setting"),
    [
        ("gated_delta_net", "activation"),
        ("gated_delta_net", "conv_activation"),
        ("kimi_delta_attention", "conv_activation"),
        ("mamba", "activation"),
        ("mamba2", "activation"),
        ("discrete_mamba2", "activation"),
    ],
)
def test_unknown_activations(kind: str, setting: str) -> None:
    sizes = {"gated_delta_net": {"key_heads": 2}, "kimi_delta_attention": {"heads": 2}}.get(kind, {})
    spec = MIXERS.parse({"type": kind, **sizes, setting: "sillu"}).resolved(64)
    with pytest.raises(ValueError, match="unknown activation 'sillu': did you mean 'silu'"):
        MIXERS[kind].load()(spec, 64)
