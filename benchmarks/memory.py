"""The memory that `gearshift train --estimate` gives, against what a GPU then takes.

    python benchmarks/memory.py [--model recipes/smollm2-135m/model.yaml] [--lengths 1024 32768 131072] [--tokens 16384]

Weights and text are random. Each stage runs three steps without CUDA graphs; the first one's compiling and tuning is
not counted. A stochastic stage draws uniform placements; one sequence of `--lengths` at least is in a step.
"""

import argparse
import gc
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from gearshift import GearshiftConfig, GearshiftForCausalLM
from gearshift.data import TokenSequences
from gearshift.formats.spec_file import read_spec
from gearshift.train import Distiller, LayerwiseStage, Recipe, StochasticStage, UniformSampling
from gearshift.train.estimate import estimate

RECIPES = Path(__file__).parents[1] / "recipes"
STAGES = {
    "layerwise": LayerwiseStage(steps=3, calibration="none"),
    "stochastic": StochasticStage(steps=3, sampling=UniformSampling()),
    "stochastic, recompute": StochasticStage(steps=3, sampling=UniformSampling(), recompute=True),
}


def measure(recipe: Recipe) -> int:
    """Bytes in use at most, from the second step on."""
    spec = read_spec(recipe.model)
    model = GearshiftForCausalLM(GearshiftConfig(spec)).cuda()
    sequences = TokenSequences(torch.randint(spec.vocab_size, (recipe.batch_size, recipe.sequence_length)))
    records = Distiller(model, sequences, recipe).run()
    next(records)
    torch.cuda.reset_peak_memory_stats()
    list(records)
    return torch.cuda.max_memory_allocated()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(RECIPES / "smollm2-135m" / "model.yaml"))
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 32768, 131072])
    parser.add_argument("--tokens", type=int, default=16384, help="tokens a step, where sequences are not longer")
    parser.add_argument("--plain", action="store_true", help="without torch.compile")
    options = parser.parse_args()
    table = Table("sequences", "stage", "estimate GB", "measured GB", "off by", title=torch.cuda.get_device_name())
    for length in options.lengths:
        rows = max(1, options.tokens // length)
        for name, stage in STAGES.items():
            more = {"sequence_length": length, "batch_size": rows, "device": "cuda", "compile": not options.plain}
            recipe = Recipe(model=options.model, output="-", stages=(stage,), cuda_graphs=False, **more)
            expected = estimate(recipe)[0].total
            try:
                taken = measure(recipe)
                found = f"{taken / 1e9:.2f}", f"{expected / taken - 1:+.1%}"
            except torch.cuda.OutOfMemoryError:
                found = "out of memory", "-"
            table.add_row(f"{rows} x {length:,}", name, f"{expected / 1e9:.2f}", *found)
            gc.collect()
            torch.cuda.empty_cache()
            Console(width=100).print(table)  # as it stands: kernels of a new length take minutes


if __name__ == "__main__":
    main()
