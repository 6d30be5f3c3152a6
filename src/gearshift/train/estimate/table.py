"""An estimate as a person reads it: a table, and what would make the run fit."""

import os
from collections.abc import Iterator, Sequence

import torch
from rich.table import Table

from gearshift.train.estimate.stages import PARTS, StageEstimate, estimate, run_remarks
from gearshift.train.recipe import Recipe, SampledStage, StageSettings


def table(stages: Sequence[StageEstimate], memory: int | None) -> Table:
    """A column a stage: what its fullest moment takes on each device, in GB, against `memory` bytes if known."""
    made = Table(box=None, caption="GB on each device at the fullest moment, in use by tensors, without CUDA graphs")
    made.add_column("")
    for number, stage in enumerate(stages):
        made.add_column(f"{number} {stage.type}", justify="right")
    for part in PARTS:
        made.add_row(part, *(gigabytes(stage.parts.get(part, 0)) for stage in stages))
    made.add_row("total", *(gigabytes(stage.total) for stage in stages))
    if memory is not None:
        made.add_row(f"of {gigabytes(memory)} GB", *(f"{stage.total / memory:.0%}" for stage in stages))
    made.add_row("tokens a step", *(f"{stage.tokens:,}" for stage in stages))
    made.add_row("TFLOP a step", *(f"{stage.operations / 1e12:,.2f}" for stage in stages))
    return made


def gigabytes(size: int) -> str:
    """`size` bytes in GB: to two places, or to one digit where these would say nothing."""
    return f"{size / 1e9:,.2f}" if size >= 1e7 or not size else f"{size / 1e9:.1g}"


def device_memory(recipe: Recipe, gpus: int | None) -> int | None:
    """Bytes of the device that `recipe` names; None if it is no GPU that is here."""
    if torch.cuda.is_available() and recipe.device != "cpu":
        return torch.cuda.get_device_properties(
            torch.device("cuda" if recipe.device == "auto" else recipe.device)
        ).total_memory
    if gpus is not None or recipe.device.startswith("cuda") or not hasattr(os, "sysconf"):
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def remarks(recipe: Recipe, stages: Sequence[StageEstimate]) -> list[str]:
    """What the run will warn of, and a sentence for each stage that samples presets which the model does not have."""
    return run_remarks(recipe) + [
        f"stage {index} ({stage.type}): the model has no preset {' or '.join(stage.unknown)}; any placement stands in"
        " for one here, but a run needs them in the model (gearshift search --save-presets)"
        for index, stage in enumerate(stages)
        if stage.unknown
    ]


def advice(recipe: Recipe, stages: Sequence[StageEstimate], memory: int, gpus: int | None) -> list[str]:
    """For each stage that takes more than `memory` bytes a sentence: which setting makes it fit, if one does."""
    found = []
    for index, stage in enumerate(stages):
        if stage.total <= memory:
            continue
        problem = (
            f"stage {index} ({stage.type}) needs {gigabytes(stage.total)} GB, the device has {gigabytes(memory)} GB"
        )
        found.append(f"{problem}: {_remedy(recipe, index, memory, gpus)}")
    return found


def _remedy(recipe: Recipe, index: int, memory: int, gpus: int | None) -> str:
    for changed, said in _smaller(recipe, index, gpus or 1):
        total = estimate(changed, gpus)[0].total
        if total <= memory:
            return f"with {said} it takes {gigabytes(total)} GB"
    return "no setting of the stage makes it fit; use shorter sequences, or more GPUs (--gpus)"


def _smaller(recipe: Recipe, index: int, gpus: int) -> Iterator[tuple[Recipe, str]]:
    """The stage alone in ways that take less memory, the cheapest in time first, and what to write for them."""
    stage: StageSettings = recipe.stages[index]
    name, said = f"stages.{index}", ""
    size = recipe.batch_size_of(index)
    alone = {"stages": (stage.model_copy(update={"batch_size": size}),)}
    if isinstance(stage, SampledStage) and not stage.recompute:
        stage = stage.model_copy(update={"recompute": True, "batch_size": size})
        alone, said = {"stages": (stage,)}, f"{name}.recompute=true"
        yield recipe.model_copy(update=alone), said
    for parts in range(recipe.parts_of(index) + 1, size + 1):
        if size % (parts * gpus) == 0:
            split = stage.model_copy(update={"gradient_accumulation": parts, "batch_size": size})
            yield recipe.model_copy(update={"stages": (split,)}), f"{said} {name}.gradient_accumulation={parts}".strip()
