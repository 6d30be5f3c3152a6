"""Throughput and memory of a conversion against `cp -r` of the same files, in the same run.

    python benchmarks/conversion.py [--gigabytes 1 4] [--shards 4] [--runs 7] [--pause 0]

For each size makes a random Llama-shaped bfloat16 checkpoint, then takes turns, in a rotating order: `cp -r`, the plain
conversion to the Gearshift format (the same bytes out), `cp -r` of the supernet that the quickstart's surgery makes of
it, and the conversion with that surgery. Each time includes flushing what was written to the disk; start-up and imports
are not counted. The share of cp is the median over the rounds of the bytes a second beside those of the plain `cp -r`
in the same round. Peak memory is what a process of its own had resident at most, beyond what it had after
its imports, mapped pages of the source included.
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
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from gearshift.conversion import convert
from gearshift.surgery import Surgery, load_surgery

SURGERY = Path(__file__).parents[1] / "recipes" / "quickstart" / "surgery.yaml"
COPY, COPY_RESULT = "cp -r", "cp -r of the supernet"
HIDDEN, LAYER_BYTES = 2048, 2 * (4 * 2048 * 2048 + 3 * 2048 * 8192)


class Run(NamedTuple):
    """One conversion, or one copy."""

    seconds: float
    bytes: int

    @property
    def speed(self) -> float:
        """Bytes a second."""
        return self.bytes / self.seconds


def make(folder: Path, size: float, shard_count: int) -> None:
    """A checkpoint of about `size` bytes, in about `shard_count` shards."""
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
        if held + need > 1.05 * size / shard_count:
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


def status(field: str) -> int:
    """Bytes, by Linux's account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def timed(work: Callable[[], object], out: Path) -> Run:
    """How long `work` takes until its result `out` is on the disk, and how large that is."""
    os.sync()
    started = time.perf_counter()
    work()
    os.sync()
    seconds = time.perf_counter() - started
    size = sum(file.stat().st_size for file in out.iterdir())
    shutil.rmtree(out)
    return Run(seconds, size)


def peak_memory(source: Path, out: Path, surgeries: list[Surgery]) -> int:
    """The bytes that a conversion has resident at most, beyond those of the process before it."""
    idle = status("VmRSS")
    convert(source, surgeries).write(out)
    shutil.rmtree(out)
    return status("VmHWM") - idle


def measure(scratch: Path, size: float, shard_count: int, rounds: int, pause: float) -> Table:
    """Every way of conversion at one size."""
    surgery = load_surgery(SURGERY)
    source, supernet, out = (scratch / name for name in ("source", "supernet", "out"))
    make(source, size, shard_count)
    shard = max(file.stat().st_size for file in source.glob("*.safetensors"))
    convert(source, [surgery]).write(supernet)
    ways: dict[str, Callable[[], object]] = {
        COPY: lambda: subprocess.run(["cp", "-r", source, out], check=True),
        "convert": lambda: convert(source).write(out),
        COPY_RESULT: lambda: subprocess.run(["cp", "-r", supernet, out], check=True),
        "convert with surgery": lambda: convert(source, [surgery]).write(out),
    }
    for work in ways.values():
        timed(work, out)
    measured: list[dict[str, Run]] = []
    for number in range(rounds):
        order = [*ways][number % len(ways) :] + [*ways][: number % len(ways)]
        measured.append({})
        for name in order:
            time.sleep(pause)
            measured[-1][name] = timed(ways[name], out)
    peaks = {}
    for name, surgeries in (("convert", []), ("convert with surgery", [surgery])):
        with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
            peaks[name] = fresh.submit(peak_memory, source, out, surgeries).result()
    for folder in (source, supernet):
        shutil.rmtree(folder)
    title = f"{size / 1e9:g} GB, largest shard {shard / 1e6:.0f} MB, {rounds} rounds"
    table = Table("what", "seconds (median)", "min - max", "GB written", "share of cp", "peak memory", title=title)
    for name in ways:
        seconds = [runs[name].seconds for runs in measured]
        shares = [
            round[name].bytes / round[name].seconds * round["cp -r"].seconds / round["cp -r"].bytes
            for round in measured
        ]
        table.add_row(
            name,
            f"{statistics.median(seconds):.2f}",
            f"{min(seconds):.2f} - {max(seconds):.2f}",
            f"{measured[0][name].bytes / 1e9:.2f}",
            f"{statistics.median(shares):.0%}",
            f"{peaks[name] / 1e6:.0f} MB, {peaks[name] / shard:.2f} shards" if name in peaks else "",
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[1.0, 4.0])
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--pause", type=float, default=0.0, help="seconds before each, for a disk that allows bursts")
    options = parser.parse_args()
    for gigabytes in options.gigabytes:
        with tempfile.TemporaryDirectory(dir=".") as scratch:
            table = measure(Path(scratch), gigabytes * 1e9, options.shards, options.runs, options.pause)
        Console(width=110).print(table)


if __name__ == "__main__":
    main()
