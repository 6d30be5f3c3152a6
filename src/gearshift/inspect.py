"""What is in a checkpoint, at a glance."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from typing import Any

import yaml
from pydantic import BaseModel
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from gearshift.formats import Checkpoint, NativeConfig
from gearshift.model.schema import cost_table, parameter_counts, schema
from gearshift.spec import BlockSpec, MixerSpec, ModelSpec, Placement, StateTensor, StochasticMixerSpec

_MOST_PRESETS = 6
_MOST_ITEMS = 4
_SHOWN_ELSEWHERE = ("vocab_size", "hidden_size", "max_positions", "tie_embeddings", "decoder")


def summary(checkpoint: Checkpoint) -> RenderableType:
    """A checkpoint as a person takes it in: sizes, the pattern, each block once, the presets."""
    native = checkpoint.native
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("\nblock", no_wrap=True)
    for header in ("\nparams", "state a\ntoken", "state a\nsequence"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for row in _blocks(native):
        table.add_row(*row)
    table.add_row(Text("placement", style="dim"), "", "", "", Text("cost of a token at 8k, layers", style="dim"))
    for row in _placements(native):
        table.add_row(*row)
    return Group(_heading(checkpoint), table)


def resolved(native: NativeConfig) -> str:
    """The complete, explicit config as YAML; lists of plain values stand on one line."""
    return yaml.dump(native.to_json_dict(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def pattern(spec: ModelSpec) -> str:
    """The layers' blocks, run-length encoded, a repeated pattern as such: `4 x (local x 5, global), local x 2`."""
    layout = spec.decoder.layout
    period = next(size for size in range(1, len(layout) + 1) if all(map(str.__eq__, layout, layout[size:])))
    repeats = len(layout) // period
    if repeats == 1 or period == 1:
        return _runs(layout)
    rest = layout[repeats * period :]
    return f"{repeats} x ({_runs(layout[:period])})" + (f", {_runs(rest)}" if rest else "")


def active_parameters(spec: ModelSpec, placement: Placement) -> int:
    """Parameters that the model has once it is pruned to a placement. Shared blocks count once a mixer."""
    counts, _ = parameter_counts(spec)
    layout, keys = spec.decoder.layout, spec.decoder.weight_keys
    chosen = {(key, block, mixer) for key, block, mixer in zip(keys, layout, placement, strict=True)}
    everything = sum(info.elements for info in schema(spec, "float32").values())
    offered = {
        (key, block, mixer) for key, block, offered in zip(keys, layout, spec.choices, strict=True) for mixer in offered
    }
    return everything - sum(counts[block, mixer] for _, block, mixer in offered - chosen)


def describe_settings(spec: BaseModel) -> str:
    """The kind and the settings that are not at their defaults, in one line: `attention: heads 9, window 128`."""
    settings = ", ".join(_settings(spec, _defaults(spec)))
    kind = getattr(spec, "type", "")
    return f"{kind}: {settings}" if kind and settings else kind or settings


def _heading(checkpoint: Checkpoint) -> Table:
    native, spec = checkpoint.native, checkpoint.native.spec
    total = sum(info.elements for info in checkpoint.schema.values())
    size = _size(sum(info.bytes for info in checkpoint.schema.values()))
    parameters = f"{total:,}"
    if spec.is_supernet:
        parameters += f" in all, {active_parameters(spec, spec.main):,} under main"
    if idle := _idle_parameters(spec):
        parameters += f", of which a token reads {active_parameters(spec, spec.main) - idle:,}"
    model = [f"hidden {spec.hidden_size:,}", f"vocabulary {spec.vocab_size:,}", f"context {spec.max_positions:,}"]
    model += ["tied embeddings"] if spec.tie_embeddings else []
    model += _settings(spec, _defaults(spec), _SHOWN_ELSEWHERE)
    lines = {
        "model": f"{checkpoint.path} ({checkpoint.format.name}, {native.dtype}, {size})",
        "from": _origin(native.source),
        "sizes": ", ".join(model),
        "parameters": parameters,
        "layers": f"{spec.decoder.num_layers}: {pattern(spec)}",
        "every block": ", ".join(_common_notes(spec)),
    }
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in lines.items():
        if value:
            table.add_row(name, Text(value))
    return table


def _origin(source: Mapping[str, Any]) -> str:
    """Where the weights came from, without what is kept for the way back."""
    said = {key: value for key, value in source.items() if key != "kept" and value}
    return ", ".join(f"{key}: {'; '.join(value) if isinstance(value, list) else value}" for key, value in said.items())


