"""Many processes: FSDP2 over slices of the data, and tensor parallelism within each of its units."""

from collections.abc import Callable, Iterable, Sequence
from itertools import chain, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
    share_comm_ctx,
)
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from gearshift.model import GearshiftForCausalLM
from gearshift.model.block import Block, StochasticMixer
from gearshift.spec import Placement
from gearshift.train.parallel.base import ALONE, Gradients, Parallel, T
from gearshift.train.parallel.copies import Copies
from gearshift.train.parallel.group import Group
from gearshift.train.parallel.split import check_splits, split, summed
from gearshift.train.recipe import ParallelSettings


class Shards(Group):
    """The processes of one torchrun, in a mesh of copies, shards and slices of tensors."""

    recordable = False

    def __init__(self, sizes: tuple[int, int, int], device: torch.device):
        """`sizes`: how many copies, shards of a copy and slices of a tensor."""
        # Slices of one tensor are neighbours: they have the most to tell each other.
        self.mesh = init_device_mesh(device.type, sizes, mesh_dim_names=("copy", "shard", "tensor"))
        self.tensor: DeviceMesh = self.mesh["tensor"]
        super().__init__(sharing=self.tensor.size())
        self.compilable = self.tensor.size() == 1
        self._units: list[FSDPModule] = []

    def place(self, model: GearshiftForCausalLM, device: torch.device, half: bool) -> None:
        if self.tensor.size() > 1:
            check_splits(model, self.tensor.size())
        mesh = self.mesh["copy", "shard"] if self.mesh["copy"].size() > 1 else self.mesh["shard"]
        units = _units(model)
        for unit in units:
            unit.to(device=device, dtype=torch.float32)
            if self.tensor.size() > 1:
                split(unit, self.tensor)
            fully_shard(unit, mesh=mesh, reshard_after_forward=True, mp_policy=_precision(unit, half))
        inside = {id(parameter) for unit in units for parameter in unit.parameters()}
        for parameter in model.parameters():
            if id(parameter) not in inside:
                parameter.data = parameter.data.to(device, torch.float32)
        for buffer in model.buffers():
            buffer.data = buffer.data.to(device)
        sharded = [unit for unit in units if isinstance(unit, FSDPModule)]
        share_comm_ctx([*sharded])
        for unit in sharded:
            _prepare(unit)
        self._units += sharded

    def within(self, unit: Any, work: Callable[..., T], *given: Any) -> T:
        return unit.within(work, *given)

    def expect(
        self, model: GearshiftForCausalLM, teacher: GearshiftForCausalLM, placement: Placement | None, deep: bool
    ) -> None:
        blocks, taught_by = model.model.blocks, teacher.model.blocks
        shared = len(set(blocks)) < len(blocks) or len(set(taught_by)) < len(taught_by)
        students: dict[Block, list[Any]] = {
            block: [] if shared or deep else list(block.learning.values()) for block in blocks
        }
        _expect_backward(self._units, [mixer for mixers in students.values() for mixer in mixers])
        if shared or (placement is not None and not deep):
            return  # a unit that runs twice has two that come behind it
        # What is fetched ahead is run next, or does not learn: left over, it would be old after the step.
        walk: list[Any]
        if placement is None:
            walk = []
            for block, student_block in zip(taught_by, blocks, strict=True):
                walk += [block.mixer_named(block.spec.main), block.mlp, *students[student_block]]
            for part, following in pairwise(walk):
                part.set_modules_to_forward_prefetch([following])
            return
        for block in {*blocks, *taught_by}:
            for name in block.spec.mixers:
                mixer: Any = block.mixer_named(name)
                mixer.set_modules_to_forward_prefetch([block.mlp])
        pairs = zip(blocks, placement, strict=True)
        walk = [part for block, name in pairs for part in (block.mixer_named(name), block.mlp)]
        for preceding, part in pairwise(walk):
            part.set_modules_to_backward_prefetch([preceding])

    def sync(self, last: bool) -> None:
        for unit in self._units:
            unit.set_requires_gradient_sync(last, recurse=False)

    def finish(self, gradients: Iterable[Gradients]) -> None:
        for gradient in chain.from_iterable(gradients):
            if not isinstance(gradient, DTensor):
                gradient.copy_(self.average(gradient))

    def norms(self, groups: Sequence[Gradients]) -> Tensor:
        squares = torch.stack([_square_here(group, self.mesh.size()) for group in groups])
        return summed(squares).sqrt()

    def channels(self, features: Tensor) -> Tensor:
        if self.tensor.size() == 1:
            return features
        return DTensor.from_local(features, self.tensor, [Shard(features.ndim - 1)], run_check=False).full_tensor()

    def whole(self, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, DTensor):
            return tensor
        for dim in range(tensor.device_mesh.ndim):  # at once, torch warns that it goes one by one
            placements = [Replicate() if d <= dim else old for d, old in enumerate(tensor.placements)]
            tensor = tensor.redistribute(placements=placements)
        return tensor.to_local()

    def assign(self, parameter: nn.Parameter, whole: Tensor) -> None:
        if not isinstance(parameter, DTensor):
            return super().assign(parameter, whole)
        value = whole.to(parameter.dtype)
        spread = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
        with torch.no_grad():
            parameter.to_local().copy_(spread.to_local())
        return None


