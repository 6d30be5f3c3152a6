"""The contract of a mixer as checks, and the small tools that the tests of mixers share."""

import copy
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gearshift.mixers.attention import AttentionSpec
from gearshift.mixers.base import MixContext, Mixer, MixerState, Transfer
from gearshift.plan import Initialiser, TensorInfo, infer
from gearshift.spec.parts import TOKENS

HIDDEN = 48
LENGTHS = [1, 63, 64, 65, 200]
"""Around the size of a chunk."""
ATTENTION = AttentionSpec(heads=6, kv_heads=2, head_dim=10)
"""What transfers start from: grouped queries, and other than `HIDDEN` channels in its heads."""


def context(tokens: int, past: int = 0, batch: int = 1, **more: object) -> MixContext:
    positions = (past + torch.arange(tokens)).expand(batch, tokens)
    return MixContext(positions, past=past, **more)


def packed(lengths: Sequence[int]) -> MixContext:
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return MixContext(positions, cu_seqlens=F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int())


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Weights large enough that every gate, decay and norm matters."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 2:
            parameter.data = 1.5 * noise / parameter.shape[1] ** 0.5
        else:
            parameter.data = 0.5 * noise + (1.0 if "norm" in name else 0.0)
    return module


def hidden(tokens: int, batch: int = 1, size: int = HIDDEN, seed: int = 1) -> Tensor:
    return torch.randn(batch, tokens, size, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def gradients(output: Tensor, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of a fixed random projection of `output`, the same in every dtype, with respect to every wanted tensor."""
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).bfloat16().to(output)
    return dict(zip(wanted, torch.autograd.grad((output * weights).sum(), list(wanted.values())), strict=True))


def assert_near(actual: Tensor, expected: Tensor, tolerance: float, what: str = "") -> None:
    """Within `tolerance` of each other, relative and in norm."""
    assert actual.shape == expected.shape, what
    assert actual.isfinite().all(), what
    error = (actual.detach().double() - expected.detach().double()).norm()
    scale = expected.detach().double().norm().clamp_min(1e-8)
    assert error <= tolerance * scale, f"{what}: relative error {error / scale:.2e}"


def check_recurrence(
    actual: Sequence[Tensor], expected: Sequence[Tensor], inputs: Mapping[str, Tensor], tolerance: float
) -> None:
    """Two runs of a recurrence agree: outputs, last states, and the gradients of their squares for every input."""
    for what, a, e in zip(("output", "state"), actual, expected, strict=True):
        assert_near(a, e, tolerance, what)
    made = list(inputs.values())
    found, wanted = (torch.autograd.grad(sum(x.square().sum() for x in run), made) for run in (actual, expected))
    for name, a, e in zip(inputs, found, wanted, strict=True):
        assert_near(a, e, tolerance, name)


def check_definition(ours: Mixer, definition: Callable[[Mixer, Tensor], Tensor], tokens: int) -> None:
    """The outputs and every gradient are those of `definition(ours, hidden)`, written with our parameters."""
    x = hidden(tokens, batch=2)
    here, there = ours(x, context(tokens, batch=2)), definition(ours, x)
    assert_near(here, there, 1e-4, "output")
    wanted = {"hidden": x, **dict(ours.named_parameters())}
    expected = gradients(there, wanted)
    for name, gradient in gradients(here, wanted).items():
        assert_near(gradient, expected[name], 1e-4, name)


def check_agreement(
    ours: Mixer,
    theirs: nn.Module,
    names: Mapping[str, Sequence[str]],
    tokens: int,
    tolerance: float = 1e-4,
    run: Callable[[nn.Module, Tensor], Tensor] = nn.Module.__call__,
) -> None:
    """The outputs and every gradient are those of another implementation, which gets our weights.

    Each parameter of theirs is the concatenation of those of ours that `names` lists for it; of the one of its own name
    if it lists none. `run` calls theirs on hidden states [batch, tokens, hidden].
    """
    weights = ours.state_dict()
    parts = {name: names.get(name, [name]) for name, _ in theirs.named_parameters()}
    assert {part for name in parts for part in parts[name]} == set(weights)
    for name, parameter in theirs.named_parameters():
        made = torch.cat([weights[part] for part in parts[name]])
        assert made.squeeze().shape == parameter.squeeze().shape, name
        parameter.data = made.clone().view_as(parameter)
    x = hidden(tokens, batch=2)
    here, there = ours(x, context(tokens, batch=2)), run(theirs.eval(), x)
    assert_near(here, there, tolerance, "output")
    found = gradients(here, {"hidden": x, **dict(ours.named_parameters())})
    expected = gradients(there, {"hidden": x, **dict(theirs.named_parameters())})
    assert_near(found["hidden"], expected.pop("hidden"), tolerance, "hidden")
    for name, gradient in expected.items():
        made = torch.cat([found[part] for part in parts[name]])
        assert_near(made.view_as(gradient), gradient, tolerance, name)


def run_in_parts(mixer: Mixer, x: Tensor, lengths: Sequence[int]) -> tuple[Tensor, MixerState]:
    """The outputs for `x` [batch, tokens, hidden] taken in parts of `lengths` tokens with a cache, and that cache."""
    state, parts, past = MixerState(mixer.spec.state()), [], 0
    for part in x.split(list(lengths), 1):
        parts.append(mixer(part, context(part.shape[1], past, len(x)), state))
        past += part.shape[1]
    return torch.cat(parts, 1), state


def check_continuation(mixer: Mixer, tokens: int = 75, batch: int = 2) -> MixerState:
    """Prefill, single steps and a second prefill give what one pass gives, and leave what is declared behind."""
    x = hidden(tokens, batch)
    with torch.no_grad():
        whole = mixer(x, context(tokens, batch=batch))
        parts, state = run_in_parts(mixer, x, (2, 1, 1, 33, 1, tokens - 38))
    assert_near(parts, whole, 1e-5)
    assert set(state.tensors) == {declared.name for declared in mixer.spec.state()}
    for declared in mixer.spec.state():
        shape = tuple(tokens if size == TOKENS else size for size in declared.shape)
        assert state[declared.name].shape == (batch, *shape)
        assert state[declared.name].dtype == torch.float32
    return state


def check_packing(mixer: Mixer, lengths: Sequence[int]) -> None:
    """Packed documents give the outputs and the gradients of separate ones."""
    x = hidden(sum(lengths))
    wanted = {"hidden": x, **dict(mixer.named_parameters())}
    together = mixer(x, packed(lengths))
    apart = torch.cat([mixer(part, context(part.shape[1])) for part in x.split(list(lengths), 1)], 1)
    assert_near(together, apart, 1e-5, "outputs")
    expected = gradients(apart, wanted)
    for name, gradient in gradients(together, wanted).items():
        assert_near(gradient, expected[name], 2e-5, name)


def check_padding(mixer: Mixer, tokens: int = 41, pads: int = 7) -> None:
    """Left padding, whatever it holds, changes nothing, with a cache and without one."""
    x = hidden(tokens + 1)
    padding = (torch.arange(pads + tokens) >= pads)[None]
    padded = torch.cat((hidden(pads, seed=9), x[:, :tokens]), 1)
    with torch.no_grad():
        alone = mixer(x, context(tokens + 1))
        state = MixerState(mixer.spec.state())
        first = mixer(padded, context(pads + tokens, padding=padding), state)
        step = context(1, past=pads + tokens, padding=F.pad(padding, (0, 1), value=True))
        second = mixer(x[:, tokens:], step, state)
        uncached = mixer(padded, context(pads + tokens, padding=padding))
    assert_near(torch.cat((first[:, pads:], second), 1), alone, 1e-5)
    assert_near(uncached[:, pads:], alone[:, :tokens], 1e-5)


def check_batch(mixer: Mixer, tokens: int = 37) -> None:
    """The sequences of a batch do not see each other."""
    x = hidden(tokens, batch=3)
    with torch.no_grad():
        together = mixer(x, context(tokens, batch=3))
        for row in range(3):
            assert_near(together[row : row + 1], mixer(x[row : row + 1], context(tokens)), 1e-5)


def check_low_precision(mixer: Mixer, tokens: int = 70) -> None:
    """In bfloat16 a mixer stays in bfloat16, and near to what it gives in float32."""
    x = hidden(tokens).detach()
    output = copy.deepcopy(mixer).bfloat16()(x.bfloat16(), context(tokens))
    assert output.dtype == torch.bfloat16
    assert_near(output, mixer(x, context(tokens)), 5e-2)


def check_declarations(*mixers: Mixer) -> None:
    """Initialisers name exactly the parameters, and the sharding those that some of the settings bring about."""
    seen: set[str] = set()
    for mixer in mixers:
        names = set(dict(mixer.named_parameters()))
        assert set(type(mixer).initialisers(mixer.spec, mixer.hidden_size)) == names
        seen |= names
    assert seen == set(mixers[0].sharding)


def check_transfer(
    transfer: Transfer, module: type[Mixer], source: AttentionSpec = ATTENTION, **given: object
) -> tuple[Mixer, Mapping[str, object]]:
    """A mixer with the sizes that `source` and the settings given lead to, and its plan, whose shapes are checked."""
    source = source.resolved(HIDDEN)
    channels = {"q": source.heads, "k": source.kv_heads, "v": source.kv_heads}
    shapes = {f"{name}_proj.weight": (heads * source.head_dim, HIDDEN) for name, heads in channels.items()}
    shapes["o_proj.weight"] = (HIDDEN, source.heads * source.head_dim)
    schema = {name: TensorInfo(shape, "float32") for name, shape in shapes.items()}
    target = transfer.infer(source, HIDDEN, given)
    made, plan = module(target, HIDDEN), transfer.plan(source, target, HIDDEN)
    parameters = dict(made.named_parameters())
    for name, expression in plan.items():
        assert name in parameters, name
        if not isinstance(expression, Initialiser):
            assert infer(expression, schema).shape == tuple(parameters[name].shape), name
    return made, plan


def check_refusal(transfer: Transfer, wrong: Mapping[str, int]) -> None:
    """A size that attention's weights cannot start is refused, by its name and value."""
    source = ATTENTION.resolved(HIDDEN)
    target = transfer.infer(source, HIDDEN, wrong)
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name} {value} cannot start from"):
        transfer.plan(source, target, HIDDEN)