def _blocks(native: NativeConfig) -> Iterator[tuple[RenderableType, ...]]:
    """For each block a row, and a row for each of its mixers; those that an earlier block has as well share one."""
    spec = native.spec
    counts, _ = parameter_counts(spec)
    common = _common_notes(spec)
    seen: dict[tuple[str, MixerSpec], str] = {}
    in_full: dict[str, MixerSpec] = {}
    for name, block in spec.decoder.blocks.items():
        layers = spec.decoder.layout.count(name)
        notes = [f"{layers} layer{'s' if layers > 1 else ''}"]
        notes += ["one set of weights"] if block.shared_weights else []
        notes += [note for note in _notes(block) if note not in common]
        yield Text(name, style="bold"), _count(_beside_mixers(spec, name)), "", "", Text(", ".join(notes))
        repeated: dict[str, list[str]] = {}
        near: dict[str, MixerSpec] = {}
        for mixer_name, mixer in block.mixers.items():
            is_main = isinstance(block.mixer, StochasticMixerSpec) and mixer_name == block.main
            label = f"{mixer_name} (main)" if is_main else mixer_name
            if (mixer_name, mixer) in seen:
                repeated.setdefault(seen[mixer_name, mixer], []).append(label)
                continue
            stated = _stated(mixer, spec.hidden_size)
            settings, complete = _mixer_settings(mixer_name, mixer, stated, in_full | near)
            near[mixer_name] = stated
            if complete:
                in_full[f"{mixer_name} of {name}"] = stated
            token, sequence = _state_sizes(mixer.state(), native.dtype)
            yield f"  {label}", _count(counts[name, mixer_name]), _size(token), _size(sequence), Text(settings)
        for earlier, labels in repeated.items():
            yield f"  as in {earlier}", "", "", "", Text(", ".join(labels))
        seen = dict.fromkeys(((key, block.mixers[key]) for key in near), name) | seen


def _notes(block: BlockSpec) -> list[str]:
    """The settings of a block beside its mixers'."""
    others = _settings(block, _defaults(block), ("mixer", "mlp", "shared_weights"))
    return [f"MLP {describe_settings(block.mlp)}", *others]


def _common_notes(spec: ModelSpec) -> list[str]:
    """Those notes that several blocks all share."""
    first, *others = map(_notes, spec.decoder.blocks.values())
    return [note for note in first if others and all(note in other for other in others)]


def _stated(mixer: MixerSpec, hidden_size: int) -> MixerSpec:
    """A resolved mixer without the settings that follow from the others."""
    stated = mixer.model_dump()
    for name in reversed(type(mixer).model_fields):
        fewer = {key: stated[key] for key in stated if key != name}
        try:
            if type(mixer).model_validate(fewer).resolved(hidden_size) == mixer:
                stated = fewer
        except ValueError:  # without it there is no such mixer
            continue
    return type(mixer).model_validate(stated)


def _mixer_settings(
    name: str, mixer: MixerSpec, stated: MixerSpec, others: Mapping[str, MixerSpec]
) -> tuple[str, bool]:
    """A mixer's settings, or how they differ from those of one of the `others` if that is shorter; whether in full."""
    full = ", ".join(_settings(stated, _defaults(stated))) if name == mixer.type else describe_settings(stated)
    ways = [full]
    followed = [key for key in type(mixer).model_fields if getattr(mixer, key) != getattr(stated, key)]
    for label, other in others.items():
        # What follows from the others' settings here must do so there.
        if other.type == mixer.type and all(getattr(other, key) == getattr(stated, key) for key in followed):
            changes = ", ".join(_settings(stated, other.model_dump()))
            ways.append(f"as {label}, but {changes}" if changes else f"as {label}")
    shortest = min(ways, key=len)
    return shortest, shortest == full


