"""What a run says before its first step, and a teacher of another format."""

import json
import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from gearshift import GearshiftConfig, GearshiftForCausalLM, ModelSpec
from gearshift.conversion import export
from gearshift.data import TokenSequences, open_corpus
from gearshift.train import Distiller, Recipe, SftStage, train
from gearshift.train.checkpoint import AVERAGE, WEIGHT, Checkpoints, read_learnt
from gearshift.train.estimate import estimate
from gearshift.train.outlook import outline
from tests.formats import gguf_files
from tests.models import ATTENTION, supernet_spec, tokens
from tests.train.processes import run_processes
from tests.train.test_run import Interrupt, recipe, timeless

STEP = {"type": "stochastic", "steps": 1}


@pytest.fixture(scope="module")
def llama(source: Path) -> Path:
    """The main placement of the source as transformers' own Llama, without a tokenizer."""
    folder = source / "llama"
    export(source / "model", "attention", "llama").write(folder)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    return folder


@pytest.mark.parametrize("file", [None, "teacher.gguf", "model.safetensors"])
def test_a_teacher_of_another_format_teaches_as_the_model_itself(
    source: Path, llama: Path, tmp_path: Path, file: str | None
) -> None:
    teacher = llama
    if file == "model.safetensors":
        teacher = llama / file
    elif file is not None:
        teacher = tmp_path / file
        gguf_files.write(teacher, AutoModelForCausalLM.from_pretrained(llama))
    other = recipe(source, tmp_path / "other", teacher=str(teacher))
    train(recipe(source, tmp_path / "self"))
    train(other)
    assert timeless(tmp_path / "other") == timeless(tmp_path / "self")
    learnt, again = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("self", "other"))
    assert all(torch.equal(learnt[name], again[name]) for name in learnt)
    files = load_file(source / "model" / "model.safetensors"), load_file(llama / "model.safetensors")
    (estimated,) = estimate(other.model_copy(update={"stages": other.stages[1:]}))
    assert estimated.parts["parameters"] == sum(4 * tensor.numel() for file in files for tensor in file.values())


