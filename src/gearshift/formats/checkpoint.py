"""Opening a checkpoint of any format, and choosing a format to export to."""

import hashlib
import json
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version

from gearshift.formats.base import Format, InexpressibleError
from gearshift.formats.documents import copy_documents, in_one_line, read_json
from gearshift.formats.folder import open_weights
from gearshift.formats.layout import PICKLE, SAFETENSORS
from gearshift.formats.native import NativeConfig
from gearshift.formats.registry import FORMATS
from gearshift.plan import Plan, Schema, prevailing_dtype
from gearshift.plan.execute import Source
from gearshift.spec.parts import DTYPE_BYTES
from gearshift.spec.placement import MOST_LAYERS

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
"""A model on the hub: `organisation/name`."""
_HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja", "tokenizer.model")
SPEC_SUFFIXES = (".yaml", ".yml", ".json")
_WEIGHTS = (SAFETENSORS.suffix, PICKLE.suffix, ".pt", ".pth", ".ckpt")
_DTYPE_KEYS = ("dtype", "torch_dtype")
_COMPARED_AT_ONCE = 1 << 24
CONFIG = "config.json"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose config and tensor names, shapes and dtypes are known and fit; no weight has been read."""

    path: Path
    """The folder or the file."""
    format: Format
    native: NativeConfig
    """Its config as ours."""
    source: Source
    """Its tensors, under its own names."""
    plan: Plan
    """From its tensors to ours, dtypes kept."""
    fingerprint: str
    """Tells its contents from others, cheaply: by the names, sizes, times of change and headers of its files."""
    _copy: Callable[[Path], None]

    @property
    def schema(self) -> Schema:
        """Its tensors under our names."""
        return self.plan.target

    def copy_extras(self, out: Path) -> None:
        """Write its tokenizer, chat template and settings of generation to the folder `out`."""
        self._copy(out)


def open_checkpoint(source: str | Path, *, allow_pickle: bool = False) -> Checkpoint:
    """Open a folder, a .gguf file, a file of weights beside its `config.json`, or a hub name such as `org/name`.

    A .yaml or .json file is a spec: a model with new weights.

    Pickles are refused unless they are allowed; then they are loaded with torch's `weights_only`.

    Raises FileNotFoundError where there is no such thing, and ValueError, naming the file, for what is wrong in it.
    """
    try:
        return _open(source, allow_pickle)
    except ValueError as error:
        raise ValueError(in_one_line(str(error))) from None


def _open(source: str | Path, allow_pickle: bool) -> Checkpoint:
    path = Path(source)
    if path.is_dir():
        return _open_folder(path, path.resolve().name, allow_pickle)
    if path.suffix == ".gguf" and path.is_file():
        from gearshift.formats.gguf.checkpoint import open_gguf

        return open_gguf(path)
    if path.suffix in SPEC_SUFFIXES and path.name != CONFIG and path.is_file():
        from gearshift.formats.spec_file import open_spec_file

        return open_spec_file(path)
    if path.is_file():
        if path.suffix not in _WEIGHTS and path.name != CONFIG:
            raise ValueError(f"{path} is neither a model folder nor a .gguf, .safetensors, .yaml or .json file")
        return _open_folder(path.parent, path.parent.resolve().name, allow_pickle, _alone(path))
    if HUB_NAME.fullmatch(str(source)):
        return _open_folder(_download(str(source), allow_pickle), str(source), allow_pickle)
    raise FileNotFoundError(f"there is no {source}: name a model folder, a .gguf file or a hub model such as org/name")


def _alone(path: Path) -> Path | None:
    """The file itself if it holds weights and no index of its folder counts it among the shards."""
    if path.name == CONFIG or any((path.parent / layout.index_file).is_file() for layout in (SAFETENSORS, PICKLE)):
        return None
    return path


def hub_folder(name: str, *patterns: str) -> Path:
    """The files of a hub model that match `patterns`, downloaded; by itself, all that our readers take.

    FileNotFoundError if there is none: at once where the hub is out of reach, while files asked for one by one are
    asked for again and again.
    """
    from huggingface_hub import snapshot_download

    wanted = list(patterns or _HUB_FILES)
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=["*/*", "consolidated*"]))
    except Exception as error:  # the hub's client raises what its network stack does, and that is not one family
        raise FileNotFoundError(
            f"there is no folder {name}, and the hub could not give it: {_first_line(error)} ({type(error).__name__})"
        ) from error


def _download(name: str, allow_pickle: bool) -> Path:
    folder = hub_folder(name)
    if allow_pickle and not any(folder.glob(f"*{SAFETENSORS.suffix}")):
        folder = hub_folder(name, *_HUB_FILES, f"*{PICKLE.suffix}")
    return folder


def _open_folder(folder: Path, name: str, allow_pickle: bool, file: Path | None = None) -> Checkpoint:
    config = folder / CONFIG
    if not config.is_file():
        raise FileNotFoundError(f"{folder} holds no {CONFIG}: it is not a model folder")
    raw = read_json(config)
    _check_layers(config, raw)
    try:
        format = FORMATS.for_model_type(raw.get("model_type"))
        native = format.to_native(raw)
    except ValueError as error:
        raise ValueError(f"{config}: {error}{_newer(raw)}") from None
    if format.in_transformers:
        _warn_of_next(config, raw)
    tensors = open_weights(folder, file, allow_pickle)
    if not any(raw.get(key) for key in _DTYPE_KEYS):
        native = replace(native, dtype=prevailing_dtype(tensors.schema))
    if format.model_type != "gearshift":
        native = replace(native, source={**native.source, "name": name})
    digest = hashlib.sha256(f"{tensors.fingerprint} {json.dumps(raw, sort_keys=True)}".encode()).hexdigest()
    plan = build_plan(format, native, tensors, folder)
    return Checkpoint(folder, format, native, tensors, plan, digest, lambda out: copy_documents(folder, out))


def build_plan(format: Format, native: NativeConfig, source: Source, where: Path) -> Plan:
    """The plan from `source` to the model that `native` describes. ValueError, naming `where`, if they do not fit."""
    from gearshift.model import schema

    try:
        target = schema(native.spec, native.dtype)
    except (RuntimeError, TypeError, OverflowError) as error:  # what torch says of sizes that no tensor can have
        raise ValueError(f"{where}: there can be no model as its config describes: {_first_line(error)}") from None
    except (ValueError, KeyError) as error:  # a KeyError is an activation that transformers does not have
        raise ValueError(f"{where}: {error.args[0] if isinstance(error, KeyError) else error}") from None
    try:
        plan = format.import_plan(native.spec, target, source.schema)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    for name, info in plan.target.items():
        if info.dtype not in DTYPE_BYTES:
            raise ValueError(
                f"{where}: {name!r} is {info.dtype}, no dtype of weights: those are {', '.join(DTYPE_BYTES)}"
            )
    if (names := format.tied_copy(native.spec, source.schema)) and not _equal(source, *names):
        raise ValueError(
            f"{where}: the config ties the head to the embeddings, but {names[1]!r} differs from {names[0]!r}: "
            "set tie_word_embeddings to false"
        )
    return plan


def _equal(source: Source, first: str, second: str) -> bool:
    """Whether two matrices are equal, some rows in memory at a time."""
    info = source.schema[first]
    if info != source.schema[second]:
        return False
    step = max(1, _COMPARED_AT_ONCE // max(1, info.shape[1]))
    boxes = (((row, min(row + step, info.shape[0])), (0, info.shape[1])) for row in range(0, info.shape[0], step))
    return all(source.read(first, box).equal(source.read(second, box)) for box in boxes)


def choose_format(native: NativeConfig) -> tuple[Format, str]:
    """The format to export a model to where a person names none, and why, as a sentence.

    A family of transformers that can express it, the one it came from first: any engine runs that. Otherwise our own.
    """
    own = FORMATS["gearshift"]
    origin = native.source.get("format")
    families = [name for name in FORMATS if FORMATS[name].writable and FORMATS[name].in_transformers]
    reason, furthest = "", -1
    # Of two that can, the one with fewer kinds of block is the older and better known.
    for name in sorted(families, key=lambda name: (name != origin, FORMATS[name].kinds, name)):
        try:
            FORMATS[name].express(native)
        except InexpressibleError as error:
            # Of several, the one that came furthest has the true obstacle.
            if error.reached > furthest:
                reason, furthest = str(error), error.reached
        else:
            return FORMATS[name], f"transformers' own {name!r} classes can express it, so that any engine can run it"
    return own, f"no class of transformers can express it: {reason}"


def _check_layers(config: Path, raw: Mapping[str, Any]) -> None:
    """ValueError for absurdly many layers: transformers' classes make lists of that length before anybody looks."""
    for part in (raw, *(value for value in raw.values() if isinstance(value, dict))):
        layers = part.get("num_hidden_layers")
        if isinstance(layers, int) and layers > MOST_LAYERS:
            raise ValueError(f"{config}: 'num_hidden_layers' is {layers}, and at most {MOST_LAYERS} layers are read")


def _newer(raw: Mapping[str, Any]) -> str:
    """What to add to an error about a config that a newer transformers wrote than is installed."""
    written, installed = _versions(raw)
    if written <= installed:
        return ""
    return f" (transformers {written} wrote this config, a newer version than {installed}, which is installed: update)"


def _warn_of_next(config: Path, raw: Mapping[str, Any]) -> None:
    """Warn of a config that a transformers of the next generation wrote: there, keys may mean something else."""
    written, installed = _versions(raw)
    if written.major > installed.major:
        warnings.warn(
            f"{config}: transformers {written} wrote this config, and it is read as {installed} would: "
            "compare what the model computes before you rely on it",
            stacklevel=2,
        )


def _versions(raw: Mapping[str, Any]) -> tuple[Version, Version]:
    """The transformers that wrote a config, the one installed if it does not say, and the one installed."""
    import transformers

    installed = Version(transformers.__version__)
    try:
        return Version(str(raw.get("transformers_version"))), installed
    except InvalidVersion:
        return installed, installed


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")
