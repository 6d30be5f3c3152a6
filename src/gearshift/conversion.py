"""From a checkpoint to a supernet and from a supernet to any of its placements: `convert`, `export`, `load`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoTokenizer

from gearshift.formats import FORMATS, Checkpoint, NativeConfig, choose_format, open_checkpoint, write_checkpoint
from gearshift.formats.documents import read_json, write_json
from gearshift.model import GearshiftConfig, GearshiftForCausalLM
from gearshift.plan import Plan
from gearshift.plan.execute import evaluate, materialise
from gearshift.progress import Advance
from gearshift.spec import ModelSpec, resolve_placement
from gearshift.spec.parts import DTYPE_BYTES
from gearshift.surgery import Surgery, operate, prune


@dataclass(frozen=True)
class Conversion:
    """A checkpoint about to become another one: all is checked, nothing is read."""

    checkpoint: Checkpoint
    native: NativeConfig
    """What the result will be."""
    plan: Plan
    """From the checkpoint's own tensors to the result's."""
    config: dict[str, Any]
    """The result's `config.json`."""
    format: str
    """The result's format."""
    seed: int = 0
    reason: str = ""
    """Why this format was chosen, where nobody named one."""

    @property
    def bytes(self) -> int:
        """The size of the result's tensors."""
        return sum(info.bytes for info in self.plan.target.values())

    def write(self, out: str | Path, overwrite: bool = False, progress: Advance | None = None) -> None:
        """Write the result to the folder `out`. Whole or not at all; run again, it goes on (see `write_checkpoint`).

        ValueError if `out` may not be replaced, or if it is, holds or lies in the checkpoint that it is made from.
        """
        here, source = Path(out).resolve(), self.checkpoint.path.resolve()
        if here == source or here in source.parents or (source.is_dir() and source in here.parents):
            raise ValueError(f"{out} is, holds or lies in the checkpoint it would be made from: choose another folder")

        def extras(folder: Path) -> None:
            self.checkpoint.copy_extras(folder)
            FORMATS[self.format].write_companions(folder)

        write_checkpoint(
            Path(out),
            plan=self.plan,
            source=self.checkpoint.source,
            config=self.config,
            extras=extras,
            overwrite=overwrite,
            seed=self.seed,
            fingerprint=self.checkpoint.fingerprint,
            progress=progress,
        )


def convert(
    source: str | Path, surgeries: Sequence[Surgery] = (), dtype: str | None = None, allow_pickle: bool = False
) -> Conversion:
    """Plan the conversion of a checkpoint of any format to a Gearshift one, changed by surgeries.

    Args:
        source: a folder, a .gguf file, a .yaml or .json file with a spec, or a hub name.
        surgeries: what to change, in order.
        dtype: of all weights; the source's if None.
        allow_pickle: whether weights may be read from pickles (see `open_checkpoint`).

    Raises FileNotFoundError or ValueError, before any weight is read, for what is wrong with either.
    """
    if dtype is not None and dtype not in DTYPE_BYTES:
        raise ValueError(f"unknown dtype {dtype!r}: choose one of {', '.join(DTYPE_BYTES)}")
    checkpoint = open_checkpoint(source, allow_pickle=allow_pickle)
    spec, plan = operate(checkpoint.native.spec, checkpoint.schema, surgeries, dtype)
    native = replace(_with_spec(checkpoint.native, spec), dtype=dtype or checkpoint.native.dtype)
    return Conversion(
        checkpoint, native, checkpoint.plan.compose(plan), native.to_json_dict(), "gearshift", _seed(surgeries)
    )


def export(
    model: str | Path, placement: str | None = None, format: str = "auto", merge_lora: bool = False
) -> Conversion:
    """Plan the export of a model, pruned to one placement, to a checkpoint of its own.

    Args:
        model: a folder, a .gguf file, a hub name, or the folder of a training run, finished or not.
        placement: what to prune to; may be None only where there is nothing to choose, or where the format named has
            supernets of its own.
        format: `auto`, or a format's name. `auto` takes a native transformers class if one can express the placement.
        merge_lora: whether to merge LoRA adapters into the weights (see `gearshift.surgery.merge`).

    Raises ValueError if the placement does not fit, if the format cannot express it, or if there is nothing to merge.
    """
    if format != "auto" and format not in FORMATS:
        known = ", ".join(name for name in FORMATS if FORMATS[name].writable)
        raise ValueError(f"unknown format {format!r}: choose auto, {known}")
    checkpoint = _open(model)
    if merge_lora:
        from gearshift.surgery.merge import merged  # it needs a package that other exports do without

        checkpoint = merged(checkpoint)
    native, plan = checkpoint.native, checkpoint.plan
    if placement is not None or not native.spec.is_supernet:
        chosen = native.spec.main
        if placement is not None:
            chosen = resolve_placement(placement, native.presets, native.spec.choices)
        spec, pruning = prune(native.spec, checkpoint.schema, chosen)
        plan = plan.compose(pruning)
    elif format in ("auto", "gearshift") or not FORMATS[format].can_express(native):
        presets = ", ".join(native.presets) or "none yet"
        raise ValueError(f"this model offers a choice of mixers: name a --placement (its presets: {presets})")
    else:
        spec = native.spec
    native = replace(native, spec=spec, presets={}, default_preset=None)
    target, reason = choose_format(native) if format == "auto" else (FORMATS[format], "")
    config = target.to_config(native)
    if target.name != "gearshift":
        plan = plan.compose(target.plan(spec, plan.target).invert())
    return Conversion(checkpoint, native, plan, config, target.name, 0, reason)


