"""Discrete Mamba-2 against its definition as one matrix over all tokens, and against itself in other arrangements."""

import pytest
import torch
from contract_cases import (
    HIDDEN,
    LENGTHS,
    assert_near,
    check_batch,
    check_continuation,
    check_declarations,
    check_definition,
    check_low_precision,
    check_packing,
    check_padding,
    check_refusal,
    check_transfer,
    context,
    hidden,
    randomised,
)
from torch import Tensor
from torch.nn import functional as F

from gearshift.mixers.attention import AttentionSpec
from gearshift.mixers.discrete_mamba2 import KIND, DiscreteMamba2Spec
from gearshift.mixers.discrete_mamba2.module import DiscreteMamba2
from gearshift.plan import Constant, Initialiser, LastTap, Plan, TensorInfo
from gearshift.plan.execute import MappingSource, initialise, materialise
from gearshift.spec import MIXERS

BIASED = {"projection_bias": True, "conv_bias": True}


def mixer(**settings: object) -> DiscreteMamba2:
    given = {"value_heads": 6, "key_heads": 2, "head_dim": 10, "state_size": 12, **settings}
    return randomised(DiscreteMamba2(DiscreteMamba2Spec.model_validate(given).resolved(HIDDEN), HIDDEN))


def matrix(ours: DiscreteMamba2, x: Tensor) -> Tensor:
    """The definition in float64, y = (L o (C B^T) + D) x for each head (arXiv 2408.10189), with a gate."""
    spec = ours.spec
    at = {name: parameter.double() for name, parameter in ours.named_parameters()}
    x = x.double()

    def linear(name: str, inputs: Tensor) -> Tensor:
        return F.linear(inputs, at[f"{name}_proj.weight"], at.get(f"{name}_proj.bias"))

    def heads(name: str, size: int) -> Tensor:
        padded, weight = F.pad(linear(name, x).mT, (spec.conv_kernel - 1, 0)), at[f"{name}_conv.weight"]
        mixed = F.conv1d(padded, weight, at.get(f"{name}_conv.bias"), groups=len(weight)).mT
        return (F.silu(mixed) if spec.activation == "silu" else mixed).unflatten(-1, (-1, size)).transpose(1, 2)

    values = heads("x", spec.head_dim)
    shared = [head * spec.key_heads // spec.value_heads for head in range(spec.value_heads)]
    written, read = (heads(name, spec.state_size)[:, shared] for name in ("b", "c"))
    total = -F.softplus(linear("a", x)).cumsum(1).mT
    mask = (total[..., :, None] - total[..., None, :]).tril().exp().tril()
    mixing = mask * (read @ written.mT) + torch.diag_embed(at["D"][:, None].expand(-1, x.shape[1]))
    mixed = (mixing @ values).transpose(1, 2).flatten(2)
    return linear("o", mixed * F.silu(linear("gate", x)))


@pytest.mark.parametrize(
    "settings",
    [{}, {**BIASED, "activation": "silu"}, {"key_heads": 6, "conv_kernel": 3, "conv_bias": False}],
    ids=["shared", "biased", "equal"],
)
@pytest.mark.parametrize("tokens", LENGTHS)
def test_it_is_its_definition(tokens: int, settings: dict[str, object]) -> None:
    check_definition(mixer(**settings), matrix, tokens)


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
    spec = DiscreteMamba2Spec(state_size=16).resolved(64)
    assert (spec.value_heads, spec.key_heads, spec.head_dim) == (32, 32, 2)
    with pytest.raises(ValueError, match="48 does not divide into 32 value_heads: set head_dim"):
        DiscreteMamba2Spec().resolved(48)
    with pytest.raises(ValueError, match="5 key_heads cannot be shared among 6 value_heads"):
        DiscreteMamba2Spec(value_heads=6, key_heads=5).resolved(48)


def test_the_registry_finds_it() -> None:
    assert MIXERS["discrete_mamba2"].load() is DiscreteMamba2


def test_transfer_from_attention() -> None:
    made, plan = check_transfer(KIND.transfer_from("attention"), DiscreteMamba2, conv_kernel=3)
    spec = made.spec
    assert (spec.value_heads, spec.key_heads, spec.head_dim, spec.state_size, spec.conv_kernel) == (6, 6, 10, 10, 3)
    assert plan["x_conv.weight"] == LastTap(1.0)
    gate = plan["gate_proj.bias"]
    assert isinstance(gate, Constant)
    assert F.silu(torch.tensor(gate.value)).item() == pytest.approx(1.0, abs=1e-6)


def test_a_transfer_keeps_the_channels_of_a_head_together() -> None:
    """With gates fully open and all decays one half, it is attention without softmax, head for head."""
    transfer, source = KIND.transfer_from("attention"), AttentionSpec(heads=6, kv_heads=2, head_dim=8)
    spec = transfer.infer(source, HIDDEN, {})
    ours = DiscreteMamba2(spec, HIDDEN)
    made = transfer.plan(source, spec, HIDDEN)
    rows = {"q_proj.weight": (48, HIDDEN), "k_proj.weight": (16, HIDDEN), "v_proj.weight": (16, HIDDEN)}
    given = {name: torch.randn(shape) / 7 for name, shape in (rows | {"o_proj.weight": (HIDDEN, 48)}).items()}
    shapes = {name: tuple(x.shape) for name, x in ours.named_parameters()}
    taken = {name: start for name, start in made.items() if not isinstance(start, Initialiser)}
    from_schema = {name: TensorInfo(tuple(x.shape), "float32") for name, x in given.items()}
    to_schema = {name: TensorInfo(shapes[name], "float32") for name in taken}
    weights = materialise(Plan(from_schema, to_schema, taken), MappingSource(given))
    for name, start in made.items():
        if name not in taken:
            weights[name] = initialise(start, shapes[name], "float32", 0, name)
    zeros = {name: torch.zeros(shape) for name, shape in shapes.items() if name not in weights}
    ours.load_state_dict(zeros | weights)

    x = hidden(9).detach()
    query = (x @ given["q_proj.weight"].T).unflatten(-1, (6, 8))
    key, value = ((x @ given[f"{name}_proj.weight"].T).unflatten(-1, (2, 8)) for name in "kv")
    decay = 0.5 ** (torch.arange(9)[:, None] - torch.arange(9)).clamp_min(0)
    heads = [(query[:, :, h] @ key[:, :, h // 3].mT * decay).tril() @ value[:, :, h // 3] for h in range(6)]
    expected = torch.cat(heads, -1) @ given["o_proj.weight"].T
    assert_near(ours(x, context(9)), expected, 1e-5)


@pytest.mark.parametrize("wrong", [{"value_heads": 12}, {"key_heads": 2}, {"head_dim": 8}, {"state_size": 4}])
def test_transfer_refuses_other_heads(wrong: dict[str, int]) -> None:
    check_refusal(KIND.transfer_from("attention"), wrong)
