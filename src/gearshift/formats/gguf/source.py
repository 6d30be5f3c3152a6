"""The tensors of a GGUF file, de-quantised to float32 when they are read."""

import hashlib
import math
from pathlib import Path

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from gearshift.formats.gguf.header import read_header
from gearshift.plan import Box, Schema, TensorInfo

_ELEMENTS_AT_ONCE = 1 << 22
_PLAIN = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16)


class GGUFSource:
    """A GGUF file. Opening it reads and checks the header; ValueError, naming it, if that is no good."""

    def __init__(self, path: Path):
        self.path = path
        self.header = read_header(path)
        for name, tensor in self.header.tensors.items():
            if not _known(tensor.quantisation):
                raise ValueError(
                    f"the tensor {name!r} in {path} is quantised as {tensor.quantisation.name}, which gguf cannot undo"
                )
        self.schema: Schema = {name: TensorInfo(t.shape, "float32") for name, t in self.header.tensors.items()}
        status = path.stat()
        with path.open("rb") as file:
            head = hashlib.sha256(file.read(self.header.bytes)).hexdigest()
        self.fingerprint = f"{path.name} {status.st_size} {status.st_mtime_ns} {head}"

    @property
    def quantisations(self) -> list[str]:
        """The names of the quantised types in the file, sorted."""
        types = {tensor.quantisation for tensor in self.header.tensors.values()}
        return sorted(kind.name for kind in types if kind not in _PLAIN)

    def read(self, name: str, box: Box | None = None) -> torch.Tensor:
        """The tensor `name`, or the elements `box` of it. Of matrices, only the rows in the box are de-quantised."""
        tensor = self.header.tensors[name]
        *outer, width = tensor.shape
        rows = math.prod(outer)
        data = np.memmap(self.path, np.uint8, "r", tensor.offset, (rows, tensor.bytes // max(rows, 1)))
        first, last = box[0] if box and len(outer) == 1 else (0, rows)
        result = np.empty((last - first, width), np.float32)
        step = max(1, _ELEMENTS_AT_ONCE // max(width, 1))
        for row in range(first, last, step):
            stop = min(row + step, last)
            result[row - first : stop - first] = dequantize(data[row:stop], tensor.quantisation)
        if not box:
            return torch.from_numpy(result).view(tensor.shape)
        if len(outer) == 1:
            return torch.from_numpy(result)[:, slice(*box[1])]
        return torch.from_numpy(result).view(tensor.shape)[tuple(slice(*interval) for interval in box)]


def _known(quantisation: GGMLQuantizationType) -> bool:
    """Whether gguf can de-quantise a type: asked of it with one block of zeros."""
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[quantisation][1]), np.uint8), quantisation)
    except NotImplementedError:
        return False
    return True
