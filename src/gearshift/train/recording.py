"""Recording CUDA graphs: on which stream, and into which memory."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, UntypedStorage

Pool = Any
"""Memory that graphs are recorded into. Work that is not recorded never uses it."""
ALIGNMENT = 512
"""Bytes: where CUDA's allocator lets memory begin."""
SMALL = 1 << 20
"""Bytes below which copies are worth a kernel together, not one each."""


@cache
def _stream(device: int) -> torch.cuda.Stream:
    """One for all recordings on a device, for graphs can only share memory that one stream took."""
    return torch.cuda.Stream(device)


@contextmanager
def side_stream() -> Iterator[None]:
    """Work on the stream of recordings, between what the current stream did before and what it does afterwards."""
    current, stream = torch.cuda.current_stream(), _stream(torch.cuda.current_device())
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)


@contextmanager
def recording(graph: torch.cuda.CUDAGraph, pool: Pool = None) -> Iterator[None]:
    """Record what is launched within into `graph`, with its memory from `pool`. Nothing is computed.

    RuntimeError that says what to do if something within cannot be recorded.
    """
    stream = _stream(torch.cuda.current_device())
    try:
        # Other threads, such as one that fetches data, may use CUDA meanwhile.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            yield
    except RuntimeError as error:
        raise RuntimeError(f"a step could not be recorded ({error}): set cuda_graphs to false") from error


class Arena:
    """Memory that pieces of work use one at a time. It grows, and what was given stays where it is."""

    def __init__(self, device: torch.device):
        self.device = device
        self._buffers: list[Tensor] = []

    def pieces(self, sizes: Sequence[int]) -> list[Tensor]:
        """For each size a piece of memory, [size] bytes. The same memory at every call."""
        used = [0] * len(self._buffers)
        places: dict[int, tuple[int, int]] = {}
        left = []
        for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
            room = _aligned(sizes[number])
            fitting = (b for b, buffer in enumerate(self._buffers) if used[b] + room <= len(buffer))
            buffer = next(fitting, None)
            if buffer is None:
                left.append(number)
                continue
            places[number] = buffer, used[buffer]
            used[buffer] += room
        if left:
            starts = [0, *accumulate(_aligned(sizes[number]) for number in left)]
            places.update({number: (len(self._buffers), start) for number, start in zip(left, starts, strict=False)})
            self._buffers.append(torch.empty(starts[-1], dtype=torch.uint8, device=self.device))
        return [self._buffers[b][start : start + sizes[n]] for n, (b, start) in sorted(places.items())]


class Kept:
    """What the backward pass of recorded work reads, moved out of the memory that other work is recorded into.

    Record the work within `noticing()`, then `moved`: it copies what the work has saved into pieces of memory of the
    sizes that `sizes` gives.
    """

    def __init__(self, pool: Pool):
        self.pool = pool
        self._used = _bytes_in_use(pool)
        self._saved: list[list[Tensor]] = []

    def noticing(self) -> AbstractContextManager[Any]:
        """Within, what autograd saves is noticed."""

        def pack(tensor: Tensor) -> list[Tensor]:
            self._saved.append([tensor.detach()])
            return self._saved[-1]

        return torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved[0])

    def sizes(self, result: Tensor) -> list[int]:
        """The bytes that `result` of the work and what it saved have in the pool, each piece of memory once."""
        return [storage.nbytes() for storage in self._storages(result).values()]

    def moved(self, result: Tensor, pieces: Sequence[Tensor]) -> Tensor:
        """`result` as it will be in its piece of memory; what was saved is moved as well."""
        storages = self._storages(result)
        copies = dict(zip(storages, pieces, strict=True))
        small: list[tuple[Tensor, Tensor]] = []
        for storage, piece in zip(storages.values(), pieces, strict=True):
            whole = torch.empty(0, dtype=torch.uint8, device=result.device).set_(storage)
            if storage.nbytes() < SMALL:
                small.append((piece, whole))
            else:
                piece.copy_(whole)
        if small:
            torch._foreach_copy_([piece for piece, _ in small], [whole for _, whole in small])

        def moved(tensor: Tensor) -> Tensor:
            copy = copies.get(tensor.untyped_storage().data_ptr())
            if copy is None:
                return tensor
            offset = copy.storage_offset() // tensor.element_size() + tensor.storage_offset()
            view = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            return view.set_(copy.untyped_storage(), offset, tensor.shape, tensor.stride())

        for saved in self._saved:
            saved[0] = moved(saved[0])
        return _Standing.apply(result, moved(result.detach()))

    def check(self) -> None:
        """RuntimeError if the work left something in the pool, which others would overwrite."""
        left = _bytes_in_use(self.pool) - self._used
        if left > 0:
            raise RuntimeError(
                f"a step could not be recorded: for its backward pass, a mixer keeps {left} bytes that autograd does"
                " not know of: set cuda_graphs to false"
            )

    def _storages(self, result: Tensor) -> dict[int, UntypedStorage]:
        """By their place, what lies in the pool of `result` and of what was saved."""
        places = [range(s["address"], s["address"] + s["total_size"]) for s in _segments(self.pool)]
        tensors = [result, *(tensor for saved in self._saved for tensor in saved)]
        storages = {storage.data_ptr(): storage for storage in (tensor.untyped_storage() for tensor in tensors)}
        return {place: storage for place, storage in storages.items() if any(place in range_ for range_ in places)}


class _Standing(torch.autograd.Function):
    """A copy of a tensor in its place."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, copy: Tensor) -> Tensor:
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        return upstream[0], None


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _segments(pool: Pool) -> list[dict[str, Any]]:
    return torch.cuda.memory_snapshot(pool, include_traces=False)


def _bytes_in_use(pool: Pool) -> int:
    blocks = (block for segment in _segments(pool) for block in segment["blocks"])
    return sum(block["size"] for block in blocks if block["state"] == "active_allocated")
