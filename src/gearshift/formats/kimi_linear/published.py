"""The layout that Kimi Linear's config was published in, beside the one of transformers' class."""

from collections.abc import Mapping, Sequence
from typing import Any

from gearshift.formats.dialect import Dialect
from gearshift.spec import ModelSpec

NAMES = {
    "max_position_embeddings": "model_max_length",
    "norm_topk_prob": "moe_renormalize",
    "n_group": "num_expert_group",
    "num_local_experts": "num_experts",
    "num_experts_per_tok": "num_experts_per_token",
    "n_shared_experts": "num_shared_experts",
}
"""Keys of the config class by the names that are written, which it translates."""

_INNER = {
    "head_dim": "linear_head_dim",
    "num_heads": "linear_num_heads",
    "short_conv_kernel_size": "linear_conv_kernel_dim",
}
_LAYERS = {"full_attn_layers": "full_attention", "kda_layers": "linear_attention"}
_OUTER = "linear_attn_config"
_DENSE_LAYERS = "first_k_dense_replace"
REPEATED = (*(f"{_OUTER}.{key}" for key in (*_INNER, *_LAYERS)), _DENSE_LAYERS, "num_key_value_heads")
"""Keys that say what others say too. Both are written, for there is code that reads either."""


class PublishedLayout(Dialect):
    """Some keys twice, and the width of the shared experts as their number."""

    # There are no rotary positions that they could speak of.
    beside_class = frozenset({"rope_scaling", "rope_theta"})

    def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
        for key, said in _repeated(values).items():
            if values.get(key) is not None and values[key] != said:
                raise ValueError(f"{key!r} is {values[key]!r}, but it follows from the other keys that it is {said!r}")
        shared, width = values["n_shared_experts"], values["moe_intermediate_size"]
        # The config class does not check what comes under another name.
        if not isinstance(shared, int) or not isinstance(width, int):
            raise ValueError(f"'num_shared_experts' must be a whole number, not {shared!r}")
        return {**values, "n_shared_experts": shared * width}

    def write(self, config: dict[str, Any], spec: ModelSpec) -> dict[str, Any]:
        config = dict(config)
        if "sparse" in config["mlp_layer_types"]:
            shared, width = config["n_shared_experts"], config["moe_intermediate_size"]
            if shared % width:
                raise ValueError(f"mlp.shared.intermediate_size {shared} is not a multiple of the experts' {width}")
            config["n_shared_experts"] = shared // width
        inner: dict[str, Any] = {}
        for key, said in _repeated(config).items():
            outer, _, name = key.rpartition(".")
            (inner if outer else config)[name] = said
        if _DENSE_LAYERS not in _repeated(config):
            config.pop(_DENSE_LAYERS, None)
        config[_OUTER] = inner
        return {NAMES.get(key, key): value for key, value in config.items()}


def _repeated(values: Mapping[str, Any]) -> dict[str, Any]:
    """What the keys in `REPEATED` must be. Those that can be anything are not there."""
    types, mlps = values["layer_types"], values["mlp_layer_types"]
    said = {f"{_OUTER}.{name}": values[key] for name, key in _INNER.items()}
    said |= {f"{_OUTER}.{name}": _numbers(types, kind) for name, kind in _LAYERS.items()}
    dense = [number - 1 for number in _numbers(mlps, "dense")]
    if dense == list(range(len(dense))):
        said[_DENSE_LAYERS] = len(dense)
    if "full_attention" in types:
        said["num_key_value_heads"] = values["num_attention_heads"]
    return said


def _numbers(types: Sequence[str], kind: str) -> list[int]:
    """The numbers, from 1, of the layers of a type."""
    return [number for number, given in enumerate(types, 1) if given == kind]
