"""What compiled code takes in memory, without compiling it.

A function is traced and cut into a forward and a backward graph, as torch.compile does it, which settles what is kept
between the two. Of each graph then only the sizes are used: matrix products and what they read are memory, everything
else is taken to be fused into a kernel that writes a matrix product's input or an output.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import getitem
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx, nn
from torch._functorch.aot_autograd import aot_function, make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.flop_counter import flop_registry

from gearshift.mixers.base import MixContext
from gearshift.train.estimate.tracker import Tracker

aten = torch.ops.aten


class Compiled:
    """A function as if it were compiled for fixed shapes. Its arguments may hold tensors and modules."""

    def __init__(self, function: Callable[..., Any], tracker: Tracker):
        self.function = function
        self.tracker = tracker
        self._made: dict[Any, tuple[Callable[..., Any], list[Any]]] = {}

    def __call__(self, *args: Any) -> Any:
        shared = [isinstance(arg, MixContext) for arg in args]
        leaves, structure = tree_flatten(
            tuple(vars(arg) if is_one else arg for arg, is_one in zip(args, shared, strict=True))
        )
        modules = [leaf for leaf in leaves if isinstance(leaf, nn.Module)]
        owners = nn.ModuleList(modules)
        parameters = dict(owners.named_parameters())
        names = list(parameters)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        inputs = [*parameters.values(), *tensors]
        key = (structure, tuple(map(_kind, leaves)), torch.is_grad_enabled())
        if key not in self._made:
            shape: list[Any] = []
            empty = object()
            template = [empty if isinstance(leaf, Tensor) else leaf for leaf in leaves]  # holds no tensor

            def run(*values: Tensor) -> Any:
                rest = iter(values[len(names) :])
                filled = [next(rest) if leaf is empty else leaf for leaf in template]
                call = _Call(self.function, owners)
                swapped = {f"owners.{name}": value for name, value in zip(names, values, strict=False)}
                opened = zip(tree_unflatten(filled, structure), shared, strict=True)
                again = tuple(MixContext(**arg) if is_one else arg for arg, is_one in opened)
                # A block holds its mixers: those given by themselves too are the same modules, not ties to follow.
                made = functional_call(call, swapped, again, tie_weights=False)
                flat, made_as = tree_flatten(made)
                shape[:] = [made_as]
                return flat

            traced = aot_function(
                run,
                fw_compiler=self._graph,
                bw_compiler=self._graph,
                partition_fn=min_cut_rematerialization_partition,
                decompositions=_decompositions(),
            )
            with _tracing(), self.tracker.paused():
                traced(*map(_like, inputs))
            self._made[key] = traced, shape
        traced, shape = self._made[key]
        return tree_unflatten(list(traced(*inputs)), shape[0])

    def _graph(self, gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        return make_boxed_func(_Sizes(gm, self.tracker))


def _like(tensor: Tensor) -> Tensor:
    """A tensor to trace with in place of this one: a graph keeps such until Python's garbage collector comes by."""
    fresh = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return fresh.requires_grad_(tensor.requires_grad)


@contextmanager
def _tracing() -> Iterator[None]:
    """Within, code that asks is told that it is being compiled, and what is kept is kept from a checkpoint's eyes."""
    unseen = torch.autograd.graph.saved_tensors_hooks(lambda kept: kept, lambda kept: kept)
    with unseen, patch.object(torch.compiler, "_is_compiling_flag", True):
        yield


class _Call(nn.Module):
    """A function with the modules it runs, so that their parameters can be swapped."""

    def __init__(self, function: Callable[..., Any], owners: nn.ModuleList):
        super().__init__()
        self.function = function
        self.owners = owners

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


def _kind(leaf: Any) -> Any:
    """All that decides how a function of `leaf` is traced."""
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, leaf.stride(), leaf.requires_grad
    if isinstance(leaf, nn.Module):
        return type(leaf), tuple((name, *_kind(value)) for name, value in leaf.named_parameters())
    return leaf if isinstance(leaf, int | float | str | bool | None) else type(leaf)


