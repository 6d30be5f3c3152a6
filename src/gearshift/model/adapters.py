"""A model's adapters as a folder of their own, as PEFT writes and reads it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gearshift.model.lora import ADAPTER, layers
from gearshift.model.modeling import GearshiftPreTrainedModel
from gearshift.model.schema import skeleton
from gearshift.spec import ModelSpec

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""What PEFT calls the files of a folder of adapters."""
_PREFIX = "base_model.model."


def adapter_scales(spec: ModelSpec) -> dict[str, float]:
    """Path of a layer that has an adapter -> alpha / rank."""
    return {path: layer.scaling[ADAPTER] for path, layer in layers(skeleton(spec)).items()}


def adapter_names(spec: ModelSpec) -> dict[str, str]:
    """The names of a model's adapter tensors: ours -> PEFT's, for an adapter of the same model without them."""
    names = [f"{path}.lora_{part}.{ADAPTER}.weight" for path in layers(skeleton(spec)) for part in "AB"]
    return {name: f"{_PREFIX}{name.removesuffix(f'.{ADAPTER}.weight')}.weight" for name in names}


def adapter_config(spec: ModelSpec) -> LoraConfig:
    """What PEFT needs to know of a model's adapters. It has one dropout for all: 0 where blocks differ in it."""
    adapted = layers(skeleton(spec))
    ranks = {path: layer.r[ADAPTER] for path, layer in adapted.items()}
    alphas = {path: _whole(layer.lora_alpha[ADAPTER]) for path, layer in adapted.items()}
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    dropouts = {getattr(layer.lora_dropout[ADAPTER], "p", 0.0) for layer in adapted.values()}
    return LoraConfig(
        task_type="CAUSAL_LM",
        inference_mode=True,
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropouts.pop() if len(dropouts) == 1 else 0.0,
        target_modules=list(adapted),
        rank_pattern={path: value for path, value in ranks.items() if value != rank},
        alpha_pattern={path: value for path, value in alphas.items() if value != alpha},
    )


def write_adapters(spec: ModelSpec, read: Callable[[str], Tensor], folder: str | Path, overwrite: bool = False) -> None:
    """Write the adapters of a model, which `read` gives by our names, to `folder` as PEFT does. Whole or not at all.

    `PeftModel.from_pretrained` loads them onto the same model without LoRA. ValueError if the model has none, or if
    there is something at `folder`, unless that is adapters and `overwrite` allows it.
    """
    if not spec.has_lora:
        raise ValueError("this model has no LoRA adapters: no block of it has lora")
    folder = Path(folder)
    _check_free(folder, overwrite)
    settings = adapter_config(spec).to_dict()
    # PEFT keeps these in a set, whose order changes from run to run.
    settings["target_modules"] = sorted(settings["target_modules"])
    fresh = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    tensors = {theirs: read(ours).detach().cpu().contiguous() for ours, theirs in adapter_names(spec).items()}
    save_file(tensors, fresh / WEIGHTS, {"format": "pt"})
    (fresh / CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if folder.exists():
        shutil.rmtree(folder)
    fresh.rename(folder)


def _check_free(folder: Path, overwrite: bool) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / CONFIG).is_file() or (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds something else than adapters: choose another folder")
    if not overwrite:
        raise ValueError(f"{folder} exists already: choose another folder, or pass --overwrite to replace it")


def save_adapters(model: GearshiftPreTrainedModel, folder: str | Path, overwrite: bool = False) -> None:
    """Write a model's adapters, and nothing else, to a folder (see `write_adapters`)."""
    write_adapters(model.spec, model.state_dict().__getitem__, folder, overwrite)


def load_adapters(model: GearshiftPreTrainedModel, folder: str | Path) -> None:
    """Give a model whose spec has `lora` the adapters in a folder that `save_adapters` or PEFT wrote.

    ValueError if they are not of the layers, the ranks and the scales that the spec says.
    """
    stored = load_file(Path(folder) / WEIGHTS)
    names = adapter_names(model.spec)
    if stray := sorted(stored.keys() ^ set(names.values())):
        where = "they have" if stray[0] in stored else "they lack"
        raise ValueError(f"the adapters in {folder} are of other layers than the model's: {where} {stray[0]!r}")
    _check_scales(model, LoraConfig.from_pretrained(folder), folder)
    state = model.state_dict()
    for ours, theirs in names.items():
        if state[ours].shape != stored[theirs].shape:
            shapes = f"{list(stored[theirs].shape)}, not {list(state[ours].shape)}"
            raise ValueError(f"{folder}: {theirs!r} is {shapes}: the rank in the spec's lora must be the same")
    model.load_state_dict({ours: stored[theirs] for ours, theirs in names.items()}, strict=False)


def _check_scales(model: nn.Module, config: LoraConfig, folder: str | Path) -> None:
    if config.use_rslora or config.use_dora:
        raise ValueError(f"{folder}: adapters with use_rslora or use_dora are not supported: train them without")
    for path, layer in layers(model).items():
        alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, path), config.lora_alpha)
        if alpha != layer.lora_alpha[ADAPTER]:
            raise ValueError(
                f"{folder}: the adapter of {path} has alpha {alpha}, and the spec's lora {layer.lora_alpha[ADAPTER]}"
            )


def _whole(value: float) -> float:
    """As PEFT writes it: an int where it is one."""
    return int(value) if float(value).is_integer() else value
