"""What lives in memory, byte by byte, while code runs on tensors that may hold no data."""

import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


class Tracker(TorchDispatchMode):
    """Counts the bytes of every tensor made while it is on, from its making until nothing holds it.

    `total` is the sum now, `peak` the largest so far; `at_peak` is how that was made up, by what `label` and `labelled`
    called the tensors, "activations" by default. `operations` counts floating-point operations, of matrix products.
    """

    def __init__(self, rounding: int = 1):
        """With `rounding`, sizes are rounded up to multiples of it, as allocators do."""
        super().__init__()
        self.rounding = rounding
        self.now: Counter[str] = Counter()
        self.at_peak: Mapping[str, int] = {}
        self.peak = 0
        self.operations = 0
        self._default = "activations"
        self._labels: weakref.WeakKeyDictionary[torch.UntypedStorage, list[Any]] = weakref.WeakKeyDictionary()
        self._paused = False
        self.total = 0

    def start(self) -> None:
        """Forget the peak and the operations so far."""
        self.peak, self.operations = 0, 0
        self._mark()

    def count(self, operations: int) -> None:
        """Add floating-point operations."""
        if not self._paused:
            self.operations += operations

    @contextmanager
    def labelled(self, label: str) -> Iterator[None]:
        """Within, new tensors are called `label`."""
        before, self._default = self._default, label
        try:
            yield
        finally:
            self._default = before

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within, nothing is counted."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def label(self, tensor: Tensor, label: str) -> None:
        """Call a tensor that lives already `label` from now on."""
        entry = self._labels.get(tensor.untyped_storage())
        if entry is not None and entry[0] != label:
            self.now[entry[0]] -= entry[1]
            self.now[label] += entry[1]
            entry[0] = label

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        if not self._paused:
            packet = getattr(function, "overloadpacket", None)
            if packet in flop_registry:
                self.operations += flop_registry[packet](*args, **(kwargs or {}), out_val=made)
            for leaf in tree_leaves(made):
                if isinstance(leaf, Tensor):
                    self._see(leaf)
        return made

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._labels:
            return
        size = -(-storage.nbytes() // self.rounding) * self.rounding
        entry: list[Any] = [self._default, size]
        self._labels[storage] = entry
        weakref.finalize(storage, self._free, entry)
        self.now[entry[0]] += size
        self.total += size
        if self.total > self.peak:
            self._mark()

    def _mark(self) -> None:
        self.peak, self.at_peak = self.total, dict(self.now)

    def _free(self, entry: list[Any]) -> None:
        self.now[entry[0]] -= entry[1]
        self.total -= entry[1]
