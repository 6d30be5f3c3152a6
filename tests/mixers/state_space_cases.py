"""What the tests of the Mamba mixers share, beside `delta_cases`."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from delta_cases import assert_near, context, gradients, hidden
from torch import nn

from gearshift.mixers.attention import AttentionSpec
from gearshift.mixers.base import Mixer, Transfer
from gearshift.plan import Initialiser, TensorInfo, infer

LENGTHS = [1, 63, 64, 65, 200]


def copied(ours: Mixer, theirs: nn.Module, names: Mapping[str, Sequence[str]]) -> nn.Module:
    """`theirs` with our weights: each of its parameters is the concatenation of the named ones of ours."""
    weights = ours.state_dict()
    assert {part for name, _ in theirs.named_parameters() for part in names.get(name, [name])} == set(weights)
    for name, parameter in theirs.named_parameters():
        made = torch.cat([weights[part] for part in names.get(name, [name])])
        assert made.shape == parameter.shape, name
        parameter.data = made.clone()
    return theirs.eval()


def check_agreement(ours: Mixer, theirs: nn.Module, names: Mapping[str, Sequence[str]], tokens: int) -> None:
    """The outputs and every gradient of two modules with the same weights."""
    x = hidden(tokens, batch=2)
    here, there = ours(x, context(tokens, batch=2)), theirs(x)
    assert_near(here, there, 1e-4, "output")
    own = gradients(here, {"hidden": x, **dict(ours.named_parameters())})
    for name, expected in gradients(there, {"hidden": x, **dict(theirs.named_parameters())}).items():
        assert_near(torch.cat([own[part] for part in names.get(name, [name])]), expected, 1e-4, name)


def check_names(mixers: Iterable[Mixer]) -> None:
    """Initialisers name exactly the parameters, and the sharding those that some setting brings about."""
    seen: set[str] = set()
    for mixer in mixers:
        names = set(dict(mixer.named_parameters()))
        assert set(type(mixer).initialisers(mixer.spec, mixer.hidden_size)) == names
        seen |= names
    assert seen == set(mixer.sharding)


def check_transfer(transfer: Transfer, module: type[Mixer], size: int, given: Mapping[str, object]) -> Mixer:
    """A mixer with weights from random grouped-query attention, its shapes those that the plan makes."""
    source = AttentionSpec(heads=6, kv_heads=2, head_dim=8).resolved(size)
    target = transfer.infer(source, size, given)
    schema = {f"{name}_proj.weight": TensorInfo((rows, size), "float32") for name, rows in (("q", 48), *KV)}
    schema["o_proj.weight"] = TensorInfo((size, 48), "float32")
    made = module(target, size)
    shapes = {name: tuple(x.shape) for name, x in made.named_parameters()}
    for name, expression in transfer.plan(source, target, size).items():
        assert name in shapes, name
        if not isinstance(expression, Initialiser):
            assert infer(expression, schema).shape == shapes[name], name
    return made


KV = (("k", 16), ("v", 16))
