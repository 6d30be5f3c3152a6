"""How near training comes to what the device can do, and what the mixers that are not sampled cost.

    python benchmarks/ceiling.py [--model recipes/1.5b/model.yaml] [--length 4096] [--batch 4] [--no-graphs]

The ceiling is the rate of a large matrix product in the precision of training. A stage's rate counts what the
mathematics needs (see `gearshift train --estimate`): no recomputation, nothing twice. Then stochastic steps that always
draw one mixer, on the supernet and on the model that holds no mixers but the main one and that: their time, and what
PyTorch reserved, beside the weights of the mixers left out. Weights and text are random.
"""

import argparse
import gc
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from training import WARM_UP, step_seconds

from gearshift import GearshiftConfig, GearshiftForCausalLM, ModelSpec
from gearshift.data import TokenSequences
from gearshift.formats.spec_file import read_spec
from gearshift.model.schema import skeleton
from gearshift.spec import StochasticMixerSpec
from gearshift.train import LayerwiseStage, PresetSampling, Recipe, StochasticStage
from gearshift.train.estimate import estimate

RECIPES = Path(__file__).parents[1] / "recipes"


def ceiling(device: torch.device, size: int) -> float:
    """Floating-point operations a second of a product of square matrices, the median of 20."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(25):
        synchronise(device)
        started = time.perf_counter()
        left @ right
        synchronise(device)
        times.append(time.perf_counter() - started)
    return 2 * size**3 / statistics.median(times[5:])


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(spec: ModelSpec, recipe: Recipe, device: torch.device, graphs: bool) -> tuple[float, float]:
    """The median time of a step of the recipe's only stage on random weights, and the gigabytes reserved for it."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with device:
        torch.manual_seed(0)
        model = GearshiftForCausalLM(GearshiftConfig(spec))
    stage = recipe.stages[0]
    drawn = isinstance(stage, StochasticStage) and not isinstance(stage.sampling, PresetSampling)
    warm_up = WARM_UP["stochastic" if drawn and graphs else "layerwise"] if device.type == "cuda" else 1
    longer = stage.model_copy(update={"steps": stage.steps + warm_up, "batch_size": recipe.batch_size})
    text = TokenSequences(torch.randint(spec.vocab_size, (4 * recipe.batch_size, recipe.sequence_length)))
    seconds = step_seconds(model, longer, text, warm_up, {} if graphs else {"cuda_graphs": False})
    return seconds, torch.cuda.max_memory_reserved() / 1e9 if device.type == "cuda" else math.nan


def weights(spec: ModelSpec) -> float:
    """Gigabytes in float32."""
    return 4 * sum(parameter.numel() for parameter in skeleton(spec).parameters()) / 1e9


def with_mixers(spec: ModelSpec, names: set[str]) -> ModelSpec:
    """The same model with no other mixers than these."""
    layout = spec.model_dump(mode="json")
    for block in layout["decoder"]["blocks"].values():
        mixers = block["mixer"].get("mixers", {})
        block["mixer"]["mixers"] = {name: mixer for name, mixer in mixers.items() if name in names}
    return ModelSpec.model_validate(layout)


def always(mixer: str, steps: int) -> StochasticStage:
    return StochasticStage(steps=steps, sampling=PresetSampling(probabilities={mixer: 1.0}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(RECIPES / "1.5b" / "model.yaml"))
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--graphs", action=argparse.BooleanOptionalAction, default=True, help="record CUDA graphs")
    parser.add_argument("--matrix", type=int, default=8192)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device, spec, console = torch.device(options.device), read_spec(options.model), Console(width=100)
    most = ceiling(device, options.matrix)
    sizes: dict[str, Any] = {"sequence_length": options.length, "batch_size": options.batch, "device": options.device}
    rates = Table(
        "stage", "seconds", "tokens/s", "TFLOP/s", "of the ceiling", title=f"ceiling {most / 1e12:,.0f} TFLOP/s"
    )
    tokens = options.length * options.batch
    for stage in (LayerwiseStage(calibration="none", steps=options.steps), StochasticStage(steps=options.steps)):
        recipe = Recipe(model=options.model, output="-", stages=(stage,), **sizes)
        (seconds, _), operations = timed(spec, recipe, device, options.graphs), estimate(recipe)[0].operations
        rate = operations / seconds
        row = (f"{seconds:.3f}", f"{tokens / seconds:,.0f}", f"{rate / 1e12:,.1f}", f"{rate / most:.0%}")
        rates.add_row(stage.type, *row)
        console.print(rates)  # as it stands: the first steps take minutes
    columns = ("mixer everywhere", "supernet, s", "alone, s", "ratio", "supernet, GB", "alone, GB", "left out, GB")
    costs = Table(*columns, title="what the other mixers cost")
    mixer = spec.decoder.layers[0].mixer
    assert isinstance(mixer, StochasticMixerSpec)
    for name in [name for name in mixer.mixers if name != mixer.main]:
        recipe = Recipe(model=options.model, output="-", stages=(always(name, options.steps),), **sizes)
        fewer = with_mixers(spec, {name, mixer.main})
        (whole, more), (alone, less) = (timed(s, recipe, device, options.graphs) for s in (spec, fewer))
        left_out = weights(spec) - weights(fewer)
        times = f"{whole:.3f}", f"{alone:.3f}", f"{whole / alone:.2f}"
        costs.add_row(name, *times, f"{more:.1f}", f"{less:.1f}", f"{left_out:.1f}")
        console.print(costs)


if __name__ == "__main__":
    main()
