"""Drawing initialisers: the same values for the same seed, name and shape, in any order and on any machine."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch

from gearshift.plan.initialisers import (
    Constant,
    Initialiser,
    InverseSoftplusLogUniform,
    LastTap,
    LogIndex,
    LogUniform,
    Normal,
    Uniform,
)


def initialise(initialiser: Initialiser, shape: tuple[int, ...], dtype: str, seed: int, name: str) -> torch.Tensor:
    """A new CPU tensor of `shape` and `dtype`, its values drawn in float32 and rounded once.

    They depend on (seed, name, shape) alone: each tensor has its own Philox stream (Salmon et al. 2011, "Parallel
    random numbers: as easy as 1, 2, 3"), keyed by a hash of seed and name.
    """
    torch_dtype = getattr(torch, dtype)
    match initialiser:
        case Constant(value):
            return torch.full(shape, value, dtype=torch_dtype)
        case LastTap(value):
            taps = torch.zeros(shape, dtype=torch_dtype)
            taps[..., -1] = value
            return taps
        case LogIndex():
            return torch.arange(1, shape[-1] + 1).double().log().to(torch_dtype).expand(shape).contiguous()
        case _:
            values = _draw(initialiser, shape, _generator(seed, name))
            return torch.from_numpy(values).to(torch_dtype)


def _generator(seed: int, name: str) -> np.random.Generator:
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def _draw(
    initialiser: Normal | Uniform | LogUniform | InverseSoftplusLogUniform,
    shape: tuple[int, ...],
    generator: np.random.Generator,
) -> np.ndarray:
    """The values in float32; logarithms and exponentials are taken in float64."""
    match initialiser:
        case Normal(std, mean):
            values = np.asarray(generator.standard_normal(shape, dtype=np.float32))
            values *= np.float32(std)
            values += np.float32(mean)
            return values
        case Uniform(low, high):
            values = np.asarray(generator.random(shape, dtype=np.float32))
            values *= np.float32(high - low)
            values += np.float32(low)
            return values
        case LogUniform(low, high):
            values = np.log(generator.uniform(low, high, shape))
        case InverseSoftplusLogUniform(low, high, floor):
            steps = np.exp(generator.uniform(math.log(low), math.log(high), shape))
            steps = np.maximum(steps, floor)
            # softplus(x) = s solved for x as s + log(1 - exp(-s)), which stays exact for small s.
            values = steps + np.log(-np.expm1(-steps))
    return np.asarray(values, dtype=np.float32)
