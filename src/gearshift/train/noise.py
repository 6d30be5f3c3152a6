"""The dropout of adapters: it acts on what learns, never on what teaches, and a resumed run repeats it."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

_DOMAIN = 2
"""The top word of Philox's counter: keeps dropout apart from placements and from the data order (see `sampling`)."""


def is_noisy(model: nn.Module) -> bool:
    """Whether anything in training is random: a question of what the model is built of, so one answer serves a run."""
    return any(isinstance(module, nn.Dropout) for module in model.modules())


def set_modes(model: nn.Module) -> None:
    """Training mode for `model`, but evaluation mode for every part of it that does not learn."""
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()


@contextmanager
def seeded(device: torch.device, seed: int, step: int, slice_: int = 0) -> Iterator[None]:
    """Within, dropout depends on (seed, step, slice of the batch) alone. The generators are as before afterwards."""
    key = np.array([seed, step], dtype=np.uint64)
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        torch.manual_seed(int(np.random.Philox(key=key, counter=[0, 0, slice_, _DOMAIN]).random_raw()))
        yield
