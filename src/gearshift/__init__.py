"""Gearshift: one checkpoint, many speeds. Importing it registers the model with transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from gearshift.model import GearshiftConfig, GearshiftForCausalLM, GearshiftModel
from gearshift.spec import ModelSpec, Placement

AutoConfig.register("gearshift", GearshiftConfig)
AutoModel.register(GearshiftConfig, GearshiftModel)
AutoModelForCausalLM.register(GearshiftConfig, GearshiftForCausalLM)

__version__ = "0.1.0"
__all__ = ["GearshiftConfig", "GearshiftForCausalLM", "GearshiftModel", "ModelSpec", "Placement"]
