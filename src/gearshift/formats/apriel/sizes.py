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
SECTION = "ssm_cfg"
"""The key that holds the settings of all state-space mixers."""
LAYOUT = "hybrid_block_layout"
"""The key that says what each layer is."""
DISCRETE = "m2d"
"""Its word for discrete Mamba-2."""
D_INNER = 4096
"""What an absent `d_inner` means; one that is null is another matter."""
_INNER = "ssm_cfg.d_inner"
_HEADS = "ssm_cfg.n_v_heads"


class Sizes(OldRotary):
    """`d_inner` is `expand` times the hidden size where it is null; heads of discrete Mamba-2 share it equally."""

    beside_class = frozenset({"layer_types"})

    def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
        if values.get(SECTION) is not None:
            raise ValueError(f"{SECTION!r} must hold a mapping, not {values[SECTION]!r}")
        expand, hidden = values.get("ssm_cfg.expand"), values["hidden_size"]
        inner, heads = values.get(_INNER, D_INNER), values.get(_HEADS, 32)
        if inner is None and type(hidden) is int and (expand is None or type(expand) is int):
            inner = hidden if expand is None else expand * hidden
        if type(inner) is not int or inner < 1:
            raise ValueError(f"{_INNER!r} and 'ssm_cfg.expand' must be whole numbers above zero, not {inner!r}")
        width = inner // heads if type(heads) is int and heads > 0 and inner % heads == 0 else None
        layout = values.get(LAYOUT)
        if width is None and isinstance(layout, list) and DISCRETE in layout:
            raise ValueError(
                f"{_HEADS!r} is {heads!r}, which does not divide {inner}, the channels that its heads share"
            )
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
                raise ValueError(
                    f"block {name!r} has {inner} channels in its heads where mamba has {section['d_inner']}, and it "
                    "has one key, 'ssm_cfg.d_inner', for both"
                )
            section["d_inner"] = inner
        return {**config, "ssm_cfg": section}
