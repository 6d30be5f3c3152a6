"""What the tests of the two delta-rule mixers share."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gearshift.mixers.base import MixContext, Mixer, MixerState

HIDDEN = 48


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


def check_continuation(mixer: Mixer, tokens: int = 75, batch: int = 2) -> None:
    """Prefill, single steps and a second prefill give what one pass gives, and leave declared shapes behind."""
    x = hidden(tokens, batch)
    with torch.no_grad():
        whole = mixer(x, context(tokens, batch=batch))
        state, parts, past = MixerState(mixer.spec.state()), [], 0
        for length in (2, 1, 1, 33, 1, tokens - 38):
            step = context(length, past, batch)
            parts.append(mixer(x[:, past : past + length], step, state))
            past += length
    assert_near(torch.cat(parts, 1), whole, 1e-5)
    for declared in mixer.spec.state():
        assert state[declared.name].shape == (batch, *declared.shape)
        assert state[declared.name].dtype == torch.float32


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


def check_declarations(mixer: Mixer) -> None:
    """Initialisers and sharding name exactly the parameters."""
    names = set(dict(mixer.named_parameters()))
    assert set(type(mixer).initialisers(mixer.spec, mixer.hidden_size)) == names
    assert set(mixer.sharding) == names
