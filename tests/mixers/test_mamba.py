"""Mamba against transformers' Jamba layer, its grouped form against the written definition, and against itself."""

import math

import pytest
import torch
from contract_cases import (
    ATTENTION,
    HIDDEN,
    LENGTHS,
    check_agreement,
    check_batch,
    check_continuation,
    check_declarations,
    check_definition,
    check_low_precision,
    check_packing,
    check_padding,
    check_refusal,
    check_transfer,
    randomised,
)
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import JambaConfig
from transformers.models.jamba.modeling_jamba import JambaMambaMixer

from gearshift.mixers.mamba import KIND, MambaSpec
from gearshift.mixers.mamba.module import Mamba
from gearshift.plan import LastTap, Reference, Reshape
from gearshift.spec import MIXERS

EPSILON = 1e-5
NORM = {"norm": {"epsilon": EPSILON}}
JAMBA = {
    **{f"in_proj.{kind}": [f"x_proj.{kind}", f"gate_proj.{kind}"] for kind in ("weight", "bias")},
    **{f"out_proj.{kind}": [f"o_proj.{kind}"] for kind in ("weight", "bias")},
    **{f"conv1d.{kind}": [f"conv.{kind}"] for kind in ("weight", "bias")},
    "x_proj.weight": ["selection_proj.weight"],
    "dt_proj.weight": ["dt_up_proj.weight"],
    "dt_proj.bias": ["dt_bias"],
    **{f"{name}_layernorm.weight": [f"{name}_norm.weight"] for name in ("dt", "b", "c")},
}
GROUPED = {"projection": "grouped", "state_size": 8, "inner_size": 48, "xb_size": 16}
SETTINGS = {
    "classic": {},
    "classic, biased": {"projection_bias": True, **NORM},
    "grouped": GROUPED,
    "grouped, biased": {**GROUPED, "projection_bias": True, "doubled_dt_bias": True},
    "grouped, repeated late": {**GROUPED, "repeat_kv_before_conv": False, "dt_bias": False},
}


def mixer(**settings: object) -> Mamba:
    given = {"state_size": 12, "dt_rank": 5, **settings}
    return randomised(Mamba(MambaSpec.model_validate(given).resolved(HIDDEN), HIDDEN))


def jamba(spec: MambaSpec) -> nn.Module:
    config = JambaConfig(
        hidden_size=HIDDEN,
        mamba_expand=2,
        mamba_d_state=spec.state_size,
        mamba_d_conv=spec.conv_kernel,
        mamba_dt_rank=spec.dt_rank,
        mamba_conv_bias=spec.conv_bias,
        mamba_proj_bias=spec.projection_bias,
        hidden_act=spec.activation,
        rms_norm_eps=EPSILON,
        use_mamba_kernels=False,
    )
    return JambaMambaMixer(config, layer_idx=0)


@pytest.mark.parametrize(
    "settings",
    [{}, {"projection_bias": True, "conv_bias": False}, {"conv_kernel": 3, "activation": "gelu"}],
    ids=["plain", "biased", "gelu"],
)
@pytest.mark.parametrize("tokens", LENGTHS)
def test_transformers_layer(tokens: int, settings: dict[str, object]) -> None:
    ours = mixer(**settings, **NORM)
    check_agreement(ours, jamba(ours.spec), JAMBA, tokens)


def test_a_norm_less_classic_mamba_is_one_whose_norms_are_taken_out() -> None:
    ours = mixer()
    theirs = jamba(ours.spec)
    for name in ("dt_layernorm", "b_layernorm", "c_layernorm"):
        setattr(theirs, name, nn.Identity())
    check_agreement(ours, theirs, JAMBA, 65)


def grouped(ours: Mamba, x: Tensor) -> Tensor:
    """The definition of the grouped form (arXiv 2408.15237): a head at a time, a token at a time, in float64."""
    spec, tokens, size = ours.spec, x.shape[1], ours.spec.state_size
    at = {name: parameter.double() for name, parameter in ours.named_parameters()}
    share = spec.inner_size // spec.xb_size

    def linear(name: str, inputs: Tensor) -> Tensor:
        return F.linear(inputs, at[f"{name}_proj.weight"], at.get(f"{name}_proj.bias"))

    def repeated(inputs: Tensor) -> Tensor:
        return torch.cat([part for part in inputs.split(size, -1) for _ in range(share)], -1)

    def convolved(inputs: Tensor) -> Tensor:
        padded = F.pad(inputs.mT, (spec.conv_kernel - 1, 0))
        return F.silu(F.conv1d(padded, at["conv.weight"], at["conv.bias"], groups=inputs.shape[-1])).mT

    x = x.double()
    values = linear("x", x)
    values = convolved(repeated(values)) if spec.repeat_kv_before_conv else repeated(convolved(values))
    dt = linear("dt_up", linear("dt_down", x)) + at.get("dt_bias", torch.zeros(())) * (1 + spec.doubled_dt_bias)
    step, rate = F.softplus(dt), -at["A_log"].exp()
    written, read = repeated(linear("b", x)), linear("c", x)
    outputs = []
    for head in torch.arange(spec.inner_size).split(size):
        state, made = torch.zeros(x.shape[0], size, size, dtype=torch.float64), []
        for token in range(tokens):
            now = step[:, token, head, None]
            fresh = now * values[:, token, head, None] * written[:, token, None, head]
            state = (now * rate[head]).exp() * state + fresh
            made.append((state * read[:, token, None, head]).sum(-1) + at["D"][head] * values[:, token, head])
        outputs.append(torch.stack(made, 1))
    return linear("o", torch.cat(outputs, -1) * F.silu(linear("gate", x)))


