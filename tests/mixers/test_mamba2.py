"""Mamba-2 against transformers' Mamba-2 and Bamba layers, and against itself in other arrangements."""

import pytest
import torch
from contract_cases import (
    ATTENTION,
    HIDDEN,
    LENGTHS,
    assert_near,
    check_agreement,
    check_batch,
    check_continuation,
    check_declarations,
    check_low_precision,
    check_packing,
    check_padding,
    check_refusal,
    check_transfer,
    randomised,
)
from torch import nn
from torch.nn import functional as F
from transformers import BambaConfig, Mamba2Config
from transformers.models.bamba.modeling_bamba import BambaMixer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from gearshift.mixers.mamba2 import KIND, Mamba2Spec
from gearshift.mixers.mamba2.module import Mamba2
from gearshift.plan import Constant, LastTap, Reference
from gearshift.spec import MIXERS

THEIRS = {
    "in_proj": ["gate_proj", "x_proj", "b_proj", "c_proj", "dt_proj"],
    "conv1d": ["x_conv", "b_conv", "c_conv"],
    "out_proj": ["o_proj"],
}
NAMES = {f"{name}.{kind}": [f"{own}.{kind}" for own in THEIRS[name]] for name in THEIRS for kind in ("weight", "bias")}
BIASED = {"projection_bias": True, "conv_bias": True}
SETTINGS = {
    "grouped": {},
    "one group": {"groups": 1, "conv_kernel": 3, "conv_bias": False},
    "biased": BIASED,
    "limited": {"time_step_limit": (0.4, 1.1), "activation": "gelu"},
}


def mixer(**settings: object) -> Mamba2:
    given = {"heads": 6, "head_dim": 16, "state_size": 12, "groups": 2, **settings}
    return randomised(Mamba2(Mamba2Spec.model_validate(given).resolved(HIDDEN), HIDDEN))


def limits(spec: Mamba2Spec) -> tuple[float, float]:
    low, high = spec.time_step_limit
    return low, float("inf") if high is None else high


def mamba2(spec: Mamba2Spec) -> nn.Module:
    config = Mamba2Config(
        hidden_size=HIDDEN,
        num_hidden_layers=1,
        expand=2,
        num_heads=spec.heads,
        head_dim=spec.head_dim,
        state_size=spec.state_size,
        n_groups=spec.groups,
        conv_kernel=spec.conv_kernel,
        use_conv_bias=spec.conv_bias,
        use_bias=spec.projection_bias,
        hidden_act=spec.activation,
        time_step_limit=limits(spec),
        layer_norm_epsilon=spec.norm_epsilon,
        chunk_size=16,
    )
    return Mamba2Mixer(config, layer_idx=0)


def bamba(spec: Mamba2Spec) -> nn.Module:
    config = BambaConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        attn_layer_indices=[1],
        mamba_expand=2,
        mamba_n_heads=spec.heads,
        mamba_d_head=spec.head_dim,
        mamba_d_state=spec.state_size,
        mamba_n_groups=spec.groups,
        mamba_d_conv=spec.conv_kernel,
        mamba_conv_bias=spec.conv_bias,
        mamba_proj_bias=spec.projection_bias,
        hidden_act=spec.activation,
        time_step_limit=limits(spec),
        rms_norm_eps=spec.norm_epsilon,
        mamba_chunk_size=16,
    )
    return BambaMixer(config, layer_idx=0)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("family", [mamba2, bamba])
