"""The steps of a block, as training takes them: compiled or as they are.

What stands between a mixer's core (a recurrence's kernels, an attention function) and the next one is compiled as a
whole: norms, projections, rotations, gates, residuals and the MLP, forwards and backwards. Cores run as they are.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gearshift.mixers.base import MixContext, Mixer
from gearshift.model.block import Block
from gearshift.train.losses import activation_error

VARIANTS = 128
"""Compiled variants of one step: one for each kind of mixer, with and without gradients, and for each shape."""


class BlockSteps:
    """A block in steps. All hidden states and outputs are [batch, tokens, hidden]."""

    def __init__(self, compiled: bool):
        """With `compiled`, through torch.compile: for fixed shapes, once for all layers of the same kind."""
        self.compiled = compiled
        if compiled:
            # Beyond its limit torch.compile goes on uncompiled, which is never what was asked for here.
            torch._dynamo.config.recompile_limit = max(VARIANTS, torch._dynamo.config.recompile_limit)
            torch._dynamo.config.accumulated_recompile_limit = max(
                8 * VARIANTS, torch._dynamo.config.accumulated_recompile_limit
            )
        made = partial(torch.compile, dynamic=False) if compiled else _as_it_is
        self._enter, self._leave = made(_enter), made(_leave)
        self._norm, self._project, self._error = made(_norm), made(_project), made(_error)

    def run(self, block: Block, name: str, hidden: Tensor, context: MixContext) -> tuple[Tensor, Tensor]:
        """The output of the mixer called `name`, and what the next block reads."""
        mixer = block.mixer_named(name)
        mixer.prepare(context, hidden.dtype)
        result = mixer.core(self._enter(block, mixer, hidden, context), context, None)
        return self._leave(block, mixer, hidden, result)

    def norm(self, block: Block, hidden: Tensor) -> Tensor:
        """What the block's mixers read."""
        return self._norm(block, hidden)

    def core(self, mixer: Mixer, normed: Tensor, context: MixContext) -> Any:
        """The result of the mixer's core, from what it reads."""
        mixer.prepare(context, normed.dtype)
        return mixer.core(self._project(mixer, normed, context), context, None)

    def leave(self, block: Block, mixer: Mixer, hidden: Tensor, result: Any) -> tuple[Tensor, Tensor]:
        """The mixer's output, and what the next block reads."""
        return self._leave(block, mixer, hidden, result)

    def error(self, mixer: Mixer, result: Any, target: Tensor, rows: int) -> Tensor:
        """The normalised error of the mixer's output, both cut into `rows` sequences if they are packed."""
        return self._error(mixer, result, target, rows)


def _as_it_is(step: Callable[..., Any]) -> Callable[..., Any]:
    return step


def _enter(block: Block, mixer: Mixer, hidden: Tensor, context: MixContext) -> Any:
    return mixer.project(block.mixer_norm(hidden), context)


def _norm(block: Block, hidden: Tensor) -> Tensor:
    return block.mixer_norm(hidden)


def _project(mixer: Mixer, normed: Tensor, context: MixContext) -> Any:
    return mixer.project(normed, context)


def _leave(block: Block, mixer: Mixer, hidden: Tensor, result: Any) -> tuple[Tensor, Tensor]:
    output = mixer.output(result)
    return output, block.feed(block.add_mixed(hidden, output))


def _error(mixer: Mixer, result: Any, target: Tensor, rows: int) -> Tensor:
    output, target = (x.reshape(rows, -1, x.shape[-1]) for x in (mixer.output(result), target))
    return activation_error(output, target)
