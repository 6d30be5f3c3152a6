"""The start-up check of the CUDA kernels, with the machine replaced."""

import os
from typing import Any

import pytest
import torch
from contract_cases import context

from gearshift.mixers import fused_delta_rule, kernels

CUDA = torch.device("cuda")


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(kernels, "kernel", lambda path: None)
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return monkeypatch


@pytest.mark.parametrize(
    ("version", "wrong"), [((3, 3, 1), False), ((3, 4, 0), True), ((3, 6, 0), True), ((3, 7, 1), False)]
)
def test_triton_on_hopper(hopper: pytest.MonkeyPatch, version: tuple[int, ...], wrong: bool) -> None:
    hopper.setattr(kernels, "kernel_compiler", lambda: version)
    kernels.check_kernels(CUDA, learning=False)
    if not wrong:
        kernels.check_kernels(CUDA, learning=True)
        return
    with pytest.raises(ImportError, match=r"wrong with triton 3\.\d\.0: install tilelang"):
        kernels.check_kernels(CUDA, learning=True)
    hopper.setattr(kernels, "find_spec", lambda name: object())
    kernels.check_kernels(CUDA, learning=True)


def test_a_cpu_needs_no_kernels_and_a_gpu_does() -> None:
    kernels.check_kernels(torch.device("cpu"), learning=True)
    if kernels.find_spec("fla") is None:
        with pytest.raises(ImportError, match=r'pip install "gearshift\[gpu\]"'):
            kernels.check_kernels(CUDA, learning=False)


@pytest.mark.parametrize(("given", "found"), [(None, "1"), ("0", "0")])
def test_faster_variants_are_on_unless_the_environment_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, given: str | None, found: str
) -> None:
    monkeypatch.setenv("FLA_CONV_GLUON", given or "")
    if given is None:
        monkeypatch.delenv("FLA_CONV_GLUON")
    kernels._imported.cache_clear()
    kernels._imported("math:sqrt")
    assert os.environ["FLA_CONV_GLUON"] == found


@pytest.mark.parametrize(
    ("decays", "tokens", "path", "told"),
    [
        ((2, 8), 5, "fla.ops.kda:chunk_kda", {"disable_recompute": True}),
        ((2, 8), 1, "fla.ops.kda:fused_recurrent_kda", {}),
        ((2,), 5, "fla.ops.gated_delta_rule:chunk_gated_delta_rule", {}),
    ],
)
def test_the_kernel_that_can_keep_what_it_would_compute_again_is_told(
    monkeypatch: pytest.MonkeyPatch, decays: tuple[int, ...], tokens: int, path: str, told: dict[str, bool]
) -> None:
    asked: list[dict[str, Any]] = []

    def kernel(name: str) -> Any:
        assert name == path
        return lambda **given: asked.append(given) or (given["v"], None)

    monkeypatch.setattr(fused_delta_rule, "kernel", kernel)
    heads, decay = torch.zeros(1, tokens, 2, 8), torch.zeros(1, tokens, *decays)
    about = context(tokens, recompute=False)
    with torch.no_grad():
        fused_delta_rule.fused_delta_rule(
            heads, heads, heads, decay, heads[..., 0], torch.zeros(2), decay[0, 0].flatten(), about, None
        )
    assert {key: value for key, value in asked[0].items() if "recompute" in key} == told
