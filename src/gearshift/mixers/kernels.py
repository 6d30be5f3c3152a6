"""The CUDA kernels of the packages flash-linear-attention and mamba-ssm, imported when first needed."""

import importlib
import os
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

from gearshift.mixers.footprint import stand_in

HOPPER = (9, 0)
PACKAGES = {"mamba_ssm": ("mamba-ssm", "pip install mamba-ssm --no-build-isolation")}
"""By a kernel's first module: the package that has it, and how it is installed."""
FLASH_LINEAR_ATTENTION = ("flash-linear-attention >= 0.6", 'pip install "gearshift[gpu]"')
"""The same for all other kernels."""
BROKEN_TRITON = ((3, 4, 0), (3, 7, 0))
"""From the first to the last version whose compiled gated backward is wrong on Hopper; TileLang's is used instead."""

SWITCHES = {"FLA_CONV_GLUON": "1"}
"""Faster variants of kernels that flash-linear-attention leaves off, on unless the environment says otherwise."""


def kernel(path: str) -> Any:
    """The function at `module:name`. Without its package, an ImportError that names it and says how to install it.

    Where a run is estimated, a stand-in that takes as much memory and computes nothing.
    """
    return stand_in(path) or _imported(path)


@cache
def _imported(path: str) -> Any:
    module, _, name = path.partition(":")
    for switch, value in SWITCHES.items():
        os.environ.setdefault(switch, value)
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        package, install = PACKAGES.get(module.partition(".")[0], FLASH_LINEAR_ATTENTION)
        raise ImportError(
            f"on CUDA this mixer runs on {package}, and {path} could not be imported ({error}): {install}"
        ) from error


def check_kernels(device: torch.device, learning: bool) -> None:
    """ImportError, naming the package, if what recurrent mixers need on `device` is missing or known to be wrong."""
    if device.type != "cuda":
        return
    kernel("fla.ops.gated_delta_rule:chunk_gated_delta_rule")
    if learning and gradients_are_wrong(device) and not find_spec("tilelang"):
        raise ImportError(
            "on this GPU, gradients through the gated delta rule are wrong with triton "
            f"{'.'.join(map(str, kernel_compiler()))}: install tilelang, or triton newer than 3.7.0 "
            '(pip install "gearshift[gpu]" brings tilelang)'
        )


def gradients_are_wrong(device: torch.device) -> bool:
    """Whether Triton's gradients of recurrences with one decay a head are wrong on `device`."""
    if torch.cuda.get_device_capability(device) != HOPPER:
        return False
    return BROKEN_TRITON[0] <= kernel_compiler() <= BROKEN_TRITON[1]


@cache
def kernel_compiler() -> tuple[int, ...]:
    """Triton's version; () without it."""
    try:
        version = str(importlib.import_module("triton").__version__)
    except ImportError:
        return ()
    return tuple(int(part) for part in version.split("+")[0].split(".")[:3] if part.isdigit())
