"""What is in a checkpoint, at a glance."""

from itertools import groupby

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from gearshift.formats import Checkpoint, NativeConfig
from gearshift.model.schema import parameter_counts, schema
from gearshift.spec import MixerSpec, ModelSpec, Placement, StochasticMixerSpec

CONTEXT = 8192


def summary(checkpoint: Checkpoint) -> RenderableType:
    """A checkpoint as a person takes it in: sizes, each block once, the pattern, the presets."""
    native = checkpoint.native
    spec = native.spec
    parts: list[RenderableType] = [_heading(checkpoint), Text(f"pattern     {pattern(spec)}")]
    parts += [_block(name, native) for name in spec.decoder.blocks]
    parts.append(_placements(native))
    return Group(*parts)


def pattern(spec: ModelSpec) -> str:
    """The layers' blocks, run-length encoded."""
    runs = ((name, len(list(run))) for name, run in groupby(spec.decoder.layout))
    return ", ".join(name if count == 1 else f"{name} x {count}" for name, count in runs)


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


def _heading(checkpoint: Checkpoint) -> Text:
    native, spec = checkpoint.native, checkpoint.native.spec
    tensors = schema(spec, native.dtype).values()
    total, size = sum(info.elements for info in tensors), sum(info.bytes for info in tensors)
    lines = [
        f"{checkpoint.path}  ({checkpoint.format.name}, {native.dtype})",
        *([f"from        {_source(native)}"] if native.source else []),
        f"layers      {spec.decoder.num_layers}, hidden {spec.hidden_size:,}, vocabulary {spec.vocab_size:,}"
        f"{', tied embeddings' if spec.tie_embeddings else ''}, context {spec.max_positions:,}",
        f"parameters  {total:,} ({_size(size)}), {active_parameters(spec, spec.main):,} active under main",
    ]
    return Text("\n".join(lines))


def _source(native: NativeConfig) -> str:
    return ", ".join(f"{key}: {value}" for key, value in native.source.items())


def _block(name: str, native: NativeConfig) -> Table:
    spec, block = native.spec, native.spec.decoder.blocks[name]
    counts, _ = parameter_counts(spec)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", title_justify="left", title_style="bold")
    shared = ", one set of weights" if block.shared_weights else ""
    table.title = f"block {name} ({spec.decoder.layout.count(name)} layers{shared}), MLP {describe_settings(block.mlp)}"
    for column in ("mixer", "settings", "parameters", "state a token", "state a sequence"):
        table.add_column(column, justify="left" if column in ("mixer", "settings") else "right")
    main = block.main if isinstance(block.mixer, StochasticMixerSpec) else None
    for mixer_name, mixer in block.mixers.items():
        grows = sum(t.bytes(1, native.dtype) for t in mixer.state() if t.grows and t.max_tokens is None)
        fixed = sum(t.bytes(10**9, native.dtype) for t in mixer.state() if not t.grows or t.max_tokens is not None)
        label = f"{mixer_name} (main)" if mixer_name == main else mixer_name
        table.add_row(label, describe_settings(mixer), f"{counts[name, mixer_name]:,}", _size(grows), _size(fixed))
    return table


def _placements(native: NativeConfig) -> Table:
    spec = native.spec
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", title_justify="left", title_style="bold")
    table.title = "presets" if native.presets else "no presets; under main:"
    for column in ("name", "parameters", f"state at {CONTEXT:,} tokens", "placement"):
        table.add_column(column, justify="left" if column in ("name", "placement") else "right")
    for name, placement in {"main": spec.main, **native.presets}.items():
        label = f"{name} (default)" if name == native.default_preset else name
        state = _size(spec.state_bytes(placement, CONTEXT, native.dtype))
        table.add_row(label, f"{active_parameters(spec, placement):,}", state, str(placement))
    return table


def describe_settings(spec: MixerSpec | object) -> str:
    """The settings that are not at their defaults, in one line."""
    fields = type(spec).model_fields  # type: ignore[attr-defined]
    shown = [getattr(spec, "type", "")]
    for name, field in fields.items():
        value = getattr(spec, name)
        if name == "type" or value == field.default:
            continue
        if hasattr(value, "model_fields"):
            value = f"({describe_settings(value)})"
        shown.append(f"{name} {value}")
    return " ".join(shown)


def _size(count: int) -> str:
    """A number of bytes with a unit."""
    if count == 0:
        return "0"
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count} B"
