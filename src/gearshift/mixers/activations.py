"""Activations by transformers' names."""

from difflib import get_close_matches

from torch import nn
from transformers.activations import ACT2FN


def activation(name: str) -> nn.Module:
    """The activation called `name`. ValueError with the nearest names if transformers has none."""
    if name not in ACT2FN:
        near = get_close_matches(name, ACT2FN)
        raise ValueError(f"unknown activation {name!r}: {f'did you mean {near[0]!r}?' if near else 'see ACT2FN'}")
    return ACT2FN[name]