def _placements(native: NativeConfig) -> Iterator[tuple[RenderableType, ...]]:
    """A row for all-main and for each preset: what it holds, keeps and costs, and how many layers run each mixer."""
    spec = native.spec
    costs = cost_table(spec, native.dtype)
    named = {"main": spec.main, **native.presets}
    for name, placement in list(named.items())[: _MOST_PRESETS + 1]:
        label = f"{name} (default)" if name == (native.default_preset or "main") else name
        states = [tensor for layer in spec.state(placement) for tensor in layer]
        token, sequence = _state_sizes(states, native.dtype)
        layers = ", ".join(f"{mixer} {count}" for mixer, count in Counter(placement).most_common())
        share = costs.of(placement) / costs.of(spec.main)
        parameters = _count(active_parameters(spec, placement))
        yield label, parameters, _size(token), _size(sequence), Text(f"{100 * share:.0f} %, {layers}")
    if rest := list(named)[_MOST_PRESETS + 1 :]:
        yield f"and {len(rest)} more", "", "", "", Text(", ".join(rest))


def _state_sizes(states: Iterable[StateTensor], dtype: str) -> tuple[int, int]:
    """Bytes that each token adds for good, and the most bytes that a sequence of any length keeps beside them."""
    tensors = list(states)
    endless = [tensor for tensor in tensors if tensor.grows and tensor.max_tokens is None]
    bounded = [tensor for tensor in tensors if not tensor.grows or tensor.max_tokens is not None]
    return sum(t.bytes(1, dtype) for t in endless), sum(t.bytes(t.max_tokens or 0, dtype) for t in bounded)


def _idle_parameters(spec: ModelSpec) -> int:
    """Parameters that one token leaves unread: those of the experts it is not sent to."""
    blocks = dict(zip(spec.decoder.weight_keys, spec.decoder.layers, strict=True)).values()
    return sum(block.mlp.idle_parameters(spec.hidden_size) for block in blocks)


def _beside_mixers(spec: ModelSpec, block: str) -> int:
    """Parameters of one layer of a block, its mixers left out."""
    key = spec.decoder.weight_keys[spec.decoder.layout.index(block)]
    tensors = schema(spec, "float32").items()
    return sum(
        info.elements
        for name, info in tensors
        if name.startswith(f"model.layers.{key}.") and not name.startswith(f"model.layers.{key}.mixer.")
    )


def _runs(names: Iterable[str]) -> str:
    runs = ((name, len(list(run))) for name, run in groupby(names))
    return ", ".join(name if count == 1 else f"{name} x {count}" for name, count in runs)


def _defaults(spec: BaseModel) -> dict[str, Any]:
    fields = type(spec).model_fields
    values = {name: field.get_default(call_default_factory=True) for name, field in fields.items()}
    return {name: value.model_dump() if isinstance(value, BaseModel) else value for name, value in values.items()}


def _settings(spec: BaseModel, usual: Mapping[str, Any], without: tuple[str, ...] = ("type",)) -> list[str]:
    """The settings in which a spec differs from the dumped values `usual`, each in a few words."""
    words = []
    for name in type(spec).model_fields:
        value = getattr(spec, name)
        dumped = value.model_dump() if isinstance(value, BaseModel) else value
        if name in without or dumped == usual.get(name, value):
            continue
        words.append(_worded(name, value))
    return words


def _worded(name: str, value: Any) -> str:
    match value:
        case True:
            return name
        case False | None:
            return f"no {name}"
        case BaseModel():
            kind = [value.type] if getattr(value, "type", None) != _defaults(value).get("type") else []  # type: ignore[attr-defined]
            inner = ", ".join([*kind, *_settings(value, _defaults(value))])
            return f"{name} ({inner})" if inner else name
        case float():
            return f"{name} {value:g}"
        case [BaseModel(), *_]:
            return f"{len(value)} {name}"
        case tuple() | list() if len(value) > _MOST_ITEMS:
            return f"{name} ({len(value)} values)"
        case _:
            return f"{name} {value}"


def _count(count: int) -> str:
    """A number of parameters, short."""
    if count < 10_000:
        return f"{count:,}"
    return _scaled(count, (("B", 10**9), ("M", 10**6), ("K", 10**3)))


def _size(count: int) -> str:
    """A number of bytes with a unit."""
    if count < 1000:
        return f"{count} B" if count else "0"
    return _scaled(count, (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)))


def _scaled(count: int, units: tuple[tuple[str, int], ...]) -> str:
    # 999,950 would be shown as 1e+03 of the smaller unit.
    unit, scale = next((unit, scale) for unit, scale in units if count >= 0.9995 * scale)
    return f"{count / scale:.3g} {unit}"


class _Dumper(yaml.SafeDumper):
    """Safe YAML with its lists in flow style."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _flow(dumper: yaml.SafeDumper, items: list[Any]) -> yaml.Node:
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True)


_Dumper.add_representer(list, _flow)
