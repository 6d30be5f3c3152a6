"""The steps of a block, as training takes them: compiled or as they are.

What stands between a mixer's core (a recurrence's kernels, an attention function) and the next one is compiled as a
whole: norms, projections, rotations, gates, residuals and the MLP, forwards and backwards. Cores run as they are.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gearshift.mixers.base import MixContext, Mixer
from gearshift.model.block import Block
from gearshift.train.losses import activation_error

VARIANTS = 128
"""Compiled variants of one step: one for each kind of mixer, with and without gradients, and for each shape."""


class BlockSteps:
    """A block in steps, as its modules are. All hidden states and outputs are [batch, tokens, hidden]."""

    compiled = False

    def run(self, block: Block, name: str, hidden: Tensor, context: MixContext) -> tuple[Tensor, Tensor]:
        """The output of the mixer called `name`, and what the next block reads."""
        return self.teach(block, name, hidden, self.norm(block, hidden), context)

    def norm(self, block: Block, hidden: Tensor) -> Tensor:
        """What the block's mixers read."""
        return block.mixer_norm(hidden)

    def teach(
        self, block: Block, name: str, hidden: Tensor, normed: Tensor, context: MixContext
    ) -> tuple[Tensor, Tensor]:
        """As `run`, from `normed`, what the mixer reads of `hidden`."""
        output = block.mixer_named(name)(normed, context)
        return output, block.feed(block.add_mixed(hidden, output))

    def mix(self, mixer: Mixer, normed: Tensor, context: MixContext) -> Tensor:
        """The output of a mixer."""
        return mixer(normed, context)

    def feed(self, block: Block, hidden: Tensor, output: Tensor) -> Tensor:
        """What the next block reads, from what this one reads and its mixer's output."""
        return block.feed(block.add_mixed(hidden, output))

    def enter(self, block: Block, mixer: Mixer, hidden: Tensor, context: MixContext) -> Any:
        """What the core of a mixer reads."""
        return _enter(mixer, block, hidden, context)

    def leave(self, block: Block, mixer: Mixer, hidden: Tensor, result: Any) -> Tensor:
        """What the block's second half reads, from what the block reads and the result of the mixer's core."""
        return _first_half(mixer, block, hidden, result)

    def second_half(self, block: Block, hidden: Tensor) -> Tensor:
        """What the next block reads."""
        return _second_half(block, hidden)

    def pull_back(self, block: Block, hidden: Tensor, upstream: Tensor) -> Tensor:
        """The gradient of what the second half reads, `hidden`, from that of what the next block reads."""
        return _pull_back(block, hidden, upstream)

    def error(self, output: Tensor, target: Tensor, rows: int) -> Tensor:
        """The normalised error of a mixer's output, `rows` sequences that may be packed into one."""
        return _error(output, target, rows)


