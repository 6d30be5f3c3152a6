"""What differs between two checkpoints: their configs, their tensors' shapes and dtypes, and the values."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from gearshift.formats import Checkpoint, NativeConfig
from gearshift.inspect import pattern
from gearshift.plan import Schema, Slice, TensorInfo, simplify
from gearshift.plan.execute import evaluate
from gearshift.plan.sources import region_read
from gearshift.progress import Advance, silent
from gearshift.spec import BlockSpec, ModelSpec, StochasticMixerSpec

_COMPARED_AT_ONCE = 1 << 22
_SAYS_NOTHING = ("model_type", "architectures", "auto_map", "source")
"""Keys of a config that are the same for every model, or that tell where it came from."""


class Missing(Enum):
    """The value of a setting that a model does not have."""

    MISSING = "missing"


@dataclass(frozen=True)
class Change:
    """A setting that differs, or a part of the config (a block, a mixer, a preset) that only one model has."""

    path: str
    """Its keys in the config, joined by dots."""
    a: Any
    b: Any


@dataclass(frozen=True)
class ValueDifference:
    """How far two tensors of one shape are apart."""

    absolute: float
    """max |a - b|; infinite where one is infinite or not a number and the other is something else."""
    relative: float
    """max |a - b| / max |a|, the maxima taken over the tensor; infinite if a is zero everywhere and b is not."""
    elements: int
    """How many elements differ."""
    nan: int
    """How many of them are not a number in one of the tensors only."""


@dataclass(frozen=True)
class TensorDifference:
    """A tensor of both models that differs in shape, dtype or values."""

    name: str
    a: TensorInfo
    b: TensorInfo
    values: ValueDifference | None
    """None if the shapes differ, or no value does."""

    @property
    def rank(self) -> tuple[float, float]:
        """What differences are sorted by: relative and absolute difference, other shapes beyond all others."""
        if self.a.shape != self.b.shape:
            return math.inf, math.inf
        return (self.values.relative, self.values.absolute) if self.values else (0.0, 0.0)


@dataclass(frozen=True)
class Diff:
    """All that differs between the models A and B."""

    config: tuple[Change, ...]
    only_a: Schema
    """Tensors that B lacks."""
    only_b: Schema
    """Tensors that A lacks."""
    tensors: tuple[TensorDifference, ...]
    """Tensors of both that differ, the largest relative difference first."""
    equal_tensors: int
    """How many tensors do not differ."""

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        return not (self.config or self.only_a or self.only_b or self.tensors)

    def to_json_dict(self) -> dict[str, Any]:
        """All of it as JSON values. A key is left out where a model lacks a setting; infinite differences are null."""
        return {
            "equal": self.equal,
            "config": [_json_of_change(change) for change in self.config],
            "only_in_a": {name: _json_of_info(info) for name, info in self.only_a.items()},
            "only_in_b": {name: _json_of_info(info) for name, info in self.only_b.items()},
            "tensors": [_json_of_tensor(tensor) for tensor in self.tensors],
            "equal_tensors": self.equal_tensors,
        }


def compare(a: Checkpoint, b: Checkpoint, progress: Advance = silent) -> Diff:
    """Compare two checkpoints of any formats, under our names: one tensor at a time, large ones some rows at a time.

    Where a block has one mixer in one model and a stochastic mixer in the other, the one is compared with the other's
    main mixer. What the configs say of where the weights came from is left out. `progress` is called with bytes of A.
    """
    names_a = _common_names(a.schema, a.native.spec, b.native.spec)
    names_b = _common_names(b.schema, b.native.spec, a.native.spec)
    both = [name for name in names_a if name in names_b]
    found = []
    for name in both:
        left, right = _Rows(a, names_a[name]), _Rows(b, names_b[name])
        values = None
        if left.info.shape == right.info.shape:
            values = _compare_values(left, right, progress)
        else:
            progress(left.info.bytes)
        if values or left.info != right.info:
            found.append(TensorDifference(name, left.info, right.info, values))
    return Diff(
        compare_configs(a.native, b.native),
        {name: a.schema[own] for name, own in names_a.items() if name not in names_b},
        {name: b.schema[own] for name, own in names_b.items() if name not in names_a},
        tuple(sorted(found, key=lambda tensor: tensor.rank, reverse=True)),
        len(both) - len(found),
    )


def bytes_to_compare(a: Checkpoint, b: Checkpoint) -> int:
    """What the progress of `compare` adds up to."""
    names = _common_names(a.schema, a.native.spec, b.native.spec)
    others = _common_names(b.schema, b.native.spec, a.native.spec)
    return sum(a.schema[own].bytes for name, own in names.items() if name in others)


def compare_configs(a: NativeConfig, b: NativeConfig) -> tuple[Change, ...]:
    """The settings that differ, leaf by leaf. Patterns that lay out the same layers are equal."""
    return tuple(_changes("", _comparable(a, b.spec), _comparable(b, a.spec)))


def _comparable(native: NativeConfig, other: ModelSpec) -> dict[str, Any]:
    """A config as JSON values, without what says nothing, its blocks' mixers put as in `other` (see `compare`)."""
    config = {key: value for key, value in native.to_json_dict().items() if key not in _SAYS_NOTHING}
    decoder = config["spec"]["decoder"]
    decoder["pattern"] = pattern(native.spec)
    for name, block in native.spec.decoder.blocks.items():
        main = _main_of_other(block, other.decoder.blocks.get(name))
        if main is not None:
            dumped = decoder["blocks"][name]["mixer"]
            decoder["blocks"][name]["mixer"] = {"type": dumped["type"], "main": main, "mixers": {main: dumped}}
    return config