def _decompositions() -> Any:
    from torch._inductor.decomposition import select_decomp_table

    return select_decomp_table()


class _Sizes:
    """A graph that takes the memory of its run and gives empty outputs."""

    def __init__(self, graph: fx.GraphModule, tracker: Tracker):
        nodes = list(graph.graph.nodes)
        self.tracker = tracker
        self.operations = sum(map(_operations, nodes))
        places = {node: place for place, node in enumerate(node for node in nodes if node.op == "placeholder")}
        outputs = [_base(node) if isinstance(node, fx.Node) else None for node in nodes[-1].args[0]]
        self.outputs: list[Any] = []
        for node, base in zip(nodes[-1].args[0], outputs, strict=True):
            if base is None:
                self.outputs.append(None)
            elif node in places:
                self.outputs.append(places[node])
            else:
                self.outputs.append((base.name, _layout(base), _layout(node)))
        self.scratch = _workspace(nodes, {node for node in outputs if node is not None})

    def __call__(self, *args: Any) -> list[Any]:
        example = next(arg for arg in args if isinstance(arg, Tensor))
        self.tracker.count(self.operations)
        example.new_empty(self.scratch, dtype=torch.uint8)
        bases: dict[int, Tensor] = {}
        made: list[Any] = []
        for output in self.outputs:
            if output is None or isinstance(output, int):
                made.append(None if output is None else args[output])
                continue
            base, (_, _, whole_dtype, whole), (size, stride, dtype, extent) = output
            if base not in bases:
                bases[base] = example.new_empty(whole, dtype=whole_dtype)
            # A view in another dtype than its base is rare, and then counts by itself.
            of_base = whole_dtype == dtype and whole >= extent
            made.append((bases[base] if of_base else example.new_empty(extent, dtype=dtype)).as_strided(size, stride))
        return made


def _layout(node: fx.Node) -> tuple[Any, ...]:
    value = node.meta["val"]
    extent = 1 + sum((size - 1) * step for size, step in zip(value.shape, value.stride(), strict=True))
    return tuple(value.shape), value.stride(), value.dtype, extent if value.numel() else 0


def _is_view(node: fx.Node) -> bool:
    """Whether a node is a view, several as one, or one of several."""
    if node.target is getitem:
        return _is_view(node.args[0])  # type: ignore[arg-type]
    return getattr(node.target, "is_view", False) or node.target is aten._unsafe_view.default


def _base(node: fx.Node) -> fx.Node:
    """The node whose memory `node` looks at."""
    while node.op == "call_function" and _is_view(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _operations(node: fx.Node) -> int:
    packet = getattr(node.target, "overloadpacket", None)
    if node.op != "call_function" or packet not in flop_registry:
        return 0
    args = [arg.meta["val"] if isinstance(arg, fx.Node) else arg for arg in node.args]
    return int(flop_registry[packet](*args, **node.kwargs, out_val=node.meta["val"]))


def _bytes(node: fx.Node) -> int:
    value = node.meta.get("val")
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


def _workspace(nodes: list[fx.Node], outputs: set[fx.Node]) -> int:
    """The most bytes alive at a time beside inputs and outputs."""
    products = {node for node in nodes if _operations(node)}
    read = {_base(arg) for node in products for arg in node.all_input_nodes}
    stored = {node for node in products | read if node.op == "call_function"} - outputs
    behind: dict[fx.Node, set[fx.Node]] = {}
    last: dict[fx.Node, int] = {}
    for place, node in enumerate(nodes):
        reads = {source for arg in node.all_input_nodes for source in behind[arg]}
        if node in stored or node in outputs or node in products:
            last.update(dict.fromkeys(reads, place))
        behind[node] = {node} if node in stored else (set() if node in outputs else reads)
    ends: dict[int, int] = {}
    alive = most = 0
    for place, node in enumerate(nodes):
        if node in stored and node in last:
            alive += _bytes(node)
            most = max(most, alive)
            ends[last[node]] = ends.get(last[node], 0) + _bytes(node)
        alive -= ends.pop(place, 0)
    return most
