"""Adapters of linear layers (LoRA, arXiv 2106.09685), on PEFT's layers: building, starting, saving and loading them.

In a checkpoint the weights beside which adapters stand keep their plain names (`q_proj.weight`), and the adapters are
tensors of their own (`q_proj.lora_A.default.weight`, `q_proj.lora_B.default.weight`).
"""

import json
import shutil
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gearshift.model.adapter_names import BASE
from gearshift.model.block import Block, StochasticMixer
from gearshift.model.schema import skeleton
from gearshift.plan import Constant, Initialiser, Uniform
from gearshift.spec import LoraSpec, ModelSpec

try:
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners import lora
    from peft.utils.other import get_pattern_key
except ImportError as error:
    raise ImportError(
        f'this model has LoRA adapters, which need the package peft ({error}): pip install "gearshift[lora]"'
    ) from error

if TYPE_CHECKING:
    from gearshift.model.modeling import GearshiftPreTrainedModel

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""What PEFT calls the files of a folder of adapters."""
_WEIGHTS = ("weight", "bias")
_NAME = "default"
_PREFIX = "base_model.model."


class AdaptedLinear(lora.Linear):
    """PEFT's layer, its base weights under their plain names: `weight` and `bias`, not `base_layer.weight`."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.register_state_dict_post_hook(_to_plain)
        self.register_load_state_dict_pre_hook(_from_plain)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Give the base layer a new weight or bias: how transformers loads what it finds under a plain name."""
        self.base_layer.register_parameter(name, param)

    def starts(self) -> dict[str, Initialiser]:
        """A as PEFT starts it, uniform within 1 / sqrt(inputs); B is zero, so that nothing is added at first."""
        bound = self.in_features**-0.5
        return {f"lora_A.{_NAME}.weight": Uniform(-bound, bound), f"lora_B.{_NAME}.weight": Constant(0.0)}


def _to_plain(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    for name in _WEIGHTS:
        if prefix + BASE + name in state:
            state[prefix + name] = state.pop(prefix + BASE + name)


def _from_plain(module: nn.Module, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
    for name in _WEIGHTS:
        if prefix + name in state:
            state[prefix + BASE + name] = state.pop(prefix + name)


def adapt(block: Block, spec: LoraSpec) -> None:
    """Give the linear layers of a block that `spec` targets their adapters, and freeze all else in it.

    ValueError if there are none.
    """
    inside = "mixer.mixers." if isinstance(block.mixer, StochasticMixer) else None
    layers = {path: _target(path, inside) for path, module in block.named_modules() if isinstance(module, nn.Linear)}
    wanted = [path for path, name in layers.items() if any(fnmatchcase(name, glob) for glob in spec.targets)]
    if not wanted:
        globs, known = ", ".join(spec.targets), ", ".join(dict.fromkeys(layers.values()))
        raise ValueError(f"the targets of lora ({globs}) match no linear layer of the block: it has {known}")
    config = LoraConfig(r=spec.rank, lora_alpha=spec.alpha, lora_dropout=spec.dropout, target_modules=wanted)
    config._register_custom_module({nn.Linear: AdaptedLinear})
    inject_adapter_in_model(config, block, _NAME)


def _target(path: str, inside: str | None) -> str:
    """The path of a layer without the name of the mixer that it lies in."""
    if inside is None or not path.startswith(inside):
        return path
    return f"mixer.{path.removeprefix(inside).partition('.')[2]}"


def layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    """The layers that have adapters, by their paths."""
    return {path: module for path, module in model.named_modules() if isinstance(module, AdaptedLinear)}


def adapter_scales(spec: ModelSpec) -> dict[str, float]:
    """Path of a layer that has an adapter -> alpha / rank."""
    return {path: layer.scaling[_NAME] for path, layer in layers(skeleton(spec)).items()}


def adapter_names(spec: ModelSpec) -> dict[str, str]:
    """The names of a model's adapter tensors: ours -> PEFT's, for an adapter of the same model without them."""
    names = [f"{path}.lora_{part}.{_NAME}.weight" for path in layers(skeleton(spec)) for part in "AB"]
    return {name: f"{_PREFIX}{name.removesuffix(f'.{_NAME}.weight')}.weight" for name in names}


def adapter_config(spec: ModelSpec) -> LoraConfig:
    """What PEFT needs to know of a model's adapters. It has one dropout for all: 0 where blocks differ in it."""
    adapted = layers(skeleton(spec))
    ranks = {path: layer.r[_NAME] for path, layer in adapted.items()}
    alphas = {path: _whole(layer.lora_alpha[_NAME]) for path, layer in adapted.items()}
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    dropouts = {getattr(layer.lora_dropout[_NAME], "p", 0.0) for layer in adapted.values()}
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


def save_adapters(model: "GearshiftPreTrainedModel", folder: str | Path, overwrite: bool = False) -> None:
    """Write a model's adapters, and nothing else, to a folder (see `write_adapters`)."""
    write_adapters(model.spec, model.state_dict().__getitem__, folder, overwrite)


def load_adapters(model: "GearshiftPreTrainedModel", folder: str | Path) -> None:
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
        if alpha != layer.lora_alpha[_NAME]:
            raise ValueError(
                f"{folder}: the adapter of {path} has alpha {alpha}, and the spec's lora {layer.lora_alpha[_NAME]}"
            )


def _whole(value: float) -> float:
    """As PEFT writes it: an int where it is one."""
    return int(value) if float(value).is_integer() else value