def _changes(path: str, a: Any, b: Any) -> Iterator[Change]:
    left, right = _by_key(a), _by_key(b)
    if left is not None and right is not None:
        for key in (*left, *(key for key in right if key not in left)):
            below = f"{path}.{key}" if path else str(key)
            yield from _changes(below, left.get(key, Missing.MISSING), right.get(key, Missing.MISSING))
    elif a != b:
        yield Change(path, a, b)


def _by_key(value: Any) -> Mapping[Any, Any] | None:
    """What a setting is made of: a mapping, or the mappings of a list by number. None for a leaf."""
    if isinstance(value, list) and all(isinstance(item, Mapping) for item in value):
        return dict(enumerate(value))
    return value if isinstance(value, Mapping) else None


def _common_names(schema: Schema, spec: ModelSpec, other: ModelSpec) -> dict[str, str]:
    """The name that each tensor is compared under -> its own name."""
    inner: dict[str, str] = {}
    there = dict(zip(other.decoder.weight_keys, other.decoder.layers, strict=True))
    for key, block in zip(spec.decoder.weight_keys, spec.decoder.layers, strict=True):
        main = _main_of_other(block, there.get(key))
        if main is not None:
            inner[f"model.layers.{key}.mixer."] = f"model.layers.{key}.mixer.mixers.{main}."
    names = {}
    for name in schema:
        layer, mixer, rest = name.partition(".mixer.")
        names[inner.get(layer + mixer, layer + mixer) + rest] = name
    return names


def _main_of_other(block: BlockSpec, other: BlockSpec | None) -> str | None:
    """The name of the main mixer of `other` if only that one is stochastic."""
    if other is None or isinstance(block.mixer, StochasticMixerSpec):
        return None
    return other.main if isinstance(other.mixer, StochasticMixerSpec) else None


class _Rows:
    """A tensor of a checkpoint under our names, read some rows at a time."""

    def __init__(self, checkpoint: Checkpoint, name: str):
        self.info = checkpoint.schema[name]
        self._name = name
        self._source = checkpoint.source
        self._expression = checkpoint.plan.expressions[name]
        self._whole: Tensor | None = None

    def read(self, start: int, stop: int) -> Tensor:
        """Rows `start` up to `stop`; of a tensor without dimensions, all of it."""
        schema = self._source.schema
        if self._whole is None and self.info.shape:
            piece = simplify(Slice(self._expression, 0, start, stop), schema)
            if not isinstance(piece, Slice) or region_read(piece, schema):
                return evaluate(piece, self._source, 0, self._name)
        # Rows of what is permuted or joined otherwise are not rows of the source: it is made once, as a whole.
        if self._whole is None:
            self._whole = evaluate(self._expression, self._source, 0, self._name)
        return self._whole[start:stop] if self.info.shape else self._whole


def _compare_values(a: _Rows, b: _Rows, progress: Advance) -> ValueDifference | None:
    """How far two tensors of one shape are apart; None if they are equal, NaNs in the same places included."""
    if not a.info.elements:
        return None
    rows = a.info.shape[0] if a.info.shape else 1
    step = max(1, _COMPARED_AT_ONCE * rows // a.info.elements)
    absolute, largest, elements, nan = 0.0, 0.0, 0, 0
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        left, right = a.read(start, stop), b.read(start, stop)
        largest = max(largest, _largest(left))
        if left.dtype != right.dtype or not torch.equal(left, right):
            left, right = left.double(), right.double()
            only_one = left.isnan() ^ right.isnan()
            differ = (left != right) & ~(left.isnan() & right.isnan())
            # Equal infinities are not apart, though their difference is no number.
            apart = (left - right).abs_().masked_fill_(~differ, 0.0).masked_fill_(only_one, math.inf)
            absolute = max(absolute, float(apart.max()))
            elements += int(differ.sum())
            nan += int(only_one.sum())
        progress(a.info.bytes * (stop - start) / rows)
    if not elements:
        return None
    return ValueDifference(absolute, absolute / largest if largest else math.inf, elements, nan)


def _largest(tensor: Tensor) -> float:
    """The largest finite magnitude, 0 if there is none."""
    low, high = (float(edge) for edge in tensor.aminmax())
    if math.isfinite(low) and math.isfinite(high):
        return max(-low, high)
    return float(tensor.double().abs().nan_to_num_(0.0, 0.0).max())


def _json_of_change(change: Change) -> dict[str, Any]:
    values = {side: value for side, value in (("a", change.a), ("b", change.b)) if value is not Missing.MISSING}
    return {"path": change.path, **values}


def _json_of_info(info: TensorInfo) -> dict[str, Any]:
    return {"shape": list(info.shape), "dtype": info.dtype}


def _json_of_tensor(tensor: TensorDifference) -> dict[str, Any]:
    values = tensor.values
    measured = values and {
        "max_absolute": values.absolute if math.isfinite(values.absolute) else None,
        "max_relative": values.relative if math.isfinite(values.relative) else None,
        "elements": values.elements,
        "nan": values.nan,
    }
    return {"name": tensor.name, "a": _json_of_info(tensor.a), "b": _json_of_info(tensor.b), "values": measured}
