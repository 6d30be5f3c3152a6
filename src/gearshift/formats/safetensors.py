"""Headers of safetensors files, checked before anything is believed of them."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gearshift.formats.documents import parse_json
from gearshift.plan import TensorInfo
from gearshift.plan.expressions import DTYPE_BYTES

DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
}
"""What safetensors calls torch's dtypes."""

_MAX_HEADER = 100_000_000
"""Bytes: the library's own limit."""
_PICKLES = (b"PK\x03\x04", *(b"\x80" + bytes([protocol]) for protocol in range(2, 6)))
"""How what `torch.save` writes begins: a zip archive, before PyTorch 1.6 a pickle."""


@dataclass(frozen=True)
class Stored:
    """One tensor in a file."""

    info: TensorInfo
    offset: int
    """Of its first byte in the file."""


def read_header(path: Path) -> tuple[dict[str, Stored], bytes]:
    """Every tensor of the file, in the order of their bytes, and the header as it stands there.

    Raises ValueError, naming the file, if it is cut short or if the header is corrupt.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if length > size - 8 and prefix.startswith(_PICKLES):
            raise ValueError(
                f"{path} is a pickle, whatever its name says: save the model with safetensors (model.save_pretrained), "
                "or give the file a name that ends in .bin and convert it with --allow-pickle, which loads weights only"
            )
        if len(prefix) < 8 or length > size - 8:
            raise ValueError(f"{path} is cut short or no safetensors file: its {size} bytes do not hold its header")
        if length > _MAX_HEADER:
            raise ValueError(f"{path} is corrupt: its header would be {length} bytes long")
        header = file.read(length)
    try:
        entries = parse_json(header)
    except ValueError as error:
        raise ValueError(f"the header of {path} is corrupt: it is not valid JSON ({error})") from None
    if not isinstance(entries, dict):
        raise ValueError(f"the header of {path} is corrupt: it is not a JSON object")
    start = 8 + length
    tensors = {name: _entry(path, name, entry, start) for name, entry in entries.items() if name != "__metadata__"}
    ordered = dict(sorted(tensors.items(), key=lambda item: item[1].offset))
    _check_extent(path, ordered, start, size)
    return ordered, header


def _entry(path: Path, name: str, entry: Any, start: int) -> Stored:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]}:
            pass
        case _:
            raise ValueError(f"the header of {path} is corrupt: it describes the tensor {name!r} as {str(entry)[:200]}")
    if dtype not in DTYPES:
        raise ValueError(f"the tensor {name!r} in {path} has an unknown dtype {dtype!r}: known are {', '.join(DTYPES)}")
    if not all(type(dim) is int and dim >= 0 for dim in shape) or begin < 0:
        raise ValueError(f"the header of {path} is corrupt: the tensor {name!r} has the shape {str(shape)[:200]}")
    if end - begin != math.prod(shape) * DTYPE_BYTES[DTYPES[dtype]]:
        raise ValueError(
            f"the header of {path} is corrupt: the tensor {name!r} of shape {shape} and dtype {dtype} "
            f"cannot have {end - begin} bytes"
        )
    return Stored(TensorInfo(tuple(shape), DTYPES[dtype]), start + begin)


def _check_extent(path: Path, tensors: dict[str, Stored], start: int, size: int) -> None:
    """The tensors must fill the file, without gaps or overlaps."""
    reached = start
    for name, stored in tensors.items():
        if stored.offset != reached:
            raise ValueError(f"the header of {path} is corrupt: a gap or an overlap precedes the tensor {name!r}")
        reached = stored.offset + stored.info.bytes
    if size < reached:
        raise ValueError(
            f"{path} is cut short: its header promises {reached - start} bytes of tensors, and {size - start} are there"
        )
    if size > reached:
        raise ValueError(f"{path} is corrupt: {size - reached} bytes follow its last tensor")
