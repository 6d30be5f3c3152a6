"""Recipes against each other: the same model, text and number of tokens, judged on the same held-out text.

    python benchmarks/study.py MODEL --text TRAIN --held-out FILE ... [--only NAME ...] [--seeds 1] [--steps 150 370]

MODEL, TRAIN and FILE are as in `distillation.py`. Each variant changes one thing of the base recipe, which is the first
row. A row is the forward KL to the teacher in nats a token (lower is better), the mean over seeds, beside the time of
the steps.
"""

import argparse
import copy
import statistics
from typing import Any

import torch
from distillation import divergences, seconds
from rich.console import Console
from rich.table import Table
from training import load
from transformers import AutoTokenizer

from gearshift import GearshiftForCausalLM
from gearshift.data import TokenSequences, load_sequences, read_text
from gearshift.train import DistillationSettings, Record, StepRecord, distil

LAYERWISE: dict[str, Any] = {"type": "layerwise"}
STOCHASTIC: dict[str, Any] = {"type": "stochastic"}
PURE = {"window": 0.1, "gdn": 0.1, "kda": 0.1}
VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "layerwise alone": {"shares": (1.0, 0.0)},
    "stochastic alone": {"shares": (0.0, 1.0)},
    "half and half": {"shares": (0.5, 0.5)},
    "no calibration": {"layerwise": {"calibration": "none"}},
    "calibration by one factor": {"layerwise": {"calibration": "scale"}},
    "layerwise rate 2e-3": {"layerwise": {"learning_rate": 2e-3}},
    "no decay between stages": {"layerwise": {"schedule": {"final": 1.0}}},
    "stochastic rate 1e-3": {"stochastic": {"learning_rate": 1e-3}},
    "activation loss 0.1": {"stochastic": {"losses": {"forward_kl": 1.0, "activation": 0.1}}},
    "activation loss 1": {"stochastic": {"losses": {"forward_kl": 1.0, "activation": 1.0}}},
    "reverse KL": {"stochastic": {"losses": {"forward_kl": 0.0, "reverse_kl": 1.0}}},
    "symmetric KL": {"stochastic": {"losses": {"forward_kl": 0.5, "reverse_kl": 0.5}}},
    "temperature 2": {"stochastic": {"temperature": 2.0}},
    "uniform sampling": {"stochastic": {"sampling": {"type": "uniform"}}},
    "the extremes more often": {"stochastic": {"sampling": {"type": "presets", "probabilities": PURE}}},
    "window at 0.3 of the rate": {"settings": {"learning_rate_scales": {"*.mixers.window.*": 0.3}}},
    "averages of 0.99": {"settings": {"ema": 0.99}},
    "half the batch, twice the steps": {"batch": 0.5},
    "texts twice as long": {"length": 2},
}
"""Name -> what differs: settings of a stage or of all, shares of the steps, factors on the batch and on the length."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--held-out", required=True, nargs="+")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, nargs=2, default=(150, 370), metavar=("LAYERWISE", "STOCHASTIC"))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    start, tokenizer = load(options.model, "cpu"), AutoTokenizer.from_pretrained(options.model)
    text = read_text(options.text)
    held_out = [load_sequences(read_text(file), tokenizer, options.length, limit=32) for file in options.held_out]
    console, table = Console(width=160), Table(title="forward KL to the teacher, nats a token")
    for name in options.only:
        lengthened = options.length * VARIANTS[name].get("length", 1)
        data = load_sequences(text, tokenizer, lengthened)
        runs = [learnt(start, data, held_out, VARIANTS[name], seed, options) for seed in range(options.seeds)]
        if not table.columns:
            for column in ("variant", *runs[0][0], "seconds"):
                table.add_column(column)
        means = [statistics.mean(found[group] for found, _ in runs) for group in runs[0][0]]
        table.add_row(name, *(f"{mean:.3f}" for mean in means), f"{statistics.mean(time for _, time in runs):.1f}")
        console.print(table)  # as it stands: a study takes long


def learnt(
    start: GearshiftForCausalLM,
    data: TokenSequences,
    held_out: list[TokenSequences],
    variant: dict[str, Any],
    seed: int,
    options: argparse.Namespace,
) -> tuple[dict[str, float], float]:
    """What a copy of `start` has learnt by `variant`, and the time of its steps in seconds."""
    model = copy.deepcopy(start).to(options.device)
    records: list[StepRecord] = []

    def watch(record: Record) -> None:
        if isinstance(record, StepRecord):
            records.append(record)

    distil(model, data, settings(variant, seed, options), watch)
    return divergences(model, held_out), sum(total for _, total, _ in seconds(records).values())


def settings(variant: dict[str, Any], seed: int, options: argparse.Namespace) -> DistillationSettings:
    """The base recipe with what `variant` changes, for the same number of tokens."""
    rows = options.batch * variant.get("batch", 1) / variant.get("length", 1)
    total = sum(options.steps)
    shares = variant.get("shares", [steps / total for steps in options.steps])
    steps = [round(total * share * options.batch / rows / variant.get("length", 1)) for share in shares]
    stages = [
        {**LAYERWISE, **variant.get("layerwise", {}), "steps": steps[0]},
        {**STOCHASTIC, **variant.get("stochastic", {}), "steps": steps[1]},
    ]
    kept = [stage for stage in stages if stage["steps"]]
    return DistillationSettings(stages=kept, seed=seed, batch_size=int(rows), **variant.get("settings", {}))


if __name__ == "__main__":
    main()
