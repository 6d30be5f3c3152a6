"""Tensor parallelism: within a unit (a mixer, an MLP), every process computes with its heads or channels alone.

Its parameters are DTensors, so that FSDP, checkpoints and optimisers see the whole of them; where the module's code
reads one, it gets this process's slice.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from gearshift.mixers.base import Mixer
from gearshift.model import GearshiftForCausalLM
from gearshift.model.block import Block


def check_splits(model: GearshiftForCausalLM, ways: int) -> None:
    """ValueError, in a sentence, if a unit of `model` cannot be split `ways` ways."""
    for name, block in model.named_modules():
        if not isinstance(block, Block):
            continue
        if block.spec.lora is not None:
            raise ValueError(f"{name} has LoRA adapters, which tensor parallelism does not split: set tensor to 1")
        for mixer in block.spec.mixers:
            _check_split(f"{name}: the mixer {mixer!r}", block.spec.mixers[mixer], block.mixer_named(mixer), ways)
        _check_split(f"{name}: the MLP", block.spec.mlp, block.mlp, ways)


def _check_split(where: str, spec: Any, unit: nn.Module, ways: int) -> None:
    try:
        sizes = spec.splits()
    except ValueError as error:
        raise ValueError(f"{where} ({spec.type}) cannot be split: {error}; set tensor to 1") from None
    table: Mapping[str, str] = getattr(unit, "sharding", {})
    if missing := [name for name, _ in unit.named_parameters() if name not in table]:
        raise ValueError(f"{where} ({spec.type}) does not say how to split {missing[0]!r}: set tensor to 1")
    for name, size in sizes.items():
        if size % ways:
            raise ValueError(f"{where} has {name} {size}, which does not divide by tensor {ways}")


def split(unit: nn.Module, mesh: DeviceMesh) -> None:
    """Leave this process its slice of a unit's parameters, and make the unit compute with it."""
    placements: dict[str, Placement] = {"column": Shard(0), "row": Shard(1), "replicated": Replicate()}
    sharding: Mapping[str, str] = unit.sharding  # type: ignore[assignment]
    for path, module in unit.named_modules():
        own = [name for name, _ in module.named_parameters(recurse=False)]
        table = {name: sharding[f"{path}.{name}".lstrip(".")] for name in own}
        for name, way in table.items():
            parameter = module.get_parameter(name)
            spread = distribute_tensor(parameter.data, mesh, [placements[way]], src_data_rank=None)
            module.register_parameter(name, nn.Parameter(spread, requires_grad=parameter.requires_grad))
        if table or module is unit:
            entry = None if module is not unit else "project" if isinstance(unit, Mixer) else "forward"
            leaves = path == "o_proj" or not isinstance(unit, Mixer)
            reduces = "row" in table.values()
            module.__class__ = _split_class(type(module), tuple(own), mesh, entry, reduces, leaves)  # type: ignore[arg-type]


@cache
def _split_class(
    kind: type[nn.Module], names: tuple[str, ...], mesh: DeviceMesh, entry: str | None, reduces: bool, leaves: bool
) -> type[nn.Module]:
    """A class like `kind` whose instances hold DTensors and compute with their slices.

    Args:
        kind: the class of a unit or of a module within one.
        names: its own parameters.
        mesh: over which they are split.
        entry: the method through which hidden states enter the unit, if it is one.
        reduces: whether its outputs are summands of the result, one on each process.
        leaves: whether that result leaves the unit.
    """
    ways = mesh.size()

    def local(name: str) -> property:
        def get(module: nn.Module) -> Tensor | None:
            parameter = module._parameters[name]
            if not isinstance(parameter, DTensor) or parameter.device_mesh.ndim > 1:
                return parameter  # in shards: not gathered, and so not to compute with
            whole = parameter.placements[0].is_replicate()
            # What is whole meets the heads of one process here, so its gradient here is a summand.
            view = parameter.to_local(grad_placements=[Partial()] if whole else parameter.placements)
            return view / ways if reduces and whole else view

        return property(get)

    members: dict[str, Any] = {name: local(name) for name in names}
    if entry is not None:
        base = getattr(kind, entry)

        def enter(self: nn.Module, hidden: Tensor, *rest: Any, **more: Any) -> Any:
            return base(self, _Entered.apply(hidden, mesh), *rest, **more)

        members[entry] = enter
    if reduces:

        def forward(self: nn.Module, hidden: Tensor) -> Tensor:
            result = _Reduced.apply(kind.forward(self, hidden), mesh)
            return result if leaves else _Entered.apply(result, mesh)

        members["forward"] = forward
    return type(f"Split{kind.__name__}", (kind,), members)


class _Entered(torch.autograd.Function):
    """Hidden states as they are; their gradients, of which each process has a summand, are added up."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, mesh: DeviceMesh) -> Tensor:
        ctx.mesh = mesh
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return summed(gradients[0], ctx.mesh), None


class _Reduced(torch.autograd.Function):
    """The sum of what the processes have; its gradient, which every process has, as it is."""

    @staticmethod
    def forward(ctx: Any, summand: Tensor, mesh: DeviceMesh) -> Tensor:
        return summed(summand, mesh)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def summed(values: Tensor, mesh: DeviceMesh | None = None) -> Tensor:
    """The sum over the processes of a mesh of one dimension, else over all."""
    values = values.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(values, group=None if mesh is None else mesh.get_group())
    return values
