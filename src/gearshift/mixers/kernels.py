"""The CUDA kernels of the package flash-linear-attention, imported when first needed."""

import importlib
from functools import cache
from typing import Any


@cache
def kernel(path: str) -> Any:
    """The function at `module:name` in flash-linear-attention. ImportError that says what to install without it."""
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"on CUDA the recurrent mixers run on flash-linear-attention >= 0.6, and {path} could not be imported "
            f'({error}): pip install "gearshift[gpu]"'
        ) from error
