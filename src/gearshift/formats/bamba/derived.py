"""What Bamba's config says of its sizes a second time, or in other words."""

import math
from collections.abc import Mapping
from typing import Any

from gearshift.formats.dialect import Dialect
from gearshift.formats.read_config import INFINITY
from gearshift.spec import ModelSpec


class DerivedKeys(Dialect):
    """`mamba_expand` and `attn_rotary_emb` follow from other keys; no greatest time step is infinity."""

    def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
        share = values["rope_parameters.partial_rotary_factor"]
        head_dim = values.get("head_dim") or values["hidden_size"] // max(1, values["num_attention_heads"])
        rotated = values.get("attn_rotary_emb")
        # Where it is no share, the spec says so.
        known = isinstance(share, (int, float)) and 0 < share <= 1
        if known and rotated not in (None, int(head_dim * share)):
            raise ValueError(
                f"'attn_rotary_emb' is {rotated!r}, but transformers rotates {share} of {head_dim} channels"
            )
        limit = values["time_step_limit"]
        if isinstance(limit, (list, tuple)):
            limit = [None if bound == math.inf else bound for bound in limit]
        return {**values, "time_step_limit": limit}

    def write(self, config: dict[str, Any], spec: ModelSpec) -> dict[str, Any]:
        config = dict(config)
        low, high = config.pop("time_step_limit")
        if (low, high) not in ((0.0, None), (0.0, math.inf)):
            config["time_step_limit"] = [low, INFINITY if high in (None, math.inf) else high]
        mixers = {block.mixer.type: block.mixer.model_dump() for block in spec.decoder.blocks.values()}
        if mamba := mixers.get("mamba2"):
            channels = mamba["heads"] * mamba["head_dim"]
            if channels % spec.hidden_size:
                raise ValueError(f"{channels} channels of Mamba-2 are not a multiple of hidden_size {spec.hidden_size}")
            config["mamba_expand"] = channels // spec.hidden_size
        if attention := mixers.get("attention"):
            # Other engines than transformers rotate whole heads where it is not there.
            config["attn_rotary_emb"] = int(attention["head_dim"] * attention["rotary"]["share"])
        return config
