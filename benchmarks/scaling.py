"""Tokens a second a GPU of both training stages on 1, 2 and 4 GPUs, with the same work a GPU.

    python benchmarks/scaling.py [--gpus 1 2 4] [--data fsdp ddp] [--tensor 1] [--batch 4] [--length 4096] [--steps 8]
        [--plain]

A supernet of a 1.8B-parameter Llama shape (28 layers, hidden 2048, 16 heads, 8 KV heads, FFN 8192) with attention, a
window, Gated DeltaNet and Kimi Delta Attention in every layer, random weights and random tokens: nothing is downloaded.
Each row of a number of GPUs is a torchrun of its own, for which the script starts itself; one that fails is left out.
All run as they do by default, or with nothing compiled and nothing recorded (`--plain`). Every time is the median over
the steps after the first 16, which compile, tune and record. `--smoke` makes all of it tiny, to try the script where
there is no GPU.
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
    skipped = 2 if options.smoke else 16
    with process_group() as first:
        parallel = parallelise(ParallelSettings(data=options.data[0], tensor=options.tensor), device)
        model = random_model(device, options.smoke)
        parallel.place(model, device, Precision("auto", device).enabled)
        size = options.batch * parallel.data_ranks
        generator = torch.Generator().manual_seed(0)
        shape = (2 * size, options.length)
        data = TokenSequences(torch.randint(model.spec.vocab_size, shape, generator=generator))
        for stage in ({"type": "layerwise", "calibration": "none"}, {"type": "stochastic"}):
            stages = ({**stage, "steps": options.steps + skipped},)
            how = {"compile": False, "cuda_graphs": False} if options.plain else {}
            settings = DistillationSettings.model_validate({"stages": stages, "batch_size": size, **how})
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            distiller = Distiller(model, data, settings, parallel=parallel)
            records = [record for record in distiller.run() if isinstance(record, StepRecord)]
            seconds = statistics.median(record.seconds for record in records[skipped:])
            peak = torch.cuda.max_memory_reserved() / 1e9 if device.type == "cuda" else 0.0
            engine = distiller.engine
            way = "graphs" if engine.graphs else "compiled" if engine.steps.compiled else "plain"
            if first:
                said = {"stage": stage["type"], "way": way, "tokens": records[0].tokens}
                print(json.dumps({**said, "seconds": seconds, "peak": peak}), flush=True)


def run(gpus: int, data: str, options: argparse.Namespace) -> list[dict]:
    """The lines of a torchrun on `gpus` GPUs, as many as there are before it fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus), __file__]
    command += ["--worker", "--data", data, *(f"--{name}" for name in ("plain", "smoke") if getattr(options, name))]
    command += ["--tensor", str(options.tensor if gpus > 1 else 1)]
    for name in ("batch", "length", "steps"):
        command += [f"--{name}", str(getattr(options, name))]
    made = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    lines = [json.loads(line) for line in made.stdout.splitlines() if line.startswith("{")]
    return [{**line, "gpus": gpus, "data": data if gpus > 1 else "-"} for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--data", nargs="+", choices=("fsdp", "ddp"), default=["fsdp", "ddp"])
    parser.add_argument("--tensor", type=int, default=1, help="slices of each tensor, on more than one GPU")
    parser.add_argument("--batch", type=int, default=4, help="sequences a step and a data-parallel rank")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--plain", action="store_true", help="compile nothing")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        measure(options)
        return
    title = f"{options.batch} sequences of {options.length:,} tokens a step and a slice"
    console, lines = Console(width=120), []
    for gpus in options.gpus:
        for data in options.data if gpus > 1 else ["fsdp"]:
            lines += run(gpus, data, options)
            if lines:
                console.print(table(lines, title))  # as it stands: each row takes minutes


def table(lines: list[dict], title: str) -> Table:
    """The lines as a table, with their shares of the best that the fewest GPUs did."""
    columns = ("GPUs", "data", "how", "stage", "ms a step", "tokens/s a GPU", "of one GPU", "memory reserved GB")
    made = Table(*columns, title=title)
    best: dict[str, float] = {}
    for line in lines:
        line["speed"] = line["tokens"] / line["seconds"] / line["gpus"]
        if line["gpus"] == lines[0]["gpus"]:
            best[line["stage"]] = max(line["speed"], best.get(line["stage"], 0.0))
    for line in lines:
        share = f"{line['speed'] / best[line['stage']]:.1%}" if line["stage"] in best else "-"
        row = (f"{1e3 * line['seconds']:,.0f}", f"{line['speed']:,.0f}", share, f"{line['peak']:.1f}")
        made.add_row(str(line["gpus"]), line["data"], line["way"], line["stage"], *row)
    return made


if __name__ == "__main__":
    main()
