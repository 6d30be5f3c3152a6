"""Apriel's tensor names, and the order of what lies fused in them."""

from dataclasses import replace

from gearshift.formats.common import ATTENTION_WEIGHTS, JUNK, MLP_WEIGHTS, NORM_WEIGHTS, OUTER_WEIGHTS
from gearshift.formats.tensors import Fused, Tensors, Weight

_OURS = _THEIRS = "model.layers.{layer}.mixer"
_MAMBA, _DISCRETE, _GDN = ("mamba",), ("discrete",), ("gdn",)


def _fused(projections: str, kind: str) -> tuple[str, ...]:
    return tuple(f"{_OURS}.{name}_proj.{kind}" for name in projections.split())


def _one(ours: str, theirs: str, kinds: tuple[str, ...]) -> Weight:
    return Weight(f"{_OURS}.{ours}", f"{_THEIRS}.{theirs}", kinds=kinds)


_MAMBA_IN = "gate x b c"
_DISCRETE_IN = "x b c gate a"

TENSORS = Tensors(
    (
        *OUTER_WEIGHTS,
        *NORM_WEIGHTS,
        *MLP_WEIGHTS,
        *(replace(weight, kinds=("attention",)) for weight in ATTENTION_WEIGHTS),
        *(
            template
            for kind in ("weight", "bias")
            for template in (
                Fused(_fused(_MAMBA_IN, kind), f"{_THEIRS}.in_proj.{kind}", kinds=_MAMBA),
                _one(f"dt_down_proj.{kind}", f"dt_in_proj.{kind}", _MAMBA),
                _one(f"conv.{kind}", f"conv1d.{kind}", _MAMBA),
                Fused(_fused(_DISCRETE_IN, kind), f"{_THEIRS}.in_proj.{kind}", kinds=_DISCRETE),
                Fused(
                    tuple(f"{_OURS}.{name}_conv.{kind}" for name in "xbc"), f"{_THEIRS}.conv1d.{kind}", kinds=_DISCRETE
                ),
                _one(f"o_proj.{kind}", f"out_proj.{kind}", (*_MAMBA, *_DISCRETE)),
            )
        ),
        # Without other biases, the gate has its own.
        _one("gate_proj.bias", "z_bias", _DISCRETE),
        _one("dt_up_proj.weight", "dt_proj.weight", _MAMBA),
        _one("dt_bias", "dt_proj.bias", _MAMBA),
        _one("A_log", "A_log", _MAMBA),
        _one("D", "D", (*_MAMBA, *_DISCRETE)),
        Fused(_fused("q k v gate", "weight"), f"{_THEIRS}.in_proj_qkvz.weight", kinds=_GDN),
        Fused(_fused("b a", "weight"), f"{_THEIRS}.in_proj_ba.weight", kinds=_GDN),
        Fused(tuple(f"{_OURS}.{name}_conv.weight" for name in "qkv"), f"{_THEIRS}.convolution.weight", kinds=_GDN),
        *(_one(name, name, _GDN) for name in ("A_log", "dt_bias", "norm.weight")),
        _one("o_proj.weight", "out_proj.weight", _GDN),
    ),
    JUNK,
)
