"""What a run says before its first step: what it is about to do, and what of that may not be meant."""

from collections.abc import Iterator
from pathlib import Path

import torch

from gearshift.spec import resolve_placement
from gearshift.train.loop import Distiller
from gearshift.train.optim import main_parameters
from gearshift.train.recipe import Recipe, SampledStage
from gearshift.train.sampling import SandwichSampling


def outline(recipe: Recipe, distiller: Distiller) -> str:
    """One line: the model, what of it learns, how long, and where the record is."""
    model = distiller.model
    blocks, parameters = model.model.blocks, dict(model.named_parameters())
    mixers = ((name, block.mixer_named(name)) for block in blocks for name in block.spec.mixers)
    inside = {parameter: name for name, mixer in mixers for parameter in mixer.parameters()}
    learning = dict.fromkeys(parameters[name] for name in distiller.scales)
    kinds = ", ".join(dict.fromkeys(inside.get(parameter, "parts outside the mixers") for parameter in learning))
    layers = sum(not learning.keys().isdisjoint(block.parameters()) for block in blocks)
    count = recipe.total_steps
    steps = f"{count:,} {'step' if count == 1 else 'steps'} ({', '.join(stage.type for stage in recipe.stages)})"
    done = f", {distiller.global_step:,} of them done" if distiller.global_step else ""
    return (
        f"training {recipe.model}: {sum(map(torch.numel, learning)):,} parameters learn, of {kinds}, in"
        f" {layers} of {len(blocks)} layers; {steps}{done}; record: {Path(recipe.output) / 'metrics.jsonl'}"
    )


def remarks(recipe: Recipe, distiller: Distiller) -> Iterator[str]:
    """A sentence for each thing that can be done, but teaches less than a person may expect."""
    apart = {"teacher": distiller.teacher} if distiller.teacher is not distiller.model else {}
    for what, model in {"model": distiller.model, **apart}.items():
        positions = model.spec.max_positions
        if recipe.sequence_length > positions:
            yield (
                f"sequence_length is {recipe.sequence_length:,}, but the {what} was made for {positions:,} positions:"
                " what it says of tokens beyond them may be worth little; take shorter sequences, or a model made for"
                " longer ones"
            )
    if distiller.scales.keys().isdisjoint(main_parameters(distiller.model)):
        for index, stage in enumerate(recipe.stages):
            if isinstance(stage, SampledStage) and isinstance(stage.sampling, SandwichSampling):
                yield from _idle_ends(f"stage {index} ({stage.type})", stage.sampling, distiller)


def _idle_ends(stage: str, sampling: SandwichSampling, distiller: Distiller) -> Iterator[str]:
    """A sentence for each end of a sandwich that is the main placement, which is frozen."""
    model = distiller.model
    for key, name in {"cheapest": sampling.cheapest, "largest": sampling.largest}.items():
        if name is not None and resolve_placement(name, model.presets, model.spec.choices) == model.spec.main:
            advice = "leave it out" if key == "largest" else "name the placement that costs least"
            yield (
                f"{stage}: {key} is {name!r}, the main placement, of which nothing learns: a step of each turn is"
                f" skipped; {advice}"
            )
