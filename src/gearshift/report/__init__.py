"""Numbers -> pictures and a self-contained page. Nothing here imports torch, and matplotlib waits for the first picture."""

from gearshift.report.data import (
    Candidate,
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
