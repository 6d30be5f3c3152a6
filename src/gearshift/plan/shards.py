"""Safetensors shards of a schema, written tensor by tensor as the Hugging Face layout has them.

The format is a header of JSON and then the tensors' bytes. A schema settles the header before any value exists, so a
shard is streamed, one tensor in memory at a time, where the safetensors library would want all of them at once.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import torch

from gearshift.files import write_whole
from gearshift.plan.expressions import DTYPE_BYTES, Schema, TensorInfo
from gearshift.plan.sources import Extent, info_of

assert sys.byteorder == "little", "safetensors files are little-endian, and tensors are written as they lie in memory"

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PARTIAL = ".partial"

# Other file systems, or other kernels: what they answer where they cannot copy from this file to that.
_CANNOT_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)
_FLUSHED_AT_ONCE = 1 << 26

_SAFETENSORS_DTYPE = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
}


@dataclass(frozen=True, slots=True)
class Shard:
    """One file: its name, its header, and its tensors in the order of their bytes."""

    file: str
    names: tuple[str, ...]
    header: bytes
    bytes: int

    def finished(self, folder: Path) -> bool:
        """Whether the whole file is there under its final name."""
        path = folder / self.file
        return path.is_file() and path.stat().st_size == len(self.header) + self.bytes


def split(schema: Schema, shard_bytes: int, metadata: Mapping[str, str]) -> list[Shard]:
    """The schema's tensors dealt out in order, a new shard begun when the next tensor would pass `shard_bytes`.

    A tensor larger than that has a shard to itself.
    """
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes is {shard_bytes}; a shard must be allowed at least one byte")
    groups: list[list[str]] = [[]]
    filled = 0
    for name, info in schema.items():
        if groups[-1] and filled + info.bytes > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += info.bytes
    files = [SINGLE_FILE]
    if len(groups) > 1:
        files = [f"model-{number:05}-of-{len(groups):05}.safetensors" for number in range(1, len(groups) + 1)]
    return [_shard(file, names, schema, metadata) for file, names in zip(files, groups, strict=True)]


def _shard(file: str, names: list[str], schema: Schema, metadata: Mapping[str, str]) -> Shard:
    # Widest dtype first, as the library does: then every tensor starts at a multiple of its element size.
    names = sorted(names, key=lambda name: -DTYPE_BYTES[schema[name].dtype])
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name in names:
        info = schema[name]
        entries[name] = {
            "dtype": _SAFETENSORS_DTYPE[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [offset, offset + info.bytes],
        }
        offset += info.bytes
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    return Shard(file, tuple(names), len(header).to_bytes(8, "little") + header, offset)


class Made(NamedTuple):
    """One tensor to be written, and where its bytes lie in a file already, if they do."""

    tensor: torch.Tensor
    extent: Extent | None = None


def write_shard(
    shard: Shard, folder: Path, schema: Schema, values: Iterator[Made], wrote: Callable[[int], None]
) -> None:
    """Write one shard under a temporary name, then rename it, so that under its own name it is always whole.

    The next of `values` are the shard's tensors, in its order; `wrote` is called with the bytes of each. On any error
    the temporary file is removed and the error goes on, OSError for a full disk included.
    """
    path = folder / shard.file
    partial = path.with_name(path.name + PARTIAL)
    try:
        with partial.open("wb", buffering=0) as file:
            _write_all(file, memoryview(shard.header))
            flushed = 0
            for name in shard.names:
                _write(file, name, next(values), schema[name])
                wrote(schema[name].bytes)
                flushed = _begin_flush(file, flushed)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _write(file: FileIO, name: str, made: Made, info: TensorInfo) -> None:
    assert info_of(made.tensor) == info, f"{name}: {info_of(made.tensor)} instead of {info}"
    copied = 0 if made.extent is None else _copy(file, made.extent)
    if copied < info.bytes:
        _write_all(file, _bytes_of(made.tensor).numpy().data[copied:])


def _copy(file: FileIO, extent: Extent) -> int:
    """Have the system copy bytes from file to file, as `cp` does; how many it did.

    It does not bring them into the process, and where the file system can, the files share the blocks.
    """
    copied = 0
    if not hasattr(os, "copy_file_range"):
        return copied
    with extent.path.open("rb", buffering=0) as source:
        while copied < extent.bytes:
            try:
                step = os.copy_file_range(
                    source.fileno(), file.fileno(), extent.bytes - copied, offset_src=extent.offset + copied
                )
            except OSError as error:
                if error.errno not in _CANNOT_COPY:
                    raise
                break
            if not step:
                break
            copied += step
    return copied


def _write_all(file: FileIO, data: memoryview) -> None:
    """One call writes at most 2 GB, and less where the disk fills up."""
    while data.nbytes:
        data = data[file.write(data) :]


def _begin_flush(file: FileIO, flushed: int) -> int:
    """Have the system write out what was added since the position `flushed`, once it is enough; where it then is.

    Left to itself Linux collects gigabytes first, and the disk idles meanwhile. Pages said not to be needed it begins
    to write out at once, without anybody waiting for it.
    """
    position = file.tell()
    if position - flushed < _FLUSHED_AT_ONCE or not hasattr(os, "posix_fadvise"):
        return flushed
    os.posix_fadvise(file.fileno(), flushed, position - flushed, os.POSIX_FADV_DONTNEED)
    return position


def write_index(shards: list[Shard], folder: Path, schema: Schema) -> None:
    """The index that tells which of several shards holds which tensor."""
    weight_map = {name: shard.file for shard in shards for name in shard.names}
    index = {
        "metadata": {"total_size": sum(shard.bytes for shard in shards)},
        "weight_map": {name: weight_map[name] for name in schema},
    }
    write_whole(folder / INDEX_FILE, json.dumps(index, indent=2, ensure_ascii=False) + "\n")


def remove_shards(folder: Path) -> None:
    """Remove every file, finished or partial, that writing shards may have left in a folder."""
    for pattern in (SINGLE_FILE, "model-*-of-*.safetensors", INDEX_FILE):
        for path in (*folder.glob(pattern), *folder.glob(pattern + PARTIAL)):
            path.unlink()


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes in order, [bytes], without a copy where it lies in order."""
    flat = tensor.contiguous().reshape(-1)
    if flat.numel() == 1:
        # One element counts as contiguous whatever its stride, but cannot be viewed as bytes with any but 1.
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8)
