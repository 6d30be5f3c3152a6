"""What a model is, in data. Nothing here imports torch."""

from gearshift.spec.base import Spec
from gearshift.spec.costs import CostTable, decode_cost
from gearshift.spec.model import BlockSpec, DecoderSpec, LoraSpec, ModelSpec, PredictionHeadSpec, StochasticMixerSpec
from gearshift.spec.parts import MixerSpec, MLPSpec, NormSpec, StateTensor
from gearshift.spec.placement import Placement, resolve_placement
from gearshift.spec.registry import MIXERS, MLPS, Kind

__all__ = [
    "MIXERS",
    "MLPS",
    "BlockSpec",
    "CostTable",
    "DecoderSpec",
    "Kind",
    "LoraSpec",
    "MLPSpec",
    "MixerSpec",
    "ModelSpec",
    "NormSpec",
    "Placement",
    "PredictionHeadSpec",
    "Spec",
    "StateTensor",
    "StochasticMixerSpec",
    "decode_cost",
    "resolve_placement",
]
