"""The start-up check of the CUDA kernels, with the machine replaced."""

import pytest
import torch

from gearshift.mixers import kernels

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
