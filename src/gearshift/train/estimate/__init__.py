"""The memory of a run before it starts, from configs alone."""

from gearshift.train.estimate.stages import Ranks, StageEstimate, Units, estimate, shared_out
from gearshift.train.estimate.table import advice, device_memory, remarks, table

__all__ = ["Ranks", "StageEstimate", "Units", "advice", "device_memory", "estimate", "remarks", "shared_out", "table"]
