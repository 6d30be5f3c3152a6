"""Recipes against each other: the same model, text and number of tokens, judged on the same held-out text.

    python benchmarks/study.py MODEL --text TRAIN ... --held-out FILE ... [--only NAME ...] [--seeds 3] [--json FILE]

MODEL is a supernet folder, or a checkpoint that the quickstart's surgery is applied to in memory. Each TRAIN, a file or
a folder, is a source of text, FILE text that is in none. Each variant (VARIANTS in the code) changes one thing of the
base recipe. A row is the forward KL to the teacher in nats a token (lower is better), the mean over the seeds of each
kind of placement, beside the time of the steps. Every step counts as the median one of its stage.

Each GPU has a process that takes one run after another. With `--json`, every run's results are kept in FILE as they
come, and those that FILE has already are not done again: the table is of all that it holds. `--smoke` tries it all on
a tiny model in two processes on the CPU.
"""

import argparse
import copy
import gc
import json
import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from distillation import divergences, seconds
from rich.console import Console
from rich.table import Table
from training import load
from transformers import AutoTokenizer

from gearshift.data import Corpus, DataSource, load_sequences, open_corpus, python_text, read_text
from gearshift.data.order import shares
from gearshift.files import write_whole
from gearshift.tiny import write_tiny_model
from gearshift.train import DistillationSettings, Record, StepRecord, distil


@dataclass(frozen=True)
class Variant:
    """What differs from the base recipe."""

    layerwise: dict[str, Any] = field(default_factory=dict)
    """Settings of the layerwise stage."""
    stochastic: dict[str, Any] = field(default_factory=dict)
    """Settings of the stochastic stage."""
    halves: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Stage -> settings of its second half, which becomes a stage of its own."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of all stages."""
    share: float | None = None
    """The layerwise stage's share of the tokens."""
    batch: float = 1
    """A factor on the sequences a step."""
    length: int = 1
    """A factor on the tokens a sequence. There are as many tokens a step."""
    alike: bool = False
    """Whether sources of text count alike. Else each has its share of the tokens that there are, as if joined."""


def sampled(**sampling: Any) -> dict[str, Any]:
    return {"sampling": sampling}


def losses(**weights: float) -> dict[str, Any]:
    return {"losses": {"forward_kl": 0.0, **weights}}


def rates(**scales: float) -> dict[str, Any]:
    return {"learning_rate_scales": {f"*.mixers.{name}.*": scale for name, scale in scales.items()}}


