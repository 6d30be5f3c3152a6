"""Numbers -> pictures and a self-contained page. No torch here; matplotlib is imported when a picture is drawn."""

from gearshift.report.data import (
    Candidate,
    CostSpan,
    DominatedMixer,
    Environment,
    ExportCheck,
    Generation,
    LayerErrors,
    MixerInfo,
    ModelInfo,
    Preset,
    PureQuality,
    Quality,
    Report,
    Search,
    Stage,
    Step,
    TrainingRecord,
)
from gearshift.report.page import render, write

__all__ = [
    "Candidate",
    "CostSpan",
    "DominatedMixer",
    "Environment",
    "ExportCheck",
    "Generation",
    "LayerErrors",
    "MixerInfo",
    "ModelInfo",
    "Preset",
    "PureQuality",
    "Quality",
    "Report",
    "Search",
    "Stage",
    "Step",
    "TrainingRecord",
    "render",
    "write",
]
