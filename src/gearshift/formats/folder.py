"""The weights of a Hugging Face folder: one safetensors file, or shards and their index."""

import hashlib
import mmap
from pathlib import Path

import torch

from gearshift.formats.layout import PICKLE, SAFETENSORS
from gearshift.formats.pickles import PickleSource
from gearshift.formats.safetensors import Stored, read_header
from gearshift.plan import Box, Schema
from gearshift.plan.sources import Extent

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def open_weights(
    folder: Path, file: Path | None = None, allow_pickle: bool = False
) -> "SafetensorsSource | PickleSource":
    """The weights of a folder, or `file` of it alone. Safetensors are preferred to pickles.

    Raises ValueError, naming the file, for pickles unless they are allowed, for a folder without weights, and for what
    is wrong with those that it has.
    """
    if file is not None and file.suffix != SAFETENSORS.suffix:
        _check_allowed(file, allow_pickle)
        return PickleSource(folder, file)
    if file is not None or SAFETENSORS.weight_files(folder):
        return SafetensorsSource(folder, file)
    pickles = [path for pattern in _PICKLES for path in sorted(folder.glob(pattern))]
    if not pickles:
        raise ValueError(f"{folder} holds no safetensors file")
    _check_allowed(pickles[0], allow_pickle)
    if PICKLE.weight_files(folder):
        return PickleSource(folder)
    if len(pickles) > 1:
        raise ValueError(f"{folder} holds {len(pickles)} pickles: name the one to read, such as {pickles[0]}")
    return PickleSource(folder, pickles[0])


def _check_allowed(pickle: Path, allow_pickle: bool) -> None:
    if not allow_pickle:
        raise ValueError(
            f"{pickle} is a pickle, which can run code when it is loaded: save the model with safetensors "
            "(model.save_pretrained) first, or convert it with --allow-pickle, which loads weights only"
        )


class SafetensorsSource:
    """The tensors of a folder, or of one file of it, read when asked for. Opening it reads and checks the headers only.

    Raises ValueError, naming the file, for anything that is cut short, corrupt, missing or there twice.
    """

    def __init__(self, folder: Path, file: Path | None = None):
        self._tensors: dict[str, tuple[Path, Stored]] = {}
        digest = hashlib.sha256()
        for path in [file] if file else SAFETENSORS.weight_files(folder):
            tensors, header = read_header(path)
            if twice := [name for name in tensors if name in self._tensors]:
                first = self._tensors[twice[0]][0]
                raise ValueError(f"the tensor {twice[0]!r} is in two files, {first.name} and {path.name} of {folder}")
            self._tensors |= {name: (path, stored) for name, stored in tensors.items()}
            status = path.stat()
            digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns} ".encode() + header)
        if file is None:
            SAFETENSORS.check_index(folder, {name: path.name for name, (path, _) in self._tensors.items()})
        self.schema: Schema = {name: stored.info for name, (_, stored) in self._tensors.items()}
        self.fingerprint = digest.hexdigest()
        """Differs when a file does: by its name, size, time of change or header."""

    def read(self, name: str, box: Box | None = None) -> torch.Tensor:
        """The tensor `name`, or the elements `box` of it: the file's own pages, and only the rows asked for."""
        info = self.schema[name]
        shape = info.shape or (1,)
        tensor = _mapped(self._rows(name, box), getattr(torch, info.dtype))
        if not box:
            return tensor.view(info.shape)
        first, last = box[0]
        return tensor.view(last - first, *shape[1:])[(slice(None), *(slice(*interval) for interval in box[1:]))]

    def extent(self, name: str, box: Box | None = None) -> Extent | None:
        """Where the tensor `name`, or the elements `box` of it, lies; None for a part of each row."""
        shape = self.schema[name].shape
        rows = not box or all(cut == (0, size) for cut, size in zip(box[1:], shape[1:], strict=True))
        return self._rows(name, box) if rows else None

    def _rows(self, name: str, box: Box | None) -> Extent:
        path, stored = self._tensors[name]
        size = stored.info.shape[0] if stored.info.shape else 1
        first, last = box[0] if box else (0, size)
        row = stored.info.bytes // max(size, 1)
        return Extent(path, stored.offset + first * row, (last - first) * row)


def _mapped(extent: Extent, dtype: torch.dtype) -> torch.Tensor:
    """Bytes of a file as a vector.

    Each tensor has a mapping of its own, that ends with it: one mapping of the file would stay resident as a whole.
    """
    path, offset, length = extent
    if not length:
        return torch.empty(0, dtype=dtype)
    begin = offset - offset % mmap.ALLOCATIONGRANULARITY
    with path.open("rb") as file:
        if path.stat().st_size < offset + length:
            raise ValueError(f"{path} is cut short: it changed since it was opened")
        # Private and writable, so that a write, which would be a mistake, cannot crash the process or reach the file.
        mapping = mmap.mmap(file.fileno(), offset + length - begin, access=mmap.ACCESS_COPY, offset=begin)
    if hasattr(mmap, "MADV_WILLNEED"):
        mapping.madvise(mmap.MADV_WILLNEED)
    tensor = torch.frombuffer(mapping, dtype=torch.uint8)[offset - begin :]
    # The format does not align tensors; torch reads elements only from where a multiple of their size is.
    return (tensor.clone() if offset % dtype.itemsize else tensor).view(dtype)
