"""The weights of a Hugging Face folder: one safetensors file, or shards and their index."""

import hashlib
import mmap
from pathlib import Path

import torch

from gearshift.formats.documents import read_json
from gearshift.formats.safetensors import Stored, read_header
from gearshift.plan import Box, Schema

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class SafetensorsSource:
    """The tensors of a folder, read when asked for. Opening it reads and checks the headers only.

    Raises ValueError, naming the file, for anything that is cut short, corrupt, missing or there twice, and for
    folders without safetensors.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._tensors: dict[str, tuple[Path, Stored]] = {}
        digest = hashlib.sha256()
        for path in _files(folder):
            tensors, header = read_header(path)
            if twice := [name for name in tensors if name in self._tensors]:
                first = self._tensors[twice[0]][0]
                raise ValueError(f"the tensor {twice[0]!r} is in two files, {first.name} and {path.name} of {folder}")
            self._tensors |= {name: (path, stored) for name, stored in tensors.items()}
            status = path.stat()
            digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns} ".encode() + header)
        _check_index(folder, {name: path.name for name, (path, _) in self._tensors.items()})
        self.schema: Schema = {name: stored.info for name, (_, stored) in self._tensors.items()}
        self.fingerprint = digest.hexdigest()
        """Differs when a file does: by its name, size, time of change or header."""

    def read(self, name: str, box: Box | None = None) -> torch.Tensor:
        """The tensor `name`, or the elements `box` of it: the file's own pages, and only the rows asked for."""
        path, stored = self._tensors[name]
        shape = stored.info.shape or (1,)
        first, last = box[0] if box else (0, shape[0])
        row = stored.info.bytes // max(shape[0], 1)
        tensor = _mapped(path, stored.offset + first * row, (last - first) * row, getattr(torch, stored.info.dtype))
        if not box:
            return tensor.view(stored.info.shape)
        return tensor.view(last - first, *shape[1:])[(slice(None), *(slice(*interval) for interval in box[1:]))]


def _mapped(path: Path, offset: int, length: int, dtype: torch.dtype) -> torch.Tensor:
    """`length` bytes of a file as a vector.

    Each tensor has a mapping of its own, that ends with it: one mapping of the file would stay resident as a whole.
    """
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


def _files(folder: Path) -> list[Path]:
    """The files that hold the weights."""
    index = folder / INDEX_FILE
    if index.is_file():
        named = sorted(set(_weight_map(index).values()))
        for name in named:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise ValueError(f"{index} names {name!r}, which is no safetensors file of its folder")
            if not (folder / name).is_file():
                raise ValueError(f"{index} names the shard {name!r}, which is not there")
        return [folder / name for name in named]
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found
    if found:
        raise ValueError(
            f"{folder} holds {len(found)} safetensors files, but no {INDEX_FILE} that says how they belong together"
        )
    if pickles := [path for pattern in _PICKLES for path in sorted(folder.glob(pattern))]:
        raise ValueError(
            f"{pickles[0]} is a pickle, which can run code when it is loaded: "
            "save the model with safetensors (model.save_pretrained) first"
        )
    raise ValueError(f"{folder} holds no safetensors file")


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not all(isinstance(name, str) for name in weight_map.values())
        or not weight_map
    ):
        raise ValueError(f"{index} has no 'weight_map' from tensor names to file names")
    return weight_map


def _check_index(folder: Path, found: dict[str, str]) -> None:
    index = folder / INDEX_FILE
    if not index.is_file():
        return
    for name, file in _weight_map(index).items():
        if found.get(name) != file:
            elsewhere = f", but {found[name]} does" if name in found else ""
            raise ValueError(f"{index} says that {file} holds the tensor {name!r}, which it does not{elsewhere}")
