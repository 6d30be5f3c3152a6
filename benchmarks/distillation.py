"""What a supernet learns in a given number of steps: divergence from the teacher, and the time that the steps took.

    python benchmarks/distillation.py MODEL --text TRAIN --held-out FILE ... [--layerwise N] [--stochastic N]

MODEL is a supernet folder, or a checkpoint that the quickstart's surgery is applied to in memory. The stages are those
of `recipes/smollm2-135m/train.yaml`, for its steps or those asked for. TRAIN is a file or a folder of text, FILE text
that is not in it. Forward KL to the teacher, in nats a token, is the mean over the files, up to 32 sequences of each.
Every step counts as the median one: the first compile, tune and record kernels.
"""

import argparse
import statistics
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from training import load
from transformers import AutoTokenizer

from gearshift import GearshiftForCausalLM, Placement
from gearshift.data import TokenSequences, load_sequences, read_text
from gearshift.evaluate import Judge, JudgeSettings
from gearshift.train import DistillationSettings, Record, StepRecord, distil, load_recipe
from gearshift.train.sampling import UniformSampling

RECIPE = Path(__file__).parents[1] / "recipes" / "smollm2-135m" / "train.yaml"
RANDOM = 8
"""Random placements that are judged."""


def judged(model: GearshiftForCausalLM) -> dict[str, list[Placement]]:
    """Pure placements, hybrids with the main mixer in every fourth layer, and random placements."""
    choices, main = model.spec.choices, model.spec.main
    groups: dict[str, list[Placement]] = {}
    for name in [name for name in choices[0] if name != main[0]]:
        groups[f"all {name}"] = [Placement([name] * len(choices))]
        groups[f"1/4 {main[0]}, {name}"] = [
            Placement(main[0] if layer % 4 == 0 else name for layer in range(len(main)))
        ]
    groups["random"] = [UniformSampling().sample(choices, {}, 0, number) for number in range(RANDOM)]
    return groups


def divergences(model: GearshiftForCausalLM, held_out: list[TokenSequences]) -> dict[str, float]:
    """The mean forward KL of each group of placements, nats a token."""
    groups = judged(model)
    asked = [placement for group in groups.values() for placement in group]
    found = dict.fromkeys(asked, 0.0)
    for sequences in held_out:
        for score in Judge(model, sequences, JudgeSettings(batch=8, chunk=2048)).score(asked):
            found[score.placement] += score.divergence / len(held_out)
    return {name: statistics.mean(found[placement] for placement in group) for name, group in groups.items()}


def seconds(records: list[StepRecord]) -> dict[str, tuple[float, float, int]]:
    """Kind of stage -> the median time of a step, the time of all (each as its stage's median one), tokens a step."""
    taken: dict[str, tuple[float, float, int]] = {}
    for kind in dict.fromkeys(record.type for record in records):
        of_kind = [record for record in records if record.type == kind]
        numbers = dict.fromkeys(record.stage for record in of_kind)
        stages = [[record.seconds for record in of_kind if record.stage == number] for number in numbers]
        total = sum(statistics.median(times) * len(times) for times in stages)
        taken[kind] = statistics.median(record.seconds for record in of_kind), total, of_kind[0].tokens
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--held-out", required=True, nargs="+")
    stages = load_recipe(RECIPE).stages
    for stage in stages:
        parser.add_argument(f"--{stage.type}", type=int, default=stage.steps, help="steps")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    model, tokenizer = load(options.model, options.device), AutoTokenizer.from_pretrained(options.model)
    train = load_sequences(read_text(options.text), tokenizer, options.length)
    held_out = [load_sequences(read_text(file), tokenizer, options.length, limit=32) for file in options.held_out]
    stages = tuple(stage.model_copy(update={"steps": getattr(options, stage.type)}) for stage in stages)
    records: list[StepRecord] = []

    def watch(record: Record) -> None:
        if isinstance(record, StepRecord):
            records.append(record)

    before = divergences(model, held_out)
    distil(model, train, DistillationSettings(stages=stages, batch_size=options.batch), watch)
    after = divergences(model, held_out)
    table = Table("placement", "before", "after", title="forward KL to the teacher, nats a token")
    for name in before:
        table.add_row(name, f"{before[name]:.3f}", f"{after[name]:.3f}")
    console = Console(width=100)
    console.print(table)
    taken = seconds(records)
    for stage, (median, total, tokens) in taken.items():
        console.print(f"{stage}: {tokens / median:,.0f} tokens/s, {total:.1f} s in all")
    console.print(f"both stages: {sum(total for _, total, _ in taken.values()):.1f} s")


if __name__ == "__main__":
    main()
