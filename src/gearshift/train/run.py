"""A training run: from a recipe to a folder with a trained model, through interruptions."""

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoTokenizer

from gearshift.conversion import load_model
from gearshift.data import Corpus, TokenSequences, open_chats, open_corpus, read_text
from gearshift.files import NO_SPACE, writing
from gearshift.formats import FORMATS, HUB_NAME, NativeConfig, hub_folder, open_checkpoint
from gearshift.formats.documents import read_json, write_json
from gearshift.locks import LOCK, release, take
from gearshift.model import GearshiftConfig, GearshiftForCausalLM
from gearshift.settings import read_again
from gearshift.train.checkpoint import Checkpoints, replacing
from gearshift.train.engine import Precision
from gearshift.train.guard import TrainingDivergedError
from gearshift.train.loop import Distiller
from gearshift.train.metrics import Callback, JsonLines, Record, StageEndRecord, StepRecord, StoppedRecord, close
from gearshift.train.outlook import missing, outline, remarks
from gearshift.train.parallel import ALONE, Parallel, parallelise, process_group
from gearshift.train.recipe import Recipe
from gearshift.train.trackers import check_trackers, make_trackers

MAY_CHANGE = {
    "output",
    "device",
    "parallel",
    "checkpoint_every",
    "trackers",
    "log_every",
    "loss_chunk",
    "data_cache",
    "attn_implementation",
    "compile",
    "cuda_graphs",
}
"""What a resumed run may say otherwise than the run that it goes on with: nothing that decides what is learnt."""

A_FILE = "{} is a file: name the folder of a Gearshift model"
"""What is said of a file of weights that a recipe names as its model."""


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
    recipe: Recipe,
    progress: Callable[[Record], None] | None = None,
    callbacks: Sequence[Callback] = (),
    begun: Callable[[str], None] | None = None,
) -> TrainResult:
    """Carry out a recipe: load, train, checkpoint, and at the end write the model to `model` in the output folder.

    Run again after an interruption, it goes on from its last checkpoint as if it had never stopped; run again after
    its end, it does nothing. The output folder also holds `recipe.json`, `metrics.jsonl` (the record) and
    `checkpoints`.

    Args:
        recipe: what to do.
        progress: called with every record as it is made; of several processes, on the first alone.
        callbacks: the same, and told of the end.
        begun: called before the text is read, with a line on what is to be done; of several processes, on the first.

    Raises ValueError if something the recipe names is not there or does not fit, or if the output folder holds a run
    of another recipe, or another process that writes to it.
    """
    lock = FileLock(Path(recipe.output) / LOCK)
    try:
        with process_group():
            return _train(recipe, progress, callbacks, begun, lock)
    finally:
        release(lock)


def _train(
    recipe: Recipe,
    progress: Callable[[Record], None] | None,
    callbacks: Sequence[Callback],
    begun: Callable[[str], None] | None,
    lock: FileLock,
) -> TrainResult:
    output = Path(recipe.output)
    finished = output / "model"
    device = _device(recipe.device)
    parallel = parallelise(recipe.parallel, device)
    nothing_to_do = TrainResult(finished, 0, recipe.total_steps, already_finished=True)
    if parallel.once(lambda: _is_finished(recipe, output, finished)):
        return nothing_to_do
    check_trackers(recipe.trackers)
    parallel.check(recipe)
    if (sentence := next(missing(recipe), None)) is not None:
        raise ValueError(sentence)
    distiller, tokenizer, dtypes = _prepare(recipe, device, parallel)
    checkpoints = Checkpoints(output / "checkpoints", background=device.type == "cuda")
    if parallel.is_first:
        _say(recipe, distiller, checkpoints.steps, begun)
    text = _read(recipe, tokenizer, distiller)
    if parallel.once(lambda: _claim(recipe, output, text, lock)):
        return nothing_to_do
    resumed = checkpoints.restore(distiller)
    at = distiller.global_step
    takers: list[Callback] = []
    try:
        if parallel.is_first:
            lines = JsonLines(output / "metrics.jsonl", distiller.progress.stage, distiller.progress.step)
            settings = recipe.model_dump(mode="json")
            takers = [lines, *callbacks]
            takers += make_trackers(recipe.trackers, output, recipe.log_every, settings)
        for record in distiller.run():
            for taker in takers:
                taker.on_record(record)
            if progress is not None and parallel.is_first:
                progress(record)
            if _is_due(record, recipe.checkpoint_every):
                checkpoints.save(distiller)
        checkpoints.wait()
    except (KeyboardInterrupt, TrainingDivergedError) as error:
        # Interrupted, some of several may be gone by now, and with them their parts of it.
        if parallel is ALONE or isinstance(error, TrainingDivergedError):
            checkpoints.wait()
        if isinstance(error, TrainingDivergedError):
            for taker in takers:
                taker.on_record(_stopped(distiller, str(error)))
        raise
    finally:
        close(takers)
    weights = parallel.weights(distiller.model, dtypes)
    parallel.once(lambda: _write(distiller.model, weights, tokenizer, finished))
    parallel.once(checkpoints.remove)
    return TrainResult(finished, recipe.total_steps - at, at if resumed else None)