PURE = {"window": 0.1, "gdn": 0.1, "kda": 0.1}
VARIANTS: dict[str, Variant] = {
    "base": Variant(),
    "layerwise alone": Variant(share=1.0),
    "stochastic alone": Variant(share=0.0),
    "half and half": Variant(share=0.5),
    "half and half, layerwise rate 4e-3": Variant(layerwise={"learning_rate": 4e-3}, share=0.5),
    "half and half, gdn's and kda's rate times 2": Variant(settings=rates(gdn=2.0, kda=2.0), share=0.5),
    "no calibration": Variant(layerwise={"calibration": "none"}),
    "calibration by one factor": Variant(layerwise={"calibration": "scale"}),
    "student's stream": Variant(layerwise={"stream": "student"}),
    "student's stream, uniform": Variant(layerwise={"stream": "student", **sampled(type="uniform")}),
    "teacher's stream, then student's": Variant(halves={"layerwise": {"stream": "student", "calibration": "none"}}),
    "activation 0.1 + forward KL": Variant(stochastic=losses(forward_kl=1.0, activation=0.1)),
    "activation 1 + forward KL": Variant(stochastic=losses(forward_kl=1.0, activation=1.0)),
    "reverse KL": Variant(stochastic=losses(reverse_kl=1.0)),
    "symmetric KL": Variant(stochastic=losses(forward_kl=0.5, reverse_kl=0.5)),
    "temperature 2": Variant(stochastic={"temperature": 2.0}),
    "uniform": Variant(stochastic=sampled(type="uniform")),
    "sandwich from gdn": Variant(stochastic=sampled(type="sandwich", cheapest="gdn")),
    "sandwich from window": Variant(stochastic=sampled(type="sandwich", cheapest="window")),
    "sandwich from gdn, five random": Variant(stochastic=sampled(type="sandwich", cheapest="gdn", random=5)),
    "the extremes more often": Variant(stochastic=sampled(type="presets", probabilities=PURE)),
    "layerwise rate 1e-3": Variant(layerwise={"learning_rate": 1e-3}),
    "layerwise rate 4e-3": Variant(layerwise={"learning_rate": 4e-3}),
    "stochastic rate 1e-3": Variant(stochastic={"learning_rate": 1e-3}),
    "window's rate times 0.3": Variant(settings=rates(window=0.3)),
    "gdn's and kda's rate times 2": Variant(settings=rates(gdn=2.0, kda=2.0)),
    "gdn, kda times 2, window 0.3": Variant(settings=rates(gdn=2.0, kda=2.0, window=0.3)),
    "no decay before the restart": Variant(layerwise={"schedule": {"final": 1.0}}),
    "no warm restart": Variant(
        layerwise={"schedule": {"final": 1.0}}, stochastic={"learning_rate": 1e-3, "schedule": {"warmup": 0.0}}
    ),
    "another warm restart": Variant(halves={"stochastic": {}}),
    "residual in float32": Variant(settings={"residual": "float32"}),
    "averages of 0.99": Variant(settings={"ema": 0.99}),
    "half the batch, twice the steps": Variant(batch=0.5),
    "text twice as long": Variant(length=2),
    "text four times as long": Variant(length=4),
    "sources alike": Variant(alike=True),
}
"""Name -> what differs. Mixers are named as in the quickstart's surgery."""


@dataclass(frozen=True)
class Study:
    """What all runs share."""

    model: str
    text: tuple[str, ...]
    held_out: tuple[str, ...]
    steps: tuple[int, int]
    """Layerwise and stochastic steps of the base recipe."""
    batch: int
    length: int


@dataclass(frozen=True)
class Run:
    """What came of a variant with a seed."""

    variant: str
    seed: int
    divergence: dict[str, float]
    """Kind of placement -> forward KL to the teacher, nats a token."""
    step_seconds: dict[str, float]
    """Stage -> the median time of a step."""
    seconds: float
    """The time of all steps, each counted as its stage's median one."""


class Worker:
    """A process that has the model and the text at hand, and a device."""

    def __init__(self, study: Study):
        self.study = study
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.start = load(study.model, "cpu")
        self.tokenizer = AutoTokenizer.from_pretrained(study.model)
        self.held_out = [
            load_sequences(read_text(file), self.tokenizer, study.length, limit=32) for file in study.held_out
        ]

    def run(self, name: str, seed: int) -> Run:
        """What a copy of the model has learnt by a variant."""
        variant, records = VARIANTS[name], []

        def watch(record: Record) -> None:
            if isinstance(record, StepRecord):
                records.append(record)

        model = copy.deepcopy(self.start).to(self.device)
        distil(model, self.corpus(variant), settings(self.study, variant, seed), watch)
        taken = seconds(records)
        medians = {stage: median for stage, (median, _, _) in taken.items()}
        found = Run(
            name, seed, divergences(model, self.held_out), medians, sum(total for _, total, _ in taken.values())
        )
        del model
        gc.collect()
        torch.cuda.empty_cache()
        return found

    def corpus(self, variant: Variant) -> Corpus:
        """The text as a variant mixes and cuts it."""
        sources = [DataSource(path=path) for path in self.study.text]
        corpus = open_corpus(sources, self.tokenizer, self.study.length * variant.length)
        weights = [1 if variant.alike else len(cut) for cut in corpus.cuts]
        return Corpus(corpus.cuts, shares(weights), corpus.boundaries)


