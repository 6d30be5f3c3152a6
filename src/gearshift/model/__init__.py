"""From a spec to a model: the block, the stochastic mixer, the decoder, the HF classes, the generation cache."""

from gearshift.model.cache import GearshiftCache
from gearshift.model.config import GearshiftConfig
from gearshift.model.modeling import GearshiftForCausalLM, GearshiftModel
from gearshift.model.schema import cost_table, initial, schema

__all__ = [
    "GearshiftCache",
    "GearshiftConfig",
    "GearshiftForCausalLM",
    "GearshiftModel",
    "cost_table",
    "initial",
    "schema",
]