def _open(model: str | Path) -> Checkpoint:
    """A checkpoint, or what a training run has learnt so far."""
    if not (Path(model) / "recipe.json").is_file():
        return open_checkpoint(model)
    from gearshift.train.unfinished import open_run  # it needs what other exports do without

    return open_run(Path(model))


def export_adapters(model: str | Path, out: str | Path, overwrite: bool = False) -> None:
    """Write the LoRA adapters of a model, and nothing else, to the folder `out`, as PEFT does (see `write_adapters`).

    ValueError if the model has none, or if `out` may not be replaced.
    """
    from gearshift.model.adapters import write_adapters  # it needs a package that other exports do without

    checkpoint = _open(model)

    def read(name: str) -> torch.Tensor:
        return evaluate(checkpoint.plan.expressions[name], checkpoint.source, 0, name)

    write_adapters(checkpoint.native.spec, read, out, overwrite)


def load(source: str | Path, dtype: str | None = None) -> tuple[GearshiftForCausalLM, Any]:
    """A model of any format in memory, in evaluation mode, and its tokenizer. Gearshift folders load as they are."""
    checkpoint = open_checkpoint(source)
    return load_model(checkpoint, dtype or checkpoint.native.dtype).eval(), load_tokenizer(checkpoint)


def load_model(checkpoint: Checkpoint, dtype: str = "auto") -> GearshiftForCausalLM:
    """The model of a checkpoint of any format, in memory. Of dtype `auto`, its weights are as they are stored."""
    if checkpoint.format.name == "gearshift":
        # Its config as it was understood: the file may have an older layout.
        config = _config(checkpoint.native)
        return GearshiftForCausalLM.from_pretrained(checkpoint.path, config=config, dtype=dtype)
    model = _in_memory(checkpoint)
    return model if dtype == "auto" else model.to(getattr(torch, dtype))


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The checkpoint's tokenizer. ValueError if it has none."""
    with TemporaryDirectory() as folder:
        checkpoint.copy_extras(Path(folder))
        try:
            return AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{checkpoint.path} has no tokenizer that can be loaded: {str(error).splitlines()[0]}"
            ) from None


def save_presets(folder: str | Path, presets: dict[str, Any], default: str | None = None) -> None:
    """Name placements in a Gearshift checkpoint's config, beside those it has. ValueError if one does not fit."""
    path = Path(folder) / "config.json"
    native = NativeConfig.from_json_dict(read_json(path))
    native = replace(native, presets={**native.presets, **presets}, default_preset=default or native.default_preset)
    write_json(path, native.to_json_dict())


def _config(native: NativeConfig) -> GearshiftConfig:
    presets = {name: str(placement) for name, placement in native.presets.items()}
    return GearshiftConfig(native.spec, presets, native.default_preset, native.source, **native.extras)


def _in_memory(checkpoint: Checkpoint) -> GearshiftForCausalLM:
    native = checkpoint.native
    with torch.device("meta"):
        model = GearshiftForCausalLM(_config(native))
    weights = {name: tensor.clone() for name, tensor in materialise(checkpoint.plan, checkpoint.source).items()}
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    return model


def _with_spec(native: NativeConfig, spec: ModelSpec) -> NativeConfig:
    """The config with another spec, and those presets that still fit it."""
    kept = {}
    for name, placement in native.presets.items():
        try:
            kept[name] = placement.validate(spec.choices)
        except ValueError:
            continue
    default = native.default_preset if native.default_preset in kept else None
    return replace(native, spec=spec, presets=kept, default_preset=default)


def _seed(surgeries: Sequence[Surgery]) -> int:
    seeds = {surgery.seed for surgery in surgeries if surgery.seed is not None}
    if len(seeds) > 1:
        raise ValueError(f"the surgeries name different seeds, {sorted(seeds)}: one conversion has one")
    return seeds.pop() if seeds else 0
