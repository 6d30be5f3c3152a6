"""Distillation: a layerwise stage, then a stochastic one, from the model itself; and fine-tuning on chats."""

from gearshift.records import read_records
from gearshift.train.guard import TrainingDivergedError
from gearshift.train.loop import Distiller, distil
from gearshift.train.metrics import (
    CalibrationRecord,
    Callback,
    JsonLines,
    Record,
    StageEndRecord,
    StepRecord,
    show_steps,
    step_lines,
    step_progress,
)
from gearshift.train.recipe import (
    ChatLossWeights,
    DistillationSettings,
    LayerwiseStage,
    LossWeights,
    OptimiserSettings,
    ParallelSettings,
    Recipe,
    ScheduleSettings,
    SftStage,
    StochasticStage,
    load_recipe,
)
from gearshift.train.run import TrainResult, train
from gearshift.train.sampling import (
    AllocationSampling,
    PresetSampling,
    SamplingStrategy,
    SandwichSampling,
    UniformSampling,
    WeightedSampling,
)

__all__ = [
    "AllocationSampling",
    "CalibrationRecord",
    "Callback",
    "ChatLossWeights",
    "DistillationSettings",
    "Distiller",
    "JsonLines",
    "LayerwiseStage",
    "LossWeights",
    "OptimiserSettings",
    "ParallelSettings",
    "PresetSampling",
    "Recipe",
    "Record",
    "SamplingStrategy",
    "SandwichSampling",
    "ScheduleSettings",
    "SftStage",
    "StageEndRecord",
    "StepRecord",
    "StochasticStage",
    "TrainResult",
    "TrainingDivergedError",
    "UniformSampling",
    "WeightedSampling",
    "distil",
    "load_recipe",
    "read_records",
    "show_steps",
    "step_lines",
    "step_progress",
    "train",
]
