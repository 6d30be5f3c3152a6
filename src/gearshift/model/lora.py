"""Adapters of linear layers (LoRA, arXiv 2106.09685), on PEFT's layers: building and starting them.

In a checkpoint the weights beside which adapters stand keep their plain names (`q_proj.weight`), and the adapters are
tensors of their own (`q_proj.lora_A.default.weight`, `q_proj.lora_B.default.weight`).
"""

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from gearshift.model.adapter_names import BASE
from gearshift.plan import Constant, Initialiser, Uniform
from gearshift.spec import LoraSpec, StochasticMixerSpec

try:
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners import lora
except ImportError as error:
    raise ImportError(
        f'this model has LoRA adapters, which need the package peft ({error}): pip install "gearshift[lora]"'
    ) from error

if TYPE_CHECKING:
    from gearshift.model.block import Block

ADAPTER = "default"
"""The name that PEFT's layers keep the one adapter under."""
_WEIGHTS = ("weight", "bias")


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
        return {f"lora_A.{ADAPTER}.weight": Uniform(-bound, bound), f"lora_B.{ADAPTER}.weight": Constant(0.0)}


def _to_plain(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    for name in _WEIGHTS:
        if prefix + BASE + name in state:
            state[prefix + name] = state.pop(prefix + BASE + name)


def _from_plain(module: nn.Module, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
    for name in _WEIGHTS:
        if prefix + name in state:
            state[prefix + BASE + name] = state.pop(prefix + name)


def adapt(block: "Block", spec: LoraSpec) -> None:
    """Give the linear layers of a block that `spec` targets their adapters, and freeze all else in it.

    ValueError if there are none.
    """
    inside = "mixer.mixers." if isinstance(block.spec.mixer, StochasticMixerSpec) else None
    layers = {path: _target(path, inside) for path, module in block.named_modules() if isinstance(module, nn.Linear)}
    wanted = [path for path, name in layers.items() if any(fnmatchcase(name, glob) for glob in spec.targets)]
    if not wanted:
        globs, known = ", ".join(spec.targets), ", ".join(dict.fromkeys(layers.values()))
        raise ValueError(f"the targets of lora ({globs}) match no linear layer of the block: it has {known}")
    config = LoraConfig(r=spec.rank, lora_alpha=spec.alpha, lora_dropout=spec.dropout, target_modules=wanted)
    config._register_custom_module({nn.Linear: AdaptedLinear})
    inject_adapter_in_model(config, block, ADAPTER)


def _target(path: str, inside: str | None) -> str:
    """The path of a layer without the name of the mixer that it lies in."""
    if inside is None or not path.startswith(inside):
        return path
    return f"mixer.{path.removeprefix(inside).partition('.')[2]}"


def layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    """The layers that have adapters, by their paths."""
    return {path: module for path, module in model.named_modules() if isinstance(module, AdaptedLinear)}