def parallelise(settings: ParallelSettings | None, device: torch.device) -> Parallel:
    """The arrangement of the processes that torchrun started; all shards where no `settings` say otherwise.

    ValueError if the settings do not fit the number of processes.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    settings = settings or ParallelSettings()
    if world == 1:
        mesh_sizes(settings, 1)
        return ALONE
    if device.index is not None:
        raise ValueError(f"{world} processes cannot share the device {device}: leave out its number")
    sizes = mesh_sizes(settings, world)
    copies_alone = sizes[0] == world
    return Copies() if copies_alone else Shards(sizes, device)


def mesh_sizes(settings: ParallelSettings, world: int) -> tuple[int, int, int]:
    """(copies, shards, slices of a tensor) of `world` processes."""
    tensor = settings.tensor
    if world % tensor:
        raise ValueError(f"parallel: tensor {tensor} does not divide {_processes(world)}")
    data = world // tensor
    copies = data if settings.data == "ddp" else settings.replicas
    if data % copies:
        over = f" over tensor {tensor}" if tensor > 1 else ""
        raise ValueError(f"parallel: replicas {copies} does not divide {_processes(world)}{over}")
    return copies, data // copies, tensor


def _processes(world: int) -> str:
    return f"{world} processes" if world > 1 else "1 process: start it with torchrun --nproc-per-node N -m gearshift"


def _square_here(gradients: Gradients, world: int) -> Tensor:
    """This process's summand of the squared norm: what lies on several of the `world` processes counts in parts."""
    by_copies: dict[int, list[Tensor]] = {}
    for gradient in gradients:
        copies, local = world, gradient
        if isinstance(gradient, DTensor):
            local = gradient.to_local()
            for dim, placement in enumerate(gradient.placements):
                copies //= 1 if placement.is_replicate() else gradient.device_mesh.size(dim)
        by_copies.setdefault(copies, []).append(local)
    squares = [nn.utils.get_total_norm(locals_).square() / copies for copies, locals_ in by_copies.items()]
    return torch.stack(squares).sum()


def _units(model: GearshiftForCausalLM) -> list[nn.Module]:
    """Every mixer and every MLP, once."""
    units: list[nn.Module] = []
    for block in model.modules():
        if isinstance(block, Block):
            units += block.mixer.mixers.values() if isinstance(block.mixer, StochasticMixer) else [block.mixer]
            units.append(block.mlp)
    return units


def _expect_backward(units: Sequence[FSDPModule], students: Sequence[FSDPModule]) -> None:
    """Let one backward pass come after all forwards; of `students`, one each right behind its forward, in this order.

    What a student needs then stays gathered in between, and only the last one's backward pass waits for its gradients
    to be exchanged: all are exchanged one after another, while the next students compute.
    """
    kept, unawaited = set(students), set(students[:-1])
    for unit in units:
        unit.set_modules_to_forward_prefetch([])
        unit.set_modules_to_backward_prefetch([unit])  # with an empty list, FSDP would guess
        unit.set_reshard_after_forward(unit not in kept, recurse=False)
        unit.set_is_last_backward(unit not in unawaited)


def _precision(unit: nn.Module, half: bool) -> MixedPrecisionPolicy:
    """bfloat16 already on the way where the products would convert all of it anyway; gradients add up in float32."""
    linear = {id(p) for module in unit.modules() if isinstance(module, nn.Linear) for p in module.parameters()}
    if half and all(id(parameter) in linear for parameter in unit.parameters()):
        return MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    return MixedPrecisionPolicy(cast_forward_inputs=False)


def _prepare(unit: Any) -> None:
    """Give a unit its method `within`, and let FSDP set the unit up now, in a forward that does nothing.

    Each is a root of its own: stages run mixers by themselves, often with a backward pass each, and a common root would
    look through all units after every one. Their first forwards clear what they share, so none may come within a step.
    """
    unit.within = lambda work, *given: work(unit, *given)
    register_fsdp_forward_method(unit, "within")
    unit.within(lambda unit: None)
