"""Tokens a second a GPU of both training stages on 1, 2 and 4 GPUs, with the same work a GPU.

    python benchmarks/scaling.py [--gpus 1 2 4] [--data fsdp ddp] [--tensor 1] [--batch 4] [--length 4096] [--steps 8]

A supernet of a 1.8B-parameter Llama shape (28 layers, hidden 2048, 16 heads, 8 KV heads, FFN 8192) with attention, a
window, Gated DeltaNet and Kimi Delta Attention in every layer, random weights and random tokens: nothing is downloaded.
Each number of GPUs is a torchrun of its own, for which the script starts itself. Every time is the median over the
steps after the first three, which compile kernels and touch memory for the first time. `--smoke` makes all of it tiny,
to try the script where there is no GPU.
"""

import argparse
import json
import statistics
import subprocess
import sys

import torch
from rich.console import Console
from rich.table import Table

from gearshift import GearshiftConfig, GearshiftForCausalLM, ModelSpec
from gearshift.data import TokenSequences
from gearshift.train import DistillationSettings, Distiller, ParallelSettings, StepRecord
from gearshift.train.engine import Precision
from gearshift.train.parallel import parallelise, process_group

SKIPPED = 3


def spec(smoke: bool) -> ModelSpec:
    """The model, or one of the same kind that any machine runs."""
    layers, heads, head_dim, intermediate = (2, 4, 16, 128) if smoke else (28, 16, 128, 8192)
    attention = {"type": "attention", "heads": heads, "kv_heads": heads // 2, "head_dim": head_dim}
    mixers = {
        "attention": attention,
        "window": {**attention, "window": 1024},
        "gdn": {"type": "gated_delta_net", "key_heads": heads, "key_dim": head_dim},
        "kda": {"type": "kimi_delta_attention", "heads": heads, "head_dim": head_dim},
    }
    block = {
        "mixer": {"type": "stochastic", "main": "attention", "mixers": mixers},
        "mlp": {"type": "gated", "intermediate_size": intermediate},
    }
    decoder = {"num_layers": layers, "pattern": ["block"], "blocks": {"block": block}}
    return ModelSpec.model_validate(
        {"vocab_size": 512 if smoke else 32768, "hidden_size": heads * head_dim, "max_positions": 8192}
        | {"decoder": decoder, "tie_embeddings": True}
    )


def random_model(device: torch.device, smoke: bool) -> GearshiftForCausalLM:
    """The model with the same random weights on every process, made on the device."""
    with torch.device("meta"):
        model = GearshiftForCausalLM(GearshiftConfig(spec(smoke)))
    model.to_empty(device=device)
    model.tie_weights()
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.02, generator=generator)
            else:
                parameter.fill_(1.0)
    return model


def measure(options: argparse.Namespace) -> None:
    """In a process of torchrun: run both stages, and print what the first process saw as a line of JSON."""
    device = torch.device("cpu" if options.smoke else "cuda")
    with process_group() as first:
        parallel = parallelise(ParallelSettings(data=options.data[0], tensor=options.tensor), device)
        model = random_model(device, options.smoke)
        parallel.place(model, device, Precision("auto", device).enabled)
        size = options.batch * parallel.data_ranks
        generator = torch.Generator().manual_seed(0)
        shape = (2 * size, options.length)
        data = TokenSequences(torch.randint(model.spec.vocab_size, shape, generator=generator))
        for stage in ({"type": "layerwise", "calibration": "none"}, {"type": "stochastic"}):
            stages = ({**stage, "steps": options.steps + SKIPPED},)
            settings = DistillationSettings.model_validate(
                {"stages": stages, "batch_size": size, "compile": False, "cuda_graphs": False}
            )
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            records = [
                r for r in Distiller(model, data, settings, parallel=parallel).run() if isinstance(r, StepRecord)
            ]
            seconds = statistics.median(record.seconds for record in records[SKIPPED:])
            peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0
            if first:
                said = {"stage": stage["type"], "tokens": records[0].tokens, "seconds": seconds, "peak": peak}
                print(json.dumps(said), flush=True)


def run(gpus: int, data: str, options: argparse.Namespace) -> list[dict]:
    """The lines of a torchrun on `gpus` GPUs."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus), __file__]
    command += ["--worker", "--data", data, *(["--smoke"] if options.smoke else [])]
    command += ["--tensor", str(options.tensor if gpus > 1 else 1)]
    for name in ("batch", "length", "steps"):
        command += [f"--{name}", str(getattr(options, name))]
    made = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in made.stdout.splitlines() if line.startswith("{")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--data", nargs="+", choices=("fsdp", "ddp"), default=["fsdp", "ddp"])
    parser.add_argument("--tensor", type=int, default=1, help="slices of each tensor, on more than one GPU")
    parser.add_argument("--batch", type=int, default=4, help="sequences a step and a data-parallel rank")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return measure(options)
    columns = ("GPUs", "data", "stage", "ms a step", "tokens/s a GPU", "of one GPU", "peak memory GB")
    table = Table(*columns, title=f"{options.batch} sequences of {options.length:,} tokens a step and a slice")
    alone: dict[str, float] = {}
    for gpus in options.gpus:
        for data in options.data if gpus > 1 else ["-"]:
            for line in run(gpus, data if gpus > 1 else "fsdp", options):
                speed = line["tokens"] / line["seconds"] / gpus
                alone.setdefault(line["stage"], speed)
                share = f"{speed / alone[line['stage']]:.1%}"
                row = (line["stage"], f"{1e3 * line['seconds']:,.0f}", f"{speed:,.0f}", share, f"{line['peak']:.1f}")
                table.add_row(str(gpus), data, *row)
    Console(width=110).print(table)
    return None


if __name__ == "__main__":
    main()