def test_what_cannot_teach_or_learn_is_refused_in_a_sentence(source: Path, llama: Path, tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(f"{{model_type: gearshift, spec: {supernet_spec().model_dump_json()}}}")
    for changes, sentence in [
        ({"teacher": str(tmp_path / "spec.yaml")}, r"the teacher .*spec\.yaml has no weights: name a model"),
        ({"teacher": str(source / "text.txt")}, "is neither a model folder nor"),
        ({"model": str(llama)}, "make one of it, with mixers that learn, with `gearshift convert .* --surgery FILE`"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            train(recipe(source, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("begin", [train, estimate])
def test_a_file_of_weights_cannot_learn(source: Path, tmp_path: Path, begin: Callable[[Recipe], Any]) -> None:
    weights = source / "model" / "model.safetensors"
    with pytest.raises(ValueError, match=rf"{weights} is a file: name the folder of a Gearshift model"):
        begin(recipe(source, tmp_path / "run", model=str(weights)))


def said(settings: Recipe) -> tuple[list[str], list[str]]:
    """What a run warns of, and the line that it begins with."""
    lines: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(settings, begun=lines.append)
    return [
        str(warning.message) for warning in caught if "outlook" in warning.filename or "run.py" in warning.filename
    ], lines


def write_said(settings: Recipe, folder: Path) -> None:
    """What this process says of a run, in `folder`, in a file with its rank as its name."""
    logged: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("gearshift").addHandler(handler)
    warned, lines = said(settings)
    (folder / os.environ["RANK"]).write_text(json.dumps([*logged, *warned, *lines]))


def test_of_several_processes_the_first_alone_says_so(source: Path, tmp_path: Path) -> None:
    turns = ({"role": role, "content": "HELLO " * 40} for role in ("user", "assistant"))
    short = ({"role": role, "content": "HI"} for role in ("user", "assistant"))
    rows = (json.dumps({"messages": list(messages)}) for messages in (turns, short))
    (tmp_path / "chats.jsonl").write_text("\n".join(rows))
    (tmp_path / "template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    chats = {"chats": [{"path": str(tmp_path / "chats.jsonl")}], "chat_template": str(tmp_path / "template.jinja")}
    stages = [{"type": "sft", "steps": 1}]
    run_processes(
        2, write_said, recipe(source, tmp_path / "run", stages=stages, sequence_length=300, **chats), tmp_path
    )
    cut, positions, begun = json.loads((tmp_path / "0").read_text())
    assert "of 2 chats, 1 are cut after 300 tokens" in cut
    assert "made for 128 positions" in positions
    assert begun.startswith("training ")
    assert json.loads((tmp_path / "1").read_text()) == []


def test_a_run_begins_with_what_it_will_do(source: Path, tmp_path: Path) -> None:
    settings = recipe(source, tmp_path / "run", freeze=["*.gdn.*", "*.layers.1.*"])
    with pytest.raises(KeyboardInterrupt):
        train(settings, callbacks=[Interrupt(4)])
    warned, lines = said(settings)
    assert not warned
    (line,) = lines
    assert line.startswith(f"training {source}/model: ")
    assert line.endswith(
        " parameters learn, of window, kda, in 1 of 2 layers; 8 steps (layerwise, stochastic), 4 of them done;"
        f" record: {tmp_path}/run/metrics.jsonl"
    )


def test_what_needs_no_text_is_said_before_it_is_tokenised(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    monkeypatch.setattr("gearshift.train.run.open_corpus", lambda *given: order.append("text") or open_corpus(*given))
    monkeypatch.setattr("gearshift.train.run.remarks", lambda *given: order.append("remarks") or [])
    train(recipe(source, tmp_path / "run", stages=[STEP]), begun=lambda line: order.append("begun"))
    assert order == ["remarks", "begun", "text"]
    order.clear()
    with pytest.raises(ValueError, match="no text at /nowhere"):
        train(recipe(source, tmp_path / "new", stages=[STEP], text="/nowhere"))
    assert not order
    misspelt = [{**STEP, "sampling": {"type": "sandwich", "cheapest": "fasst"}}]
    with pytest.raises(ValueError, match="fasst"):
        train(recipe(source, tmp_path / "new", stages=misspelt))
    assert order == []


def test_the_only_mixer_of_a_layer_is_named_too() -> None:
    block = {"mixer": ATTENTION, "mlp": {"type": "gated", "intermediate_size": 40}}
    decoder = {"num_layers": 2, "pattern": ["block"], "blocks": {"block": block}}
    spec = ModelSpec.model_validate({"vocab_size": 61, "hidden_size": 24, "max_positions": 128, "decoder": decoder})
    rates = {"*.o_proj.*": 1.0, "lm_head.*": 1.0}
    settings = Recipe(
        model="m", output="o", stages=(SftStage(steps=3),), chats=({"path": "c"},), learning_rate_scales=rates
    )
    chats = TokenSequences(tokens(8, 20), None, torch.ones(8, 20, dtype=torch.bool))
    model = GearshiftForCausalLM(GearshiftConfig(spec))
    line = outline(settings, model, Distiller(model, None, settings, chats=chats).scales, 0)
    count = 2 * 24 * 32 + 61 * 24
    expected = f"training m: {count:,} parameters learn, of attention, parts outside the mixers, in 2 of 2 layers;"
    assert line.startswith(expected)


def test_sequences_beyond_the_positions_are_warned_of(source: Path, llama: Path, tmp_path: Path) -> None:
    stages = [STEP]
    assert said(recipe(source, tmp_path / "fits", stages=stages, sequence_length=128))[0] == []
    warned, _ = said(recipe(source, tmp_path / "long", stages=stages, sequence_length=129, teacher=str(llama)))
    assert [text.partition(" positions")[0] for text in warned] == [
        "sequence_length is 129, but the model was made for 128",
        "sequence_length is 129, but the teacher was made for 128",
    ]


def test_the_idle_ends_of_a_sandwich_are_warned_of(source: Path, tmp_path: Path) -> None:
    def stages(**sampling: object) -> list[dict]:
        return [{**STEP, "sampling": {"type": "sandwich", **sampling}}]

    idle = stages(cheapest="attention", largest="attention*2")
    warned, _ = said(recipe(source, tmp_path / "idle", stages=idle))
    assert [text.partition(", of which")[0] for text in warned] == [
        "stage 0 (stochastic): cheapest is 'attention', the main placement",
        "stage 0 (stochastic): largest is 'attention*2', the main placement",
    ]
    assert said(recipe(source, tmp_path / "good", stages=stages(cheapest="kda")))[0] == []
    learning = {"teacher": str(source / "model"), "learning_rate_scales": {"*.attention.*": 1.0}}
    assert said(recipe(source, tmp_path / "learning", stages=idle, **learning))[0] == []


def test_an_unfinished_run_is_exported_as_its_averages(source: Path, tmp_path: Path) -> None:
    """What would be written if the stage ended there; of what has not moved, the weights."""
    stage = {**STEP, "steps": 6, "sampling": {"type": "presets", "probabilities": {"kda,gdn": 1.0}}}
    settings = recipe(source, tmp_path / "run", stages=[stage], ema=0.9)
    with pytest.raises(KeyboardInterrupt):
        train(settings, callbacks=[Interrupt(3)])
    export(tmp_path / "run", "kda,gdn").write(tmp_path / "exported")
    shards = Checkpoints(tmp_path / "run" / "checkpoints").latest()
    assert shards is not None
    exported = load_file(tmp_path / "exported" / "model.safetensors")
    name = "model.layers.0.mixer.mixers.kda.q_proj.weight"
    tensor = exported["model.layers.0.mixer.q_proj.weight"]
    assert torch.equal(tensor, read_learnt(shards, AVERAGE + name, tensor.shape))
    assert not torch.equal(tensor, read_learnt(shards, WEIGHT + name, tensor.shape))
    export(tmp_path / "run", "window", "gearshift").write(tmp_path / "unmoved")
    before = load_file(source / "model" / "model.safetensors")
    after = load_file(tmp_path / "unmoved" / "model.safetensors")
    assert torch.equal(
        after["model.layers.0.mixer.q_proj.weight"], before["model.layers.0.mixer.mixers.window.q_proj.weight"]
    )
