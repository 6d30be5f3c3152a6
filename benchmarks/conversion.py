"""Throughput of a conversion against `cp -r` of the same files, in the same run.

    python benchmarks/conversion.py [--gigabytes 1] [--runs 5]

Makes a random Llama-shaped bfloat16 checkpoint of that size, then alternates between `cp -r`, the plain conversion to
the Gearshift format (the same bytes out) and the one with the quickstart's surgery (more bytes out). Each time includes
flushing what was written to the disk; start-up and imports are not counted.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from gearshift.conversion import convert
from gearshift.surgery import load_surgery

SURGERY = Path(__file__).parents[1] / "recipes" / "quickstart" / "surgery.yaml"
HIDDEN, LAYER_BYTES = 2048, 2 * (4 * 2048 * 2048 + 3 * 2048 * 8192)


def make(folder: Path, size: float) -> None:
    """A checkpoint of about `size` bytes, in shards of at most 1 GB."""
    layers = max(1, round(size / LAYER_BYTES))
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "dtype": "bfloat16",
        "vocab_size": 1024,
        "hidden_size": HIDDEN,
        "intermediate_size": 4 * HIDDEN,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "tie_word_embeddings": True,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    weights = {"model.embed_tokens.weight": (1024, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        weights |= {f"{prefix}self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qkvo"}
        weights |= {f"{prefix}mlp.{name}_proj.weight": (4 * HIDDEN, HIDDEN) for name in ("gate", "up")}
        weights |= {f"{prefix}mlp.down_proj.weight": (HIDDEN, 4 * HIDDEN)}
        weights |= {f"{prefix}{name}.weight": (HIDDEN,) for name in ("input_layernorm", "post_attention_layernorm")}
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    held = 0
    for name, shape in weights.items():
        need = 2 * torch.Size(shape).numel()
        if held + need > 1e9:
            shards.append({})
            held = 0
        shards[-1][name] = shape
        held += need
    index = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file({name: torch.randn(shape).bfloat16() for name, shape in shard.items()}, folder / file)
        index |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def timed(work: Callable[[], object], out: Path) -> tuple[float, int]:
    """Seconds of `work` until its result `out` is on the disk, and the result's size."""
    os.sync()
    started = time.perf_counter()
    work()
    os.sync()
    seconds = time.perf_counter() - started
    size = size_of(out)
    shutil.rmtree(out)
    return seconds, size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    surgery = load_surgery(SURGERY)
    with tempfile.TemporaryDirectory(dir=".") as scratch:
        source, out = Path(scratch) / "source", Path(scratch) / "out"
        make(source, options.gigabytes * 1e9)
        ways: dict[str, Callable[[], object]] = {
            "cp -r": lambda: subprocess.run(["cp", "-r", source, out], check=True),
            "convert": lambda: convert(source).write(out),
            "convert with surgery": lambda: convert(source, [surgery]).write(out),
        }
        measured: dict[str, list[tuple[float, int]]] = {name: [] for name in ways}
        for _ in range(options.runs):
            for name, work in ways.items():
                measured[name].append(timed(work, out))
    table = Table("what", "seconds (median)", "min - max", "GB written", "GB/s", "share of cp", title="conversion")
    speeds = {}
    for name, runs in measured.items():
        seconds, size = [run[0] for run in runs], runs[0][1]
        speeds[name] = size / statistics.median(seconds) / 1e9
        spread = f"{min(seconds):.2f} - {max(seconds):.2f}"
        share = f"{speeds[name] / speeds['cp -r']:.0%}"
        row = (f"{statistics.median(seconds):.2f}", spread, f"{size / 1e9:.2f}", f"{speeds[name]:.2f}", share)
        table.add_row(name, *row)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