def _stopped(distiller: Distiller, reason: str) -> StoppedRecord:
    progress = distiller.progress
    kind = distiller.settings.stages[progress.stage].type
    return StoppedRecord(
        stage=progress.stage, type=kind, step=progress.step, global_step=distiller.global_step, reason=reason
    )


def _is_due(record: Record, every: int) -> bool:
    if isinstance(record, StepRecord):
        return (record.global_step + 1) % every == 0
    return isinstance(record, StageEndRecord)


def _is_finished(recipe: Recipe, output: Path, finished: Path) -> bool:
    """Whether the run has come to its end. ValueError if the folder holds something else."""
    _check_same_recipe(recipe, output)
    return finished.exists()


def _prepare(recipe: Recipe, device: torch.device, parallel: Parallel) -> tuple[Distiller, Any, dict[str, torch.dtype]]:
    """The run before it has any text, the tokenizer, and the dtypes that the tensors came in."""
    half = Precision(recipe.autocast, device).enabled
    folder = _folder(recipe.model)
    model = _load(folder)
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    parallel.place(model, device, half)
    teacher = None
    if recipe.teacher != "self":
        teacher = _load_teacher(recipe.teacher).requires_grad_(False)
        parallel.place(teacher, device, half)
    tokenizer = _tokenizer(folder)
    if recipe.chat_template is not None:
        tokenizer.chat_template = read_text(recipe.chat_template)
    return Distiller(model, None, recipe, teacher, parallel=parallel), tokenizer, dtypes


def _say(recipe: Recipe, distiller: Distiller, steps_done: int, begun: Callable[[str], None] | None) -> None:
    """What a person may want to know before the text is tokenised, which can take long."""
    model, scales = distiller.model, distiller.scales
    teacher = None if distiller.teacher is model else distiller.teacher.spec
    for sentence in remarks(recipe, model, scales, model.presets, teacher):
        warnings.warn(sentence, stacklevel=1)
    if begun is not None:
        begun(outline(recipe, model, scales, steps_done))


def _read(recipe: Recipe, tokenizer: Any, distiller: Distiller) -> str:
    """Give the run what it learns from and is judged on. Returns a digest of it."""
    settings = (tokenizer, recipe.sequence_length, recipe.documents, recipe.data_cache)
    text, held_out = _divided(open_corpus(recipe.sources, *settings) if recipe.reads_text else None, recipe.held_out)
    chats, held_out_chats = _divided(
        open_chats(recipe.chats, *settings, quiet=not distiller.parallel.is_first) if recipe.chats else None,
        recipe.held_out,
    )
    corpora = [corpus for corpus in (text, chats) if corpus is not None]
    for corpus in corpora:
        corpus.check(tokenizer, distiller.model.spec.vocab_size)
    distiller.read_from(text, held_out, chats, held_out_chats)
    return " ".join(corpus.digest() for corpus in corpora)


def _divided(corpus: Corpus | None, held_out: int) -> tuple[Corpus | None, TokenSequences | None]:
    """What is trained on and, if any is wanted, what is held out."""
    return (corpus, None) if corpus is None or not held_out else corpus.split(held_out)


def _folder(name: str) -> Path:
    """The folder of a model, downloaded where `name` is the hub's. ValueError if there is none."""
    path = Path(name)
    if path.is_file():
        raise ValueError(A_FILE.format(name))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"{name} holds no model: it has no config.json")
        return path
    if not HUB_NAME.fullmatch(name):
        raise ValueError(f"there is no model at {name}: the folder does not exist")
    try:
        return hub_folder(name)
    except FileNotFoundError as error:
        raise ValueError(str(error)) from None


