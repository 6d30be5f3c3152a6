"""Tokens a second of a step of both training stages, and of a search, on any Gearshift model.

    python benchmarks/training.py MODEL [--device cuda] [--batch 16] [--length 1024] [--steps 10]

MODEL is a supernet folder, or a checkpoint that the quickstart's surgery is applied to in memory. Every time is the
median over the steps after the first two, which compile kernels and touch memory for the first time.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from gearshift import GearshiftConfig, GearshiftForCausalLM
from gearshift.conversion import convert
from gearshift.data import TokenSequences
from gearshift.model import cost_table
from gearshift.plan.execute import materialise
from gearshift.search import Budget, SearchSettings, search
from gearshift.surgery import load_surgery
from gearshift.train import DistillationSettings, LayerwiseStage, StepRecord, StochasticStage, distil

SURGERY = Path(__file__).parents[1] / "recipes" / "quickstart" / "surgery.yaml"


def load(model: str, device: str) -> GearshiftForCausalLM:
    """The model, made a supernet if it is none, in float32."""
    plan = convert(model)
    if not plan.native.spec.is_supernet:
        plan = convert(model, [load_surgery(SURGERY)])
    weights = materialise(plan.plan, plan.checkpoint.source, plan.seed)
    loaded = GearshiftForCausalLM(GearshiftConfig(plan.native.spec))
    loaded.load_state_dict(weights, strict=False)
    return loaded.float().to(device)


def step_seconds(model: GearshiftForCausalLM, stage: LayerwiseStage | StochasticStage, data: TokenSequences) -> float:
    """The median time of a step."""
    times: list[float] = []

    def watch(record: object) -> None:
        if isinstance(record, StepRecord):
            times.append(record.seconds)

    distil(model, data, DistillationSettings(stages=(stage,), batch_size=stage.batch_size), watch)
    return statistics.median(times[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    model = load(options.model, options.device)
    generator = torch.Generator().manual_seed(0)
    shape = (4 * options.batch, options.length)
    data = TokenSequences(torch.randint(model.spec.vocab_size, shape, generator=generator))
    tokens = options.batch * options.length
    table = Table("what", "seconds", "tokens/s", "peak memory GB", title=f"{options.device}, {tokens:,} tokens a step")
    settings = {"steps": options.steps + 2, "batch_size": options.batch}
    for name, stage in {
        "layerwise step": LayerwiseStage(calibration="none", **settings),
        "stochastic step": StochasticStage(**settings),
    }.items():
        if options.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = step_seconds(model, stage, data)
        peak = f"{torch.cuda.max_memory_allocated() / 1e9:.1f}" if options.device == "cuda" else "-"
        table.add_row(name, f"{seconds:.3f}", f"{tokens / seconds:,.0f}", peak)
    judged = TokenSequences(data.tokens[:1])
    cost = cost_table(model.spec, "float32")
    started = time.perf_counter()
    found = search(model, judged, {"half": Budget(share=0.5)}, cost, SearchSettings(stride=4))
    seconds = time.perf_counter() - started
    run = found.layer_evaluations * judged.length / seconds
    table.add_row(f"search: {len(found.candidates)} placements", f"{seconds:.1f}", f"{run:,.0f} a layer", "-")
    Console(width=100).print(table)
    done, saved = found.layer_evaluations, found.layer_evaluations_saved
    print(f"layer evaluations: {done:,}, saved by reuse: {saved:,} ({saved / (done + saved):.0%})")


if __name__ == "__main__":
    main()
