"""The mixture of experts on CUDA, through each of transformers' functions for experts, against the CPU."""

from types import SimpleNamespace

import pytest
import torch
from test_mixture_of_experts import CASES, HIDDEN, mixture

pytestmark = pytest.mark.gpu
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize(
    ("implementation", "dtype"),
    [
        ("eager", torch.float32),
        ("batched_mm", torch.float32),
        ("eager", torch.bfloat16),
        ("grouped_mm", torch.bfloat16),
    ],
    ids=str,
)
def test_outputs_and_gradients(name: str, implementation: str, dtype: torch.dtype) -> None:
    settings = {**CASES[name][0], "intermediate_size": 32}  # grouped_mm wants rows of 16 bytes
    there, here = mixture(settings), mixture(settings)
    for parameter in (*there.parameters(), *here.parameters()):
        parameter.data = parameter.data.to(dtype).float()
    here = here.to("cuda", dtype)
    here.configure(SimpleNamespace(_experts_implementation=implementation))
    hidden = torch.randn(2, 40, HIDDEN, generator=torch.Generator().manual_seed(1)).to(dtype)
    chosen = there.router(hidden.float().flatten(0, 1))[0].sort().values
    found = here.router(hidden.cuda().flatten(0, 1))[0].cpu().sort().values
    # Rounded logits can tie: tokens that bfloat16 sends to other experts are another function's.
    same = (chosen == found).all(-1)
    assert same.float().mean() >= (1.0 if dtype == torch.float32 else 0.9)
    hidden = hidden.flatten(0, 1)[same][None]
    ours, theirs = hidden.cuda().requires_grad_(), hidden.float().requires_grad_()
    actual, expected = here(ours), there(theirs)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    (actual * weights.cuda()).sum().backward()
    (expected * weights.float()).sum().backward()
    pairs = {"output": (actual, expected), "hidden": (ours.grad, theirs.grad)}
    wanted = dict(there.named_parameters())
    pairs |= {n: (p.grad, wanted[n].grad) for n, p in here.named_parameters() if p.requires_grad}
    for what, (result, reference) in pairs.items():
        assert result is not None, what
        assert reference is not None, what
        error = (result.cpu().float() - reference).norm() / reference.norm()
        assert error <= TOLERANCES[dtype], f"{what}: {error:.2e}"