def settings(study: Study, variant: Variant, seed: int) -> DistillationSettings:
    """The base recipe with what `variant` changes, for the same number of tokens."""
    rows = round(study.batch * variant.batch / variant.length)
    if rows < 1:
        raise ValueError(f"{study.batch} sequences a step make none that is {variant.length} times as long")
    total = round(sum(study.steps) * study.batch / (rows * variant.length))
    share = study.steps[0] / sum(study.steps) if variant.share is None else variant.share
    steps = {"layerwise": round(total * share), "stochastic": total - round(total * share)}
    stages: list[dict[str, Any]] = []
    for kind, changes in (("layerwise", variant.layerwise), ("stochastic", variant.stochastic)):
        first = steps[kind] // 2 if kind in variant.halves else steps[kind]
        stages.append({"type": kind, **changes, "steps": first})
        if kind in variant.halves:
            stages.append({"type": kind, **changes, **variant.halves[kind], "steps": steps[kind] - first})
    kept = [stage for stage in stages if stage["steps"]]
    return DistillationSettings(stages=kept, seed=seed, batch_size=rows, **variant.settings)


worker: Worker
"""This process's own, once `start_worker` has made it."""


def start_worker(study: Study, devices: Any) -> None:
    """Prepare this process, on a device of its own, for `work`."""
    global worker
    device, threads = devices.get()
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device  # before anything here has asked for one
    torch.set_num_threads(threads)
    worker = Worker(study)


def work(name: str, seed: int) -> Run:
    return worker.run(name, seed)


