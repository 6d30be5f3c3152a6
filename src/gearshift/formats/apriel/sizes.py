"""Apriel's one number for the width of its state-space mixers, and ours for each of them."""

from collections.abc import Mapping
from typing import Any

from gearshift.formats.dialect import OldRotary
from gearshift.mixers.discrete_mamba2 import DiscreteMamba2Spec
from gearshift.spec import ModelSpec

HEAD_WIDTH = "ssm_cfg.(head width)"
"""A key of our own: channels of a head of discrete Mamba-2, which the config leaves to be computed."""
_LEFT_OUT = (("rope_scaling", None), ("layer_types", None))
"""Keys that its code does not write where they are null."""
_INNER = "ssm_cfg.d_inner"


class Sizes(OldRotary):
    """`d_inner` is `expand` times the hidden size where it is null; heads of discrete Mamba-2 share it equally."""

    beside_class = frozenset({"layer_types"})

    def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
        expand, hidden = values.get("ssm_cfg.expand", 1), values["hidden_size"]
        inner, heads = values.get(_INNER, 4096), values.get("ssm_cfg.n_v_heads", 32)
        if inner is None and type(expand) is int and type(hidden) is int:
            inner = expand * hidden
        if type(inner) is not int or inner < 1:
            raise ValueError(f"{_INNER!r} and 'ssm_cfg.expand' must be whole numbers above zero, not {inner!r}")
        width = inner // heads if type(heads) is int and heads > 0 and inner % heads == 0 else None
        return {**values, _INNER: inner, HEAD_WIDTH: width}

    def write(self, config: dict[str, Any], spec: ModelSpec) -> dict[str, Any]:
        config = {key: value for key, value in super().write(config, spec).items() if (key, value) not in _LEFT_OUT}
        section = dict(config["ssm_cfg"])
        del section[HEAD_WIDTH.partition(".")[2]]
        for name, block in spec.decoder.blocks.items():
            if not isinstance(block.mixer, DiscreteMamba2Spec):
                continue
            assert block.mixer.head_dim is not None
            inner = block.mixer.value_heads * block.mixer.head_dim
            others = [other.mixer.type for other in spec.decoder.blocks.values()]
            if "mamba" in others and section["d_inner"] != inner:
                raise LookupError(
                    f"block {name!r} has {inner} channels in its heads where mamba has {section['d_inner']}, and it "
                    "has one key, 'ssm_cfg.d_inner', for both"
                )
            section["d_inner"] = inner
        return {**config, "ssm_cfg": section}
