"""The weights of a folder that holds pickles: loaded with `weights_only`, and only where a person allowed it."""

import hashlib
import zipfile
from pathlib import Path
from typing import Any

import torch

from gearshift.formats.layout import PICKLE
from gearshift.formats.safetensors import DTYPES
from gearshift.plan import Box, Schema
from gearshift.plan.sources import info_of


class PickleSource:
    """The tensors of a folder's pickles, or of one of them. They stay in their files, mapped, until they are read.

    Raises ValueError, naming the file, for what is no pickle of named tensors alone, for a tensor that is there twice,
    and for an index that does not fit.
    """

    def __init__(self, folder: Path, file: Path | None = None):
        self._tensors: dict[str, torch.Tensor] = {}
        files: dict[str, str] = {}
        digest = hashlib.sha256()
        for path in [file] if file else PICKLE.weight_files(folder):
            for name, tensor in _load(path).items():
                if name in files:
                    raise ValueError(f"the tensor {name!r} is in two files, {files[name]} and {path.name} of {folder}")
                _check(path, name, tensor)
                self._tensors[name] = tensor.detach()
                files[name] = path.name
            status = path.stat()
            digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns} ".encode())
        if file is None:
            PICKLE.check_index(folder, files)
        self.schema: Schema = {name: info_of(tensor) for name, tensor in self._tensors.items()}
        self.fingerprint = digest.hexdigest()
        """Differs when a file does: by its name, size or time of change."""

    def read(self, name: str, box: Box | None = None) -> torch.Tensor:
        """The tensor `name`, or the elements `box` of it."""
        tensor = self._tensors[name]
        return (tensor if box is None else tensor[tuple(slice(*interval) for interval in box)]).contiguous()


def _load(path: Path) -> dict[str, Any]:
    # Files from before PyTorch 1.6 are no archives and cannot be mapped.
    mapped = zipfile.is_zipfile(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # unpickling runs into whatever the bytes make it run into
        raise ValueError(
            f"{path} is damaged, or holds more than tensors by name: it was not loaded ({type(error).__name__})"
        ) from None
    if not isinstance(loaded, dict) or not all(isinstance(name, str) for name in loaded):
        raise ValueError(f"{path} does not hold tensors by name: save the model's state_dict, or use safetensors")
    return loaded


def _check(path: Path, name: str, tensor: Any) -> None:
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.device.type != "cpu":
        raise ValueError(f"{path} holds {name!r}, which is no plain tensor but {type(tensor).__name__}")
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPES.values():
        raise ValueError(
            f"the tensor {name!r} in {path} has an unknown dtype {dtype!r}: known are {', '.join(DTYPES.values())}"
        )
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError(f"the tensor {name!r} in {path} is larger than what is stored of it: save a copy of it")
