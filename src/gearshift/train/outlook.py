"""What a run says before it reads any text: what it is about to do, and what of that may not be meant."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from gearshift.model import GearshiftForCausalLM
from gearshift.spec import ModelSpec, Placement, resolve_placement
from gearshift.train.optim import main_parameters
from gearshift.train.recipe import Recipe, SampledStage
from gearshift.train.sampling import SandwichSampling


def outline(recipe: Recipe, model: GearshiftForCausalLM, scales: Mapping[str, float], steps_done: int) -> str:
    """One line: the model, what of it learns (the names in `scales`), how long, and where the record is."""
    blocks, parameters = model.model.blocks, dict(model.named_parameters())
    mixers = ((name, block.mixer_named(name)) for block in blocks for name in block.spec.mixers)
    inside = {parameter: name for name, mixer in mixers for parameter in mixer.parameters()}
    learning = dict.fromkeys(parameters[name] for name in scales)
    kinds = ", ".join(dict.fromkeys(inside.get(parameter, "parts outside the mixers") for parameter in learning))
    layers = sum(not learning.keys().isdisjoint(block.parameters()) for block in blocks)
    count = recipe.total_steps
    steps = f"{count:,} {'step' if count == 1 else 'steps'} ({', '.join(stage.type for stage in recipe.stages)})"
    done = f", {steps_done:,} of them done" if steps_done else ""
    return (
        f"training {recipe.model}: {sum(map(torch.numel, learning)):,} parameters learn, of {kinds}, in"
        f" {layers} of {len(blocks)} layers; {steps}{done}; record: {Path(recipe.output) / 'metrics.jsonl'}"
    )


def missing(recipe: Recipe) -> Iterator[str]:
    """A sentence for each source of text or chats that a stage reads and that is not there."""
    for source in (*(recipe.sources if recipe.reads_text else ()), *(recipe.chats or ())):
        try:
            source.check()
        except ValueError as error:
            yield str(error)


def remarks(
    recipe: Recipe,
    model: GearshiftForCausalLM,
    scales: Mapping[str, float],
    presets: Mapping[str, Placement],
    teacher: ModelSpec | None,
) -> Iterator[str]:
    """A sentence for each thing that can be done, but teaches less than a person may expect.

    Args:
        recipe: the run.
        model: what learns; its weights do not matter.
        scales: the names of those of its parameters that do.
        presets: its presets.
        teacher: a reference model, None for the model itself.
    """
    for what, one in {"model": model.spec, "teacher": teacher}.items():
        if one is not None and recipe.sequence_length > one.max_positions:
            yield (
                f"sequence_length is {recipe.sequence_length:,}, but the {what} was made for {one.max_positions:,}"
                " positions: what it says of tokens beyond them may be worth little; take shorter sequences, or a"
                " model made for longer ones"
            )
    if not scales.keys().isdisjoint(main_parameters(model)):
        return
    for index, stage in enumerate(recipe.stages):
        if isinstance(stage, SampledStage) and isinstance(stage.sampling, SandwichSampling):
            yield from _idle_ends(f"stage {index} ({stage.type})", stage.sampling, model.spec, presets)


def _idle_ends(
    stage: str, sampling: SandwichSampling, spec: ModelSpec, presets: Mapping[str, Placement]
) -> Iterator[str]:
    """A sentence for each end of a sandwich that is the main placement, which is frozen."""
    for key, name in {"cheapest": sampling.cheapest, "largest": sampling.largest}.items():
        if name is not None and _is_main(name, spec, presets):
            advice = "leave it out" if key == "largest" else "name the placement that costs least"
            yield (
                f"{stage}: {key} is {name!r}, the main placement, of which nothing learns: a step of each turn is"
                f" skipped; {advice}"
            )


def _is_main(name: str, spec: ModelSpec, presets: Mapping[str, Placement]) -> bool:
    try:
        return resolve_placement(name, presets, spec.choices) == spec.main
    except ValueError:
        return False  # of an estimate: a preset that is yet to be found