@pytest.mark.parametrize("tokens", LENGTHS)
def test_transformers_layer(tokens: int, family: object, settings: dict[str, object]) -> None:
    spec = mixer(**settings).spec
    theirs = family(spec)
    # Releases differ in whether the norm's groups are those of B and C or one.
    channels = spec.heads * spec.head_dim
    ours = mixer(**settings, norm_groups=channels // getattr(theirs.norm, "group_size", channels))
    check_agreement(ours, theirs, NAMES, tokens)


@pytest.mark.parametrize("norm_groups", [1, 4])
@pytest.mark.parametrize("before", [False, True])
def test_the_norm(norm_groups: int, before: bool) -> None:
    ours = mixer(norm_groups=norm_groups, norm_before_gate=before)
    x, gate = torch.randn(2, 5, 96), torch.randn(2, 5, 96)
    mixed = x if before else x * F.silu(gate)
    normed = torch.cat([F.rms_norm(part, part.shape[-1:], eps=1e-5) for part in mixed.chunk(norm_groups, -1)], -1)
    normed = ours.norm.weight * normed
    assert_near(ours.norm(x, gate), normed * F.silu(gate) if before else normed, 1e-5)


@pytest.mark.parametrize("settings", [{}, BIASED], ids=["plain", "biased"])
def test_state_carries_over(settings: dict[str, object]) -> None:
    check_continuation(mixer(**settings))


@pytest.mark.parametrize("lengths", [[5, 1, 70, 3], [2, 2, 2]])
def test_packed_documents_are_separate(lengths: list[int]) -> None:
    check_packing(mixer(**BIASED), lengths)


@pytest.mark.parametrize("settings", [{}, BIASED], ids=["plain", "biased"])
def test_left_padding_changes_nothing(settings: dict[str, object]) -> None:
    check_padding(mixer(**settings))


def test_batch_rows_are_separate() -> None:
    check_batch(mixer())


def test_declarations_are_complete() -> None:
    check_declarations(mixer(conv_bias=False), mixer(**BIASED))


def test_low_precision_stays_in_its_dtype() -> None:
    check_low_precision(mixer())


def test_sizes_left_out_are_derived() -> None:
    spec = Mamba2Spec().resolved(128)
    assert (spec.heads, spec.norm_groups) == (4, 1)
    assert Mamba2Spec(heads=4, groups=2).resolved(128).norm_groups == 2
    assert Mamba2Spec.model_validate_json(spec.model_dump_json()) == spec
    with pytest.raises(ValueError, match=r"heads of 64 channels \(head_dim\): set heads"):
        Mamba2Spec().resolved(100)
    with pytest.raises(ValueError, match="4 groups cannot be shared among 6 heads"):
        Mamba2Spec(heads=6, groups=4).resolved(128)
    with pytest.raises(ValueError, match="384 channels, heads \\* head_dim, do not divide into 5 norm_groups"):
        Mamba2Spec(heads=6, norm_groups=5).resolved(128)
    with pytest.raises(ValueError, match=r"time_step_limit is 2.0 to 1.0"):
        Mamba2Spec(time_step_limit=(2.0, 1.0)).resolved(128)


def test_the_registry_finds_it() -> None:
    assert MIXERS["mamba2"].load() is Mamba2


def test_transfer_from_attention() -> None:
    transfer = KIND.transfer_from("attention")
    spec = check_transfer(transfer, Mamba2, conv_kernel=3)[0].spec
    assert (spec.heads, spec.groups, spec.head_dim, spec.state_size, spec.conv_kernel) == (6, 6, 10, 10, 3)
    _, plan = check_transfer(transfer, Mamba2, ATTENTION.model_copy(update={"kv_heads": 6}))
    taken = {name: start.name for name, start in plan.items() if isinstance(start, Reference)}
    assert taken == {f"{own}_proj.weight": f"{name}_proj.weight" for own, name in zip("cbxo", "qkvo", strict=True)}
    assert plan["x_conv.weight"] == LastTap(0.5)
    assert plan["x_conv.bias"] == Constant(0.0)


@pytest.mark.parametrize("wrong", [{"heads": 12}, {"groups": 2}, {"head_dim": 8}, {"state_size": 4}])
def test_transfer_refuses_other_heads(wrong: dict[str, int]) -> None:
    check_refusal(KIND.transfer_from("attention"), wrong)