def _load(folder: Path) -> GearshiftForCausalLM:
    """A model as it was stored, on the CPU."""
    config = folder / "config.json"
    if config.is_file() and read_json(config).get("model_type") != GearshiftConfig.model_type:
        raise ValueError(
            f"{folder} is no Gearshift model: make one of it, with mixers that learn, with"
            f" `gearshift convert {folder} OUT --surgery FILE`"
        )
    try:
        return GearshiftForCausalLM.from_pretrained(folder, dtype="auto")
    except OSError as error:
        raise ValueError(f"no model can be loaded from {str(folder)!r}: {str(error).splitlines()[0]}") from None


def _load_teacher(name: str) -> GearshiftForCausalLM:
    """A reference model of any format, as it was stored, on the CPU. ValueError if there is none, or no weights."""
    file = Path(name)
    try:
        checkpoint = open_checkpoint(file if file.is_file() else _folder(name))
    except FileNotFoundError as error:
        raise ValueError(str(error)) from None
    if not checkpoint.source.schema:
        raise ValueError(f"the teacher {name} has no weights: name a model")
    return load_model(checkpoint)


def _tokenizer(folder: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"no tokenizer can be loaded from {str(folder)!r}: {str(error).splitlines()[0]}") from None


def _write(model: GearshiftForCausalLM, weights: Mapping[str, Tensor], tokenizer: Any, target: Path) -> None:
    """The folder that a conversion would have written, of a model like `model` with these weights."""
    with torch.device("meta"):
        whole = GearshiftForCausalLM(model.config)
    whole.load_state_dict(weights, assign=True)
    whole.tie_weights()
    with writing(target), replacing(target) as folder:
        try:
            whole.save_pretrained(folder)
        except SafetensorError as error:
            for number in NO_SPACE:
                if f"(os error {number})" in str(error):  # safetensors tells in words alone
                    raise OSError(number, os.strerror(number)) from None
            raise
        tokenizer.save_pretrained(folder)
        config = folder / "config.json"
        write_json(config, NativeConfig.from_json_dict(read_json(config)).to_json_dict())
        FORMATS[whole.config.model_type].write_companions(folder)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
        device = torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"the device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    if device.type == "meta":
        raise ValueError("the device 'meta' computes nothing: --estimate says what a run needs, without one")
    return device


def _check_same_recipe(recipe: Recipe, output: Path) -> None:
    """ValueError if the output folder holds the run of another recipe, or something else altogether."""
    path = output / "recipe.json"
    strange = ValueError(f"the output folder {output} holds something else than a training run: choose another one")
    if not path.exists():
        if output.exists() and any(file.name != LOCK for file in output.iterdir()):
            raise strange
        return
    read = read_json(path)
    if not isinstance(read.get("recipe"), dict) or "text" not in read:
        raise strange
    written = read["recipe"]
    written = {key: value for key, value in written.items() if value != []}  # a list not given was once an empty one
    before, now = (made.model_dump(mode="json") for made in (read_again(Recipe, written, path), recipe))
    for key in now:
        if key not in MAY_CHANGE and before[key] != now[key]:
            where, was, is_now = _difference(key, before[key], now[key])
            raise ValueError(
                f"{output} holds a run of another recipe: there, {where!r} was {was!r}, not {is_now!r};"
                " choose another output folder, or remove this one to start over"
            )


def _difference(where: str, was: Any, is_now: Any) -> tuple[str, Any, Any]:
    """The first place in two settings, `where` them, that differs, and what stands there."""
    if isinstance(was, list) and isinstance(is_now, list) and len(was) == len(is_now):
        was, is_now = dict(enumerate(was)), dict(enumerate(is_now))
    if not isinstance(was, dict) or not isinstance(is_now, dict) or was.keys() != is_now.keys():
        return where, was, is_now
    key = next(key for key in was if was[key] != is_now[key])
    return _difference(f"{where}.{key}", was[key], is_now[key])


def _claim(recipe: Recipe, output: Path, text: str, lock: FileLock) -> bool:
    """Take the `lock` of this folder, and write down whose it is. Returns whether a run that had it has finished.

    ValueError if another process has the lock, if the run of another recipe has begun there meanwhile, or if it is one
    on another text, by the digest `text`.
    """
    output.mkdir(parents=True, exist_ok=True)
    take(lock, "run", "output folder")
    path = output / "recipe.json"
    _check_same_recipe(recipe, output)
    if not path.exists():
        write_json(path, {"recipe": recipe.model_dump(mode="json"), "text": text})
    elif read_json(path)["text"] != text:
        raise ValueError(f"the text has changed since the run in {output} began: choose another output folder")
    return (output / "model").exists()