@pytest.mark.parametrize("settings", [name for name in SETTINGS if name.startswith("grouped")])
@pytest.mark.parametrize("tokens", [1, 65])
def test_the_grouped_form_is_its_definition(tokens: int, settings: str) -> None:
    check_definition(mixer(**SETTINGS[settings]), grouped, tokens)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_state_carries_over(settings: dict[str, object]) -> None:
    check_continuation(mixer(**settings))


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_packed_documents_are_separate(settings: dict[str, object]) -> None:
    check_packing(mixer(**settings), [5, 1, 40, 2])


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_left_padding_changes_nothing(settings: dict[str, object]) -> None:
    check_padding(mixer(**settings))


@pytest.mark.parametrize("settings", [{}, GROUPED], ids=["classic", "grouped"])
def test_batch_rows_are_separate(settings: dict[str, object]) -> None:
    check_batch(mixer(**settings))


def test_declarations_are_complete() -> None:
    check_declarations(*(mixer(**settings) for settings in SETTINGS.values()))


@pytest.mark.parametrize("settings", [NORM, GROUPED], ids=["classic", "grouped"])
def test_low_precision_stays_in_its_dtype(settings: dict[str, object]) -> None:
    check_low_precision(mixer(**settings))


def test_sizes_left_out_are_derived() -> None:
    spec = MambaSpec().resolved(100)
    assert (spec.inner_size, spec.dt_rank, spec.xb_size, spec.conv_channels) == (200, 7, None, 200)
    spec = MambaSpec(projection="grouped", state_size=10, repeat_kv_before_conv=False).resolved(100)
    assert (spec.inner_size, spec.xb_size, spec.conv_channels) == (200, 100, 100)
    assert spec.resolved(100) == spec


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"xb_size": 32}, "belong to a grouped mamba"),
        ({"repeat_kv_before_conv": False}, "belong to a grouped mamba"),
        ({**GROUPED, **NORM}, "a grouped mamba has no norm"),
        ({**GROUPED, "xb_size": 20}, "xb_size 20 must be a multiple of state_size 8"),
        ({**GROUPED, "xb_size": 32}, "inner_size 48 a multiple of xb_size"),
        ({"dt_rank": 0}, "give `auto` or a whole number from 1 on"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MambaSpec.model_validate(wrong).resolved(HIDDEN)


def test_the_registry_finds_it() -> None:
    assert MIXERS["mamba"].load() is Mamba


def test_transfer_from_attention() -> None:
    made, plan = check_transfer(KIND.transfer_from("attention"), Mamba)
    spec = made.spec
    assert (spec.projection, spec.inner_size, spec.xb_size, spec.state_size) == ("grouped", 60, 20, 10)
    taken = {name: start.name for name, start in plan.items() if isinstance(start, Reference)}
    assert taken == {f"{own}_proj.weight": f"{name}_proj.weight" for own, name in zip("cbxo", "qkvo", strict=True)}
    assert plan["conv.weight"] == LastTap(0.5)


def test_transfer_repeats_shared_heads_where_the_target_shares_fewer() -> None:
    transfer = KIND.transfer_from("attention")
    check_transfer(transfer, Mamba, xb_size=60, repeat_kv_before_conv=False)
    source = ATTENTION.resolved(HIDDEN)
    with pytest.raises(ValueError, match=r"with 3 heads of x and B.* with 2 kv_heads"):
        transfer.plan(source, transfer.infer(source, HIDDEN, {"xb_size": 30}), HIDDEN)


def test_transfer_to_a_classic_projection_takes_values_and_output() -> None:
    made, plan = check_transfer(KIND.transfer_from("attention"), Mamba, projection="classic")
    spec = made.spec
    assert (spec.inner_size, spec.state_size, spec.dt_rank) == (60, 16, math.ceil(HIDDEN / 16))
    assert set(plan) == {"x_proj.weight", "o_proj.weight", "conv.weight", "conv.bias"}
    assert isinstance(plan["x_proj.weight"], Reshape)


@pytest.mark.parametrize("wrong", [{"inner_size": 120}, {"state_size": 4}])
def test_transfer_refuses_other_heads(wrong: dict[str, int]) -> None:
    check_refusal(KIND.transfer_from("attention"), wrong)
