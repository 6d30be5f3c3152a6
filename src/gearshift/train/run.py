"""A training run: from a recipe to a folder with a trained model, through interruptions."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from gearshift.data import Corpus, TokenSequences, open_chats, open_corpus, read_text
from gearshift.formats import FORMATS, NativeConfig
from gearshift.formats.documents import read_json, write_json
from gearshift.model import GearshiftForCausalLM
from gearshift.train.checkpoint import Checkpoints, replacing
from gearshift.train.loop import Distiller
from gearshift.train.metrics import Callback, JsonLines, Record, StageEndRecord, StepRecord
from gearshift.train.recipe import Recipe
from gearshift.train.trackers import check_trackers, make_trackers

MAY_CHANGE = {
    "output",
    "device",
    "checkpoint_every",
    "trackers",
    "log_every",
    "loss_chunk",
    "data_cache",
    "compile",
    "cuda_graphs",
}
"""What a resumed run may say otherwise than the run that it goes on with: nothing that decides what is learnt."""


@dataclass(frozen=True)
class TrainResult:
    """How a run ended."""

    model: Path
    """The folder of the trained model."""
    steps: int
    """Optimiser steps done by this call."""
    resumed_at: int | None
    """The step, over all stages, that this call went on from. None if it started from nothing."""
    already_finished: bool = False
    """Whether the run had come to its end before, so that this call did nothing."""


def train(
    recipe: Recipe, progress: Callable[[Record], None] | None = None, callbacks: Sequence[Callback] = ()
) -> TrainResult:
    """Carry out a recipe: load, train, checkpoint, and at the end write the model to `model` in the output folder.

    Run again after an interruption, it goes on from its last checkpoint as if it had never stopped; run again after
    its end, it does nothing. The output folder also holds `recipe.json`, `metrics.jsonl` (the record) and
    `checkpoints`.

    Args:
        recipe: what to do.
        progress: called with every record as it is made.
        callbacks: the same, and told of the end.

    Raises ValueError if something the recipe names is not there or does not fit, or if the output folder holds a run
    of another recipe.
    """
    output = Path(recipe.output)
    finished = output / "model"
    _check_same_recipe(recipe, output)
    if finished.exists():
        return TrainResult(finished, 0, recipe.total_steps, already_finished=True)
    check_trackers(recipe.trackers)
    distiller, tokenizer, dtype, text = _prepare(recipe)
    _claim(recipe, output, text)
    checkpoints = Checkpoints(output / "checkpoints")
    resumed = checkpoints.restore(distiller)
    at = distiller.global_step
    takers = [JsonLines(output / "metrics.jsonl", distiller.progress.stage, distiller.progress.step), *callbacks]
    try:
        takers += make_trackers(recipe.trackers, output, recipe.log_every, recipe.model_dump(mode="json"))
        for record in distiller.run():
            for taker in takers:
                taker.on_record(record)
            if progress is not None:
                progress(record)
            if _is_due(record, recipe.checkpoint_every):
                checkpoints.save(distiller)
    finally:
        for taker in takers:
            taker.close()
    with replacing(finished) as folder:
        _write_model(distiller.model.to(dtype), tokenizer, folder)
    checkpoints.remove()
    return TrainResult(finished, recipe.total_steps - at, at if resumed else None)


def _is_due(record: Record, every: int) -> bool:
    if isinstance(record, StepRecord):
        return (record.global_step + 1) % every == 0
    return isinstance(record, StageEndRecord)


def _prepare(recipe: Recipe) -> tuple[Distiller, Any, torch.dtype, str]:
    """The run before its first step, the tokenizer, the dtype that the weights came in, and a digest of the text."""
    device = _device(recipe.device)
    model, dtype = _load(recipe.model, device)
    teacher = None if recipe.teacher == "self" else _load(recipe.teacher, device)[0].requires_grad_(False)
    tokenizer = _tokenizer(recipe.model)
    if recipe.chat_template is not None:
        tokenizer.chat_template = read_text(recipe.chat_template)
    settings = (tokenizer, recipe.sequence_length, recipe.documents, recipe.data_cache)
    kinds = {stage.reads_chats for stage in recipe.stages}
    text, held_out = _divided(open_corpus(recipe.sources, *settings) if False in kinds else None, recipe.held_out)
    chats, held_out_chats = _divided(open_chats(recipe.chats, *settings) if True in kinds else None, recipe.held_out)
    distiller = Distiller(model, text, recipe, teacher, held_out, chats, held_out_chats)
    return distiller, tokenizer, dtype, " ".join(corpus.digest() for corpus in (text, chats) if corpus is not None)


def _divided(corpus: Corpus | None, held_out: int) -> tuple[Corpus | None, TokenSequences | None]:
    """What is trained on and, if any is wanted, what is held out."""
    return (corpus, None) if corpus is None or not held_out else corpus.split(held_out)


def _load(folder: str, device: torch.device) -> tuple[GearshiftForCausalLM, torch.dtype]:
    """A model in float32, which learning needs, and the dtype that it was stored in."""
    if not Path(folder).exists() and Path(folder).is_absolute():
        raise ValueError(f"there is no model at {folder}: the folder does not exist")
    try:
        model = GearshiftForCausalLM.from_pretrained(folder, dtype="auto")
    except OSError as error:
        raise ValueError(f"no model can be loaded from {folder!r}: {str(error).splitlines()[0]}") from None
    dtype = model.dtype
    return model.float().to(device), dtype


def _tokenizer(folder: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"no tokenizer can be loaded from {folder!r}: {str(error).splitlines()[0]}") from None


def _write_model(model: GearshiftForCausalLM, tokenizer: Any, folder: Path) -> None:
    """The folder that a conversion would have written, with these weights."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = folder / "config.json"
    write_json(config, NativeConfig.from_json_dict(read_json(config)).to_json_dict())
    FORMATS[model.config.model_type].write_companions(folder)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"the device {name!r} cannot be used: {str(error).splitlines()[0]}") from None


def _check_same_recipe(recipe: Recipe, output: Path) -> None:
    """ValueError if the output folder holds the run of another recipe, or something else altogether."""
    path = output / "recipe.json"
    if output.exists() and not path.exists() and any(output.iterdir()):
        raise ValueError(f"the output folder {output} holds something else than a training run: choose another one")
    if not path.exists():
        return
    before, now = json.loads(path.read_text())["recipe"], recipe.model_dump(mode="json")
    for key in now.keys() - MAY_CHANGE:
        if before.get(key) != now[key]:
            raise ValueError(
                f"{output} holds a run of another recipe: there, {key!r} was {before.get(key)!r}, not {now[key]!r};"
                " choose another output folder, or remove this one to start over"
            )


def _claim(recipe: Recipe, output: Path, text: str) -> None:
    """Write down whose folder this is. ValueError if it is a run on another text, by the digest `text`."""
    path = output / "recipe.json"
    if path.exists():
        if json.loads(path.read_text())["text"] != text:
            raise ValueError(f"the text has changed since the run in {output} began: choose another output folder")
        return
    output.mkdir(parents=True, exist_ok=True)
    fresh = output / ".recipe.json.tmp"
    fresh.write_text(json.dumps({"recipe": recipe.model_dump(mode="json"), "text": text}, indent=2))
    fresh.replace(path)