class CompiledSteps(BlockSteps):
    """The same through torch.compile: for fixed shapes, once for all layers of a kind, everything but mixers' cores."""

    compiled = True

    def __init__(self, within: Callable[..., Any]) -> None:
        """`within(unit, work, *given)` is `work(unit, *given)`, the parameters of a mixer or an MLP at hand."""
        # Beyond its limit torch.compile goes on uncompiled, which is never what was asked for here.
        config = torch._dynamo.config
        config.recompile_limit = max(VARIANTS, config.recompile_limit)
        config.accumulated_recompile_limit = max(8 * VARIANTS, config.accumulated_recompile_limit)
        self._within = within
        made = partial(torch.compile, dynamic=False)
        self._enter, self._norm, self._project = made(_enter), made(_norm), made(_project)
        self._leave, self._output, self._add = made(_leave), made(_output), made(_add)
        self._feed, self._error = made(_feed), made(_error)
        self._first_half, self._second_half, self._pull_back = map(made, (_first_half, _second_half, _pull_back))

    def run(self, block: Block, name: str, hidden: Tensor, context: MixContext) -> tuple[Tensor, Tensor]:
        return self._fed(block, *self._within(block.mixer_named(name), self._run, block, hidden, context))

    def norm(self, block: Block, hidden: Tensor) -> Tensor:
        return self._norm(block, hidden)

    def teach(
        self, block: Block, name: str, hidden: Tensor, normed: Tensor, context: MixContext
    ) -> tuple[Tensor, Tensor]:
        return self._fed(block, *self._within(block.mixer_named(name), self._teach, block, hidden, normed, context))

    def mix(self, mixer: Mixer, normed: Tensor, context: MixContext) -> Tensor:
        return self._within(mixer, self._mix, normed, context)

    def feed(self, block: Block, hidden: Tensor, output: Tensor) -> Tensor:
        return self._fed(block, *self._add(block, hidden, output))[1]

    def enter(self, block: Block, mixer: Mixer, hidden: Tensor, context: MixContext) -> Any:
        mixer.prepare(context, hidden.dtype)
        return self._enter(mixer, block, hidden, context)

    def leave(self, block: Block, mixer: Mixer, hidden: Tensor, result: Any) -> Tensor:
        return self._first_half(mixer, block, hidden, result)

    def second_half(self, block: Block, hidden: Tensor) -> Tensor:
        return self._second_half(block, hidden)

    def pull_back(self, block: Block, hidden: Tensor, upstream: Tensor) -> Tensor:
        return self._pull_back(block, hidden, upstream)

    def error(self, output: Tensor, target: Tensor, rows: int) -> Tensor:
        return self._error(output, target, rows)

    def _fed(self, block: Block, output: Tensor, hidden: Tensor, read: Tensor) -> tuple[Tensor, Tensor]:
        return output, self._within(block.mlp, self._feed, block, hidden, read)

    def _run(self, mixer: Mixer, block: Block, hidden: Tensor, context: MixContext) -> tuple[Tensor, Tensor, Tensor]:
        result = mixer.core(self.enter(block, mixer, hidden, context), context, None)
        return self._leave(mixer, block, hidden, result)

    def _teach(
        self, mixer: Mixer, block: Block, hidden: Tensor, normed: Tensor, context: MixContext
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self._leave(mixer, block, hidden, self._core(mixer, normed, context))

    def _mix(self, mixer: Mixer, normed: Tensor, context: MixContext) -> Tensor:
        return self._output(mixer, self._core(mixer, normed, context))

    def _core(self, mixer: Mixer, normed: Tensor, context: MixContext) -> Any:
        mixer.prepare(context, normed.dtype)
        return mixer.core(self._project(mixer, normed, context), context, None)


def _enter(mixer: Mixer, block: Block, hidden: Tensor, context: MixContext) -> Any:
    return _project(mixer, block.mixer_norm(hidden), context)


def _norm(block: Block, hidden: Tensor) -> Tensor:
    return block.mixer_norm(hidden)


def _project(mixer: Mixer, normed: Tensor, context: MixContext) -> Any:
    return mixer.project(normed, context)


def _output(mixer: Mixer, result: Any) -> Tensor:
    return mixer.output(result)


def _leave(mixer: Mixer, block: Block, hidden: Tensor, result: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _add(block, hidden, mixer.output(result))


def _add(block: Block, hidden: Tensor, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The mixer's output, the hidden states with it, and what the MLP reads of them."""
    hidden = block.add_mixed(hidden, output)
    return output, hidden, block.mlp_norm(hidden)


def _first_half(mixer: Mixer, block: Block, hidden: Tensor, result: Any) -> Tensor:
    return block.add_mixed(hidden, mixer.output(result))


def _second_half(block: Block, hidden: Tensor) -> Tensor:
    return block.feed(hidden)


def _pull_back(block: Block, hidden: Tensor, upstream: Tensor) -> Tensor:
    with torch.no_grad():  # of the parameters
        return torch.func.vjp(block.feed, hidden)[1](upstream)[0]


def _feed(mlp: nn.Module, block: Block, hidden: Tensor, read: Tensor) -> Tensor:
    # Not called as a module, for what FSDP hangs on a unit's call is not to be compiled.
    return block.add_fed(hidden, mlp.forward(read))


def _error(output: Tensor, target: Tensor, rows: int) -> Tensor:
    return activation_error(*(x.reshape(rows, -1, x.shape[-1]) for x in (output, target)))
