"""The header of a GGUF file: its metadata, and where its tensors lie. Every length is checked before it is followed."""

import math
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

_VERSIONS = (2, 3)
_MAX_DIMENSIONS = 4
_DEFAULT_ALIGNMENT = 32
# Values by the number of their type: struct's code. 8 is a string, 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_FLOAT = "f"


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor in the file: its shape as in torch, how it is quantised, and its bytes."""

    shape: tuple[int, ...]
    quantisation: GGMLQuantizationType
    offset: int
    bytes: int


@dataclass(frozen=True)
class GGUFHeader:
    """What a GGUF file says of itself."""

    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]
    bytes: int
    """How many bytes of the file precede the tensors."""


def read_header(path: Path) -> GGUFHeader:
    """Read and check it. ValueError, naming the file, if it is no GGUF file, cut short or corrupt."""
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{path} is no GGUF file: it does not begin with 'GGUF'")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(path, data).header()


class _Reader:
    """A position in a file."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path = path
        self.data = data
        self.size = len(data)
        self.offset = 4

    def header(self) -> GGUFHeader:
        version = self.number("I")
        if version not in _VERSIONS:
            raise ValueError(
                f"{self.path} is a GGUF file of version {version}: known are {_VERSIONS[0]} and {_VERSIONS[1]}"
            )
        tensor_count, metadata_count = self.number("Q"), self.number("Q")
        metadata = dict(self.items(metadata_count, self.pair))
        placed = dict(self.items(tensor_count, self.tensor))
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment < 1:
            raise self.corrupt(f"an alignment of {alignment!r}")
        start = -(-self.offset // alignment) * alignment
        tensors = {}
        for name, tensor in placed.items():
            end = start + tensor.offset + tensor.bytes
            if end > self.size:
                raise ValueError(f"{self.path} is cut short: the tensor {name!r} ends at byte {end} of {self.size}")
            tensors[name] = GGUFTensor(tensor.shape, tensor.quantisation, start + tensor.offset, tensor.bytes)
        return GGUFHeader(metadata, tensors, start)

    def corrupt(self, what: str) -> ValueError:
        return ValueError(f"the header of {self.path} is corrupt: {what}")

    def take(self, count: int) -> int:
        """Move past `count` bytes; returns where they began."""
        begin = self.offset
        if count > self.size - begin:
            raise ValueError(f"{self.path} is cut short: its header needs more than its {self.size} bytes")
        self.offset += count
        return begin

    def number(self, code: str) -> Any:
        begin = self.take(struct.calcsize(f"<{code}"))
        value = struct.unpack_from(f"<{code}", self.data, begin)[0]
        # Written as 32 bits, meant as a decimal: 1e-05, not 9.999999747378752e-06. In 32 bits they are the same.
        return float(f"{value:.7g}") if code == _FLOAT and _same_float32(value) else value

    def text(self) -> str:
        length = self.number("Q")
        begin = self.take(length)
        return bytes(self.data[begin : begin + length]).decode("utf-8", errors="replace")

    def items(self, count: int, read: Callable[[], tuple[str, Any]]) -> list[tuple[str, Any]]:
        """`count` named things."""
        found: dict[str, Any] = {}
        for _ in range(count):  # each takes bytes of the file, so that an absurd count ends at the file's end
            name, value = read()
            if name in found:
                raise self.corrupt(f"{name!r} is there twice")
            found[name] = value
        return list(found.items())

    def pair(self) -> tuple[str, Any]:
        return self.text(), self.value(self.number("I"))

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise self.corrupt(f"a value of the unknown type {kind}")
        inner, count = self.number("I"), self.number("Q")
        if inner == _STRING:
            return [self.text() for _ in range(count)]
        if inner not in _SCALARS:
            raise self.corrupt(f"an array of the unknown type {inner}")
        code = f"<{count}{_SCALARS[inner]}"
        if count > self.size:
            raise self.corrupt(f"an array of {count} values")
        return list(struct.unpack_from(code, self.data, self.take(struct.calcsize(code))))

    def tensor(self) -> tuple[str, GGUFTensor]:
        name, rank = self.text(), self.number("I")
        if rank > _MAX_DIMENSIONS:
            raise self.corrupt(f"the tensor {name!r} has {rank} dimensions")
        sizes = [self.number("Q") for _ in range(rank)]
        kind, offset = self.number("I"), self.number("Q")
        try:
            quantisation = GGMLQuantizationType(kind)
            block, block_bytes = GGML_QUANT_SIZES[quantisation]
        except (ValueError, KeyError):
            raise self.corrupt(f"the tensor {name!r} is quantised in the unknown type {kind}") from None
        # GGUF counts dimensions from the innermost.
        shape = tuple(reversed(sizes)) or (1,)
        if shape[-1] % block:
            raise self.corrupt(f"the tensor {name!r} of shape {shape} does not divide into blocks of {block}")
        return name, GGUFTensor(shape, quantisation, offset, math.prod(shape) // block * block_bytes)


def _same_float32(value: float) -> bool:
    """Whether seven significant digits of a 32-bit number are that number."""
    return struct.unpack("<f", struct.pack("<f", float(f"{value:.7g}")))[0] == value