def runs(study: Study, wanted: Sequence[tuple[str, int]], processes: int | None) -> Iterator[Run | str]:
    """What comes of each of the runs (variant, seed), as they end; a sentence for one that failed."""
    gpus = visible_gpus()
    count = min(processes or len(gpus) or 1, len(wanted))
    if gpus and count > len(gpus):
        raise ValueError(f"{count} processes need a GPU each, and there are {len(gpus)}")
    context = get_context("spawn")
    devices = context.Queue()
    for number in range(count):
        devices.put((gpus[number] if gpus else None, max(1, (os.cpu_count() or 1) // count)))
    with ProcessPoolExecutor(count, context, start_worker, (study, devices)) as pool:
        pending = {pool.submit(work, *run): run for run in wanted}
        for done in as_completed(pending):
            name, seed = pending[done]
            error = done.exception()
            yield done.result() if error is None else f"{name}, seed {seed}: {type(error).__name__}: {error}"


def visible_gpus() -> list[str]:
    """The GPUs as CUDA_VISIBLE_DEVICES names them. Initialises none."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return [str(gpu) for gpu in range(torch.cuda.device_count())]
    return [gpu for gpu in chosen.split(",") if gpu]


def read_runs(path: Path, study: Study) -> list[Run]:
    """The runs that a file holds. ValueError if they are of another study."""
    if not path.exists():
        return []
    held = json.loads(path.read_text())
    asked = json.loads(json.dumps(asdict(study)))
    for key, value in asked.items():
        if held["study"].get(key) != value:
            raise ValueError(
                f"{path} holds a study whose {key} was {held['study'].get(key)}, not {value}: name another"
            )
    return [Run(**run) for run in held["runs"]]


def write_runs(path: Path, study: Study, found: Sequence[Run]) -> None:
    write_whole(path, json.dumps({"study": asdict(study), "runs": [asdict(run) for run in found]}, indent=2))


def table(found: Sequence[Run]) -> Table:
    """A row a variant: means over seeds, with the standard deviation of what all placements come to."""
    kinds = list(found[0].divergence)
    made = Table(title="forward KL to the teacher, nats a token; time of the steps", box=None)
    stages = ("layerwise", "stochastic")
    for column in ("variant", "seeds", *kinds, "mean", "seconds", *(f"ms a {stage} step" for stage in stages)):
        first = column == "variant"
        made.add_column(column, justify="left" if first else "right", no_wrap=first)
    for name in VARIANTS:
        of_it = [run for run in found if run.variant == name]
        if not of_it:
            continue
        means = [overall(run) for run in of_it]
        spread = f" ± {statistics.stdev(means):.3f}" if len(means) > 1 else ""
        cells = [f"{statistics.mean(run.divergence[kind] for run in of_it):.3f}" for kind in kinds]
        times = [[run.step_seconds[stage] for run in of_it if stage in run.step_seconds] for stage in stages]
        steps = [f"{1000 * statistics.mean(of_stage):.0f}" if of_stage else "-" for of_stage in times]
        taken = f"{statistics.mean(run.seconds for run in of_it):.1f}"
        made.add_row(name, str(len(of_it)), *cells, f"{statistics.mean(means):.3f}{spread}", taken, *steps)
    return made


def overall(run: Run) -> float:
    """The mean of what the kinds of placement came to: pure ones, hybrids and random ones count alike."""
    kinds: dict[str, list[float]] = {}
    for name, divergence in run.divergence.items():
        kinds.setdefault(name.split()[0], []).append(divergence)
    return statistics.mean(map(statistics.mean, kinds.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--text", nargs="+")
    parser.add_argument("--held-out", nargs="+")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, metavar="NAME", help="all if left out")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, nargs=2, default=(150, 370), metavar=("LAYERWISE", "STOCHASTIC"))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--processes", type=int, help="one a GPU if left out")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.smoke:
            make_smoke(Path(folder), options)
        elif not (options.model and options.text and options.held_out):
            parser.error("give MODEL, --text and --held-out, or --smoke")
        study = Study(
            options.model,
            tuple(options.text),
            tuple(options.held_out),
            tuple(options.steps),
            options.batch,
            options.length,
        )
        try:
            failed = carry_out(study, options)
        except ValueError as error:
            parser.error(str(error))
    raise SystemExit(1 if failed else 0)


def make_smoke(folder: Path, options: argparse.Namespace) -> None:
    """Replace what is asked for by a tiny model, and two sources of text."""
    os.environ["GEARSHIFT_CACHE"] = str(folder)
    text = python_text()
    write_tiny_model(folder / "model", text)
    places = [folder / name for name in ("one.txt", "two.txt", "held-out.txt")]
    for place, part in zip(places, (text[:60_000], text[60_000:90_000], text[-20_000:]), strict=True):
        place.write_text(part)
    options.model, (*options.text, held_out) = str(folder / "model"), map(str, places)
    options.held_out, options.processes = [held_out], options.processes or 2
    options.steps, options.batch, options.length = (4, 6), 4, 32


def carry_out(study: Study, options: argparse.Namespace) -> list[str]:
    """Do the runs that are missing, and print the table as it grows. Returns a sentence for each that failed."""
    found = read_runs(options.json, study) if options.json else []
    done = {(run.variant, run.seed) for run in found}
    fitting = [name for name, variant in VARIANTS.items() if len(study.text) > 1 or not variant.alike]
    asked = [(name, seed) for seed in range(options.seeds) for name in options.only or fitting]
    wanted = [run for run in asked if run not in done]
    console = Console(width=180)
    failed: list[str] = []
    for run in runs(study, wanted, options.processes) if wanted else ():
        if isinstance(run, str):
            failed.append(run)
            console.print(f"failed: {run}", highlight=False)
            continue
        found.append(run)
        if options.json:
            write_runs(options.json, study, found)
        left = len(wanted) - len(failed) - sum((run.variant, run.seed) in wanted for run in found)
        console.print(table(found))  # as it stands: a study takes long
        console.print(f"{run.variant}, seed {run.seed}: {overall(run):.3f}; {left} runs left", highlight=False)
    if found and not wanted:
        console.print(table(found))
    for sentence in failed:
        console.print(f"failed: {sentence}", highlight=False)
    return failed


if __name__ == "__main__":
    main()
