"""Tokens a second of a step of both training stages, and of a search, on any Gearshift model.

    python benchmarks/training.py MODEL [--device cuda] [--batch 16] [--length 1024] [--steps 20]

MODEL is a supernet folder, or a checkpoint that the quickstart's surgery is applied to in memory. Every time is the
median over the steps after the first ones, which compile, tune and record kernels and touch memory for the first time.
On CUDA also with what makes it fast taken away: hidden states in bfloat16; CUDA graphs; compilation and flex attention.
Memory is what PyTorch reserved.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

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


WARM_UP = {"layerwise": 6, "stochastic": 25}
"""Steps that are not timed. A mixer of a layer is recorded when it is first drawn."""
WAYS: dict[str, dict[str, Any]] = {
    "": {},
    ", residual in float32": {"residual": "float32"},
    ", no graphs": {"cuda_graphs": False},
    ", plain": {"cuda_graphs": False, "compile": False, "attn_implementation": "sdpa"},
}
"""What is timed on CUDA. On a CPU the first and the last are the same."""


def step_seconds(
    model: GearshiftForCausalLM,
    stage: LayerwiseStage | StochasticStage,
    data: TokenSequences,
    warm_up: int,
    way: dict[str, Any],
) -> float:
    """The median time of a step after the first `warm_up`."""
    times: list[float] = []

    def watch(record: object) -> None:
        if isinstance(record, StepRecord):
            times.append(record.seconds)

    assert stage.batch_size is not None
    distil(model, data, DistillationSettings(stages=(stage,), batch_size=stage.batch_size, **way), watch)
    return statistics.median(times[warm_up:])


def time_stages(
    model: GearshiftForCausalLM, data: TokenSequences, batch: int, steps: int, table: Table, console: Console
) -> None:
    """A row for each stage and way. The table is shown as it stands: kernels of a first stage take minutes."""
    on_cuda = model.device.type == "cuda"
    for stage in (LayerwiseStage(calibration="none", steps=1), StochasticStage(steps=1)):
        warm_up = WARM_UP[stage.type] if on_cuda else 1
        timed = stage.model_copy(update={"batch_size": batch, "steps": steps + warm_up})
        for name, way in WAYS.items() if on_cuda else [("", {})]:
            if on_cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            seconds = step_seconds(model, timed, data, warm_up, way)
            peak = f"{torch.cuda.max_memory_reserved() / 1e9:.1f}" if on_cuda else "-"
            table.add_row(f"{stage.type} step{name}", f"{seconds:.3f}", f"{batch * data.length / seconds:,.0f}", peak)
            console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    model = load(options.model, options.device)
    generator = torch.Generator().manual_seed(0)
    shape = (4 * options.batch, options.length)
    data = TokenSequences(torch.randint(model.spec.vocab_size, shape, generator=generator))
    tokens = options.batch * options.length
    table = Table("what", "seconds", "tokens/s", "peak memory GB", title=f"{options.device}, {tokens:,} tokens a step")
    console = Console(width=100)
    time_stages(model, data, options.batch, options.steps, table, console)
    judged = TokenSequences(data.tokens[:1])
    cost = cost_table(model.spec, "float32")
    started = time.perf_counter()
    found = search(model, judged, {"half": Budget(share=0.5)}, cost, SearchSettings(stride=4))
    seconds = time.perf_counter() - started
    run = found.layer_evaluations * judged.length / seconds
    table.add_row(f"search: {len(found.candidates)} placements", f"{seconds:.1f}", f"{run:,.0f} a layer", "-")
    console.print(table)
    done, saved = found.layer_evaluations, found.layer_evaluations_saved
    print(f"layer evaluations: {done:,}, saved by reuse: {saved:,} ({saved / (done + saved):.0%})")


if __name__ == "__main__":
    main()
