import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from gearshift import Placement
from gearshift.settings import load_settings
from gearshift.train import Callback, JsonLines, Recipe, Record, StepRecord, read_records, train
from gearshift.train import run as run_module
from gearshift.train.checkpoint import learnt, read_learnt
from gearshift.train.estimate import estimate
from tests.models import supernet, tokens

STAGES = (
    {"type": "layerwise", "steps": 3},
    {"type": "stochastic", "steps": 5, "losses": {"forward_kl": 1, "activation": 0.5}},
)


def recipe(source: Path, output: Path, **more) -> Recipe:
    given = {
        "model": str(source / "model"),
        "output": str(output),
        "text": str(source / "text.txt"),
        "sequence_length": 16,
        "batch_size": 4,
        "gradient_accumulation": 2,
        "checkpoint_every": 2,
        "stages": STAGES,
        "device": "cpu",
    }
    return Recipe.model_validate(given | more)


def timeless(output: Path) -> list[dict]:
    """The record without the times, which nothing can repeat."""
    return [{k: v for k, v in record.items() if k != "seconds"} for record in read_records(output / "metrics.jsonl")]


class Interrupt(Callback):
    """Ctrl-C as soon as step `at` has been recorded."""

    def __init__(self, at: int):
        self.at = at

    def on_record(self, record: Record) -> None:
        if isinstance(record, StepRecord) and record.global_step == self.at:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def unbroken(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    output = tmp_path_factory.mktemp("unbroken") / "run"
    result = train(recipe(source, output, held_out=2))
    torch.set_num_threads(threads)
    assert (result.model, result.steps, result.resumed_at) == (output / "model", 8, None)
    return output


def test_a_run_leaves_a_model_and_its_record(source: Path, unbroken: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(unbroken / "model")
    before = AutoModelForCausalLM.from_pretrained(source / "model")
    batch = tokens(2, 20)
    assert torch.equal(model(batch).logits, before(batch).logits)
    assert not torch.equal(model(batch, placement="kda").logits, before(batch, placement="kda").logits)
    assert {"tokenizer.json", "modeling_gearshift.py"} <= {path.name for path in (unbroken / "model").iterdir()}
    assert "auto_map" in json.loads((unbroken / "model" / "config.json").read_text())
    assert sorted(path.name for path in unbroken.iterdir()) == ["metrics.jsonl", "model", "recipe.json"]
    records = read_records(unbroken / "metrics.jsonl")
    assert [record["event"] for record in records] == [
        "calibration", "step", "step", "step", "stage_end", *["step"] * 5, "stage_end",
    ]  # fmt: skip
    assert all(len(Placement.parse(record["placement"])) == 2 for record in records[5:10])
    assert records[1]["layers"].keys() == {"window", "gdn", "kda"}
    assert records[1]["tokens"] == 64


@pytest.mark.parametrize("at", [0, 1, 2, 3, 5, 7])
def test_a_resumed_run_is_the_unbroken_run(source: Path, unbroken: Path, tmp_path: Path, at: int) -> None:
    """Killed after step `at` (in either stage, at a checkpoint or between two), then run again: the same bits."""
    run = recipe(source, tmp_path / "run", held_out=2)
    with pytest.raises(KeyboardInterrupt):
        train(run, callbacks=[Interrupt(at)])
    assert not (tmp_path / "run" / "model").exists()
    result = train(run)
    assert result.resumed_at == {0: None, 1: None, 2: 2, 3: 3, 5: 4, 7: 6}[at]
    assert timeless(tmp_path / "run") == timeless(unbroken)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "run" / "model" / file).read_bytes() == (unbroken / "model" / file).read_bytes()


@pytest.mark.parametrize("at", [2, 5])
def test_averages_are_resumed_too(source: Path, tmp_path: Path, at: int) -> None:
    runs = {name: recipe(source, tmp_path / name, held_out=2, ema=0.9) for name in ("unbroken", "resumed")}
    train(runs["unbroken"])
    with pytest.raises(KeyboardInterrupt):
        train(runs["resumed"], callbacks=[Interrupt(at)])
    checkpoint = next((tmp_path / "resumed" / "checkpoints").iterdir())
    assert "moves" in json.loads((checkpoint / "progress.json").read_text())
    train(runs["resumed"])
    assert timeless(tmp_path / "resumed") == timeless(tmp_path / "unbroken")
    written = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in runs]
    assert written[0] == written[1]


def test_a_kill_while_a_checkpoint_is_written_costs_only_that_checkpoint(
    source: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = recipe(source, tmp_path / "run", held_out=2)
    saved = torch.save

    def failing(state: object, file: object) -> None:
        saved(state, file)
        if (tmp_path / "run" / "checkpoints" / ".step-00000004-stage-01.tmp").exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", failing)
    with pytest.raises(KeyboardInterrupt):
        train(run)
    monkeypatch.setattr(torch, "save", saved)
    left = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert left == [".step-00000004-stage-01.tmp", "step-00000003-stage-01"]
    # What a kill without warning leaves behind must not be mistaken for a checkpoint.
    (tmp_path / "run" / "checkpoints" / ".step-99999999-stage-01.tmp").mkdir()
    train(run)
    assert timeless(tmp_path / "run") == timeless(unbroken)


def test_what_others_put_beside_checkpoints_does_not_end_the_run(source: Path, tmp_path: Path) -> None:
    class FileManager(Callback):
        def on_record(self, record: Record) -> None:
            (tmp_path / "run" / "checkpoints").mkdir(exist_ok=True)
            (tmp_path / "run" / "checkpoints" / ".DS_Store").touch()

    with pytest.raises(KeyboardInterrupt):
        train(recipe(source, tmp_path / "run"), callbacks=[FileManager(), Interrupt(3)])
    left = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert left == [".DS_Store", "step-00000003-stage-01"]


def test_a_finished_run_does_nothing(source: Path, unbroken: Path) -> None:
    weights = (unbroken / "model" / "model.safetensors").stat().st_mtime_ns
    result = train(recipe(source, unbroken, held_out=2, log_every=3))
    assert result.already_finished
    assert result.steps == 0
    assert (unbroken / "model" / "model.safetensors").stat().st_mtime_ns == weights


def test_the_weights_keep_the_dtype_they_came_in(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source / "model", tmp_path / "half")
    router = {"type": "mixture_of_experts", "experts": 4, "experts_per_token": 2, "intermediate_size": 8}
    mixed = supernet(layers=2, mlp={**router, "correction_bias": True})
    for name, parameter in mixed.named_parameters():
        if name.endswith("correction_bias"):
            parameter.data = torch.rand_like(parameter)  # stays in float32, for rounding changes who is chosen
        else:
            parameter.data = parameter.data.bfloat16()
    mixed.save_pretrained(tmp_path / "half")
    train(recipe(source, tmp_path / "run", model=str(tmp_path / "half"), stages=[{"type": "layerwise", "steps": 1}]))
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("half", "run/model"))
    assert {name: tensor.dtype for name, tensor in after.items()} == {name: t.dtype for name, t in before.items()}
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16, torch.float32}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(any(f".{mixer}." in name for mixer in ("window", "gdn", "kda")) for name in changed)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"seed": 1}, "holds a run of another recipe: there, 'seed' was 0, not 1"),
        ({"stages": [STAGES[0], {**STAGES[1], "steps": 9}]}, r"there, 'stages\.1\.steps' was \d+, not 9;"),
        ({"model": "nowhere", "output": "{new}"}, "there is no model at nowhere: the folder does not exist"),
        ({"model": "/nowhere/model", "output": "{new}"}, "there is no model at /nowhere/model"),
        ({"model": "{source}", "output": "{new}"}, "holds no model: it has no config.json"),
        ({"model": "{file}", "output": "{new}"}, "text.txt is a file: name the folder of a Gearshift model"),
        ({"teacher": "{source}", "output": "{new}"}, "holds no model: it has no config.json"),
        ({"text": "/nowhere.txt", "output": "{new}"}, "no text at /nowhere.txt"),
        ({"sequence_length": 100_000, "output": "{new}"}, "the text is too short: 900 tokens do not make one"),
        ({"held_out": 56, "output": "{new}"}, "too few to hold out 56"),
        ({"device": "abacus", "output": "{new}"}, "the device 'abacus' cannot be used"),
        ({"device": "meta", "output": "{new}"}, "the device 'meta' computes nothing: --estimate says"),
        ({"freeze": ["*.mamba.*"], "output": "{new}"}, "matches no parameter"),
        ({"output": "{source}"}, "holds something else than a training run"),
    ],
)
def test_what_cannot_run_is_refused_and_leaves_no_trace(source, unbroken, tmp_path, changes, sentence) -> None:
    places = {"{new}": str(tmp_path / "new"), "{source}": str(source), "{file}": str(source / "text.txt")}
    changes = {key: places.get(value, value) if isinstance(value, str) else value for key, value in changes.items()}
    record = (unbroken / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=sentence) as caught:
        train(recipe(source, Path(changes.pop("output", unbroken)), **{"held_out": 2} | changes))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists()
    assert (unbroken / "metrics.jsonl").read_bytes() == record


def test_a_text_with_tokens_that_the_model_lacks_is_refused(source: Path, tmp_path: Path) -> None:
    """The tokenizer may have more of them, for padding say, as long as the text does not."""
    shutil.copytree(source / "model", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text((source / "text.txt").read_text() + "<pad>")
    stages = [{"type": "stochastic", "steps": 1}]
    refused = recipe(tmp_path, tmp_path / "run", stages=stages)
    with pytest.raises(ValueError, match=r"text.txt holds the token '<pad>', number 61 of .* vocabulary has 61: take"):
        train(refused)
    assert not (tmp_path / "run").exists()
    spoken = [{"role": "user", "content": "HI"}, {"role": "assistant", "content": "HO"}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": spoken}) + "\n")
    (tmp_path / "template.jinja").write_text("{% for m in messages %}{{ m.content }}.{% endfor %}")
    chats = {"chats": [{"path": str(tmp_path / "chats.jsonl")}], "chat_template": str(tmp_path / "template.jinja")}
    sft = [{"type": "sft", "steps": 1}]
    given = refused.model_dump() | {"stages": sft, "text": None, **chats}
    train(Recipe.model_validate(given))


def test_another_text_or_a_broken_checkpoint_is_refused(source: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    shutil.copy(source / "text.txt", text)
    run = recipe(source, tmp_path / "run", text=str(text))
    with pytest.raises(KeyboardInterrupt):
        train(run, callbacks=[Interrupt(3)])
    text.write_text(text.read_text() + "PACK MY BOX WITH FIVE DOZEN LIQUOR JUGS.")
    with pytest.raises(ValueError, match="the text has changed since the run in"):
        train(run)
    shutil.copy(source / "text.txt", text)
    checkpoint = next((tmp_path / "run" / "checkpoints").iterdir())
    next(checkpoint.glob("*.distcp")).write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"the checkpoint .* cannot be read"):
        train(run)


def test_a_record_edited_by_a_person_does_not_let_a_run_go_on_in_a_traceback(source: Path, tmp_path: Path) -> None:
    run = recipe(source, tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        train(run, callbacks=[Interrupt(2)])
    path = tmp_path / "run" / "metrics.jsonl"
    record = path.read_text()
    for line in ('{"note": "mine"}', '{"stage": "0", "step": 1}'):
        path.write_text(record + line + "\n")
        with pytest.raises(ValueError, match=r"metrics.jsonl holds a line that does not say its stage and step \({"):
            train(run)
        assert path.read_text() == record + line + "\n"
    path.write_text(record)
    assert train(run).resumed_at == 2


def test_a_checkpoint_that_goes_while_it_is_read(source: Path, tmp_path: Path) -> None:
    """A run's next one replaces it, and the run must not be given up for that."""
    run = recipe(source, tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        train(run, callbacks=[Interrupt(3)])
    checkpoint = next((tmp_path / "run" / "checkpoints").iterdir())
    keys = learnt(checkpoint)
    shutil.rmtree(checkpoint)
    with pytest.raises(ValueError, match="went while it was read, as a run's next one came: try again"):
        learnt(checkpoint)
    with pytest.raises(ValueError, match="went while it was read"):
        read_learnt(checkpoint, next(iter(keys.values())), torch.Size([1]))


def test_trackers_are_told_and_a_missing_one_is_refused(source, tmp_path, monkeypatch) -> None:
    pytest.importorskip("tensorboard")
    given = recipe(source, tmp_path / "run", trackers=["tensorboard"], log_every=2)
    train(given)
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))
    assert train(recipe(source, tmp_path / "run")).already_finished
    monkeypatch.setattr("gearshift.train.trackers.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="name trackio, which is not installed"):
        train(recipe(source, tmp_path / "new", trackers=["trackio"]))
    assert not (tmp_path / "new").exists()


def test_numbers_that_json_lacks_become_null(source: Path, unbroken: Path) -> None:
    step = StepRecord(
        stage=0, type="layerwise", step=0, global_step=0, total_steps=1, loss=1.0, terms={"activation": float("nan")},
        learning_rate=0.1, gradient_norm=float("inf"), tokens=1, seconds=1.0, placement=Placement(["a", "a"]),
    )  # fmt: skip
    line = json.loads(step.to_json())
    assert (line["gradient_norm"], line["terms"], line["placement"]) == (None, {"activation": None}, "a*2")


def test_several_sources_resumed_are_the_unbroken_run(source: Path, tmp_path: Path) -> None:
    rows = [{"body": f"DOCUMENT {number} OF THE SECOND SOURCE. "} for number in range(30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = [
        {"path": str(source / "text.txt"), "weight": 3},
        {"path": str(tmp_path / "rows.jsonl"), "field": "body", "weight": 1},
    ]
    more = {"text": None, "data": data, "documents": "packed", "held_out": 4}
    unbroken = recipe(source, tmp_path / "unbroken", data_cache=str(tmp_path / "cache"), **more)
    train(unbroken)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*/tokens.bin")}
    assert len(written) == 2
    broken = recipe(source, tmp_path / "broken", data_cache=str(tmp_path / "cache"), **more)
    with pytest.raises(KeyboardInterrupt):
        train(broken, callbacks=[Interrupt(4)])
    assert train(broken).resumed_at == 4
    assert timeless(tmp_path / "broken") == timeless(tmp_path / "unbroken")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*/tokens.bin")} == written
    with pytest.raises(ValueError, match="there, 'documents' was 'packed', not 'joined'"):
        train(recipe(source, tmp_path / "broken", **more | {"documents": "joined"}))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (["data=[{path: a}]", "text=b"], "give either text or data"),
        (["data=[{path: a, dataset: b}]"], "data.0: give each source either a path or a dataset"),
        (["data=[{path: a, weigth: 2}]"], "unknown key 'data.0.weigth': did you mean weight?"),
        (["data=[{path: a, weight: -1}]"], "data.0.weight: input should be greater than 0, not -1"),
        (["documents=apart"], "documents: input should be 'joined' or 'packed', not 'apart'"),
    ],
)
def test_sources_that_make_no_sense_are_refused_in_a_sentence(changes: list[str], sentence: str) -> None:
    stages = "stages=[{type: layerwise, steps: 1}]"
    with pytest.raises(ValueError, match=sentence) as caught:
        load_settings(Recipe, None, ["model=m", "output=o", stages, *changes])
    assert "\n" not in str(caught.value)


@pytest.fixture
def begun(unbroken: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """To say that the unbroken run was begun with another recipe."""
    path = unbroken / "recipe.json"
    said = path.read_text()
    yield lambda recipe: path.write_text(json.dumps({**json.loads(said), "recipe": recipe}))
    path.write_text(said)


def test_a_run_of_an_earlier_version_goes_on(unbroken: Path, source: Path, begun: Callable[..., None]) -> None:
    """Which did not have all keys, and wrote empty lists where nothing was given."""
    run = recipe(source, unbroken, held_out=2)
    old = run.model_dump(mode="json") | {"data": [], "chats": []}
    for key in ("stream", "sampling"):
        del old["stages"][0][key]
    begun(old)
    assert train(run).already_finished
    changed = run.model_copy(
        update={"stages": (run.stages[0].model_copy(update={"stream": "student"}), *run.stages[1:])}
    )
    with pytest.raises(ValueError, match=r"another recipe: there, 'stages\.0\.stream' was 'teacher', not 'student';"):
        train(changed)


def test_a_run_of_a_version_with_other_keys_is_refused(
    unbroken: Path, source: Path, begun: Callable[..., None]
) -> None:
    run = recipe(source, unbroken, held_out=2)
    begun({**run.model_dump(mode="json"), "sead": 0})
    with pytest.raises(ValueError, match=r"recipe\.json does not fit this version of Gearshift: unknown key 'sead'"):
        train(run)


def test_a_model_of_the_hub_is_downloaded_once_as_a_folder(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def download(name: str, **settings: object) -> str:
        asked.append(name)
        return str(source / "model")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    stages = ({"type": "stochastic", "steps": 1},)
    train(recipe(source, tmp_path / "run", model="some-org/some-model", stages=stages))
    assert asked == ["some-org/some-model"]


def test_a_hub_out_of_reach_is_asked_once(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(name: str, **settings: object) -> str:
        asked.append(name)
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    given = recipe(source, tmp_path / "run", model="some-org/some-model")
    with pytest.raises(ValueError, match="no folder some-org/some-model, and the hub could not give it: no route to"):
        train(given)
    with pytest.raises(ValueError, match=r"no route to host .*give its sizes as a spec file"):
        estimate(given)
    assert asked == ["some-org/some-model"] * 2


class Second(Callback):
    """Starts the same run once more as soon as a step has been recorded."""

    def __init__(self, settings: Recipe):
        self.settings = settings
        self.refused = 0

    def on_record(self, record: Record) -> None:
        said = rf"another run writes to .* now \(process {os.getpid()} on .*\): wait for it, or choose another"
        with pytest.raises(ValueError, match=said):
            train(self.settings)
        self.refused += 1


def test_two_runs_do_not_write_to_one_folder(source: Path, unbroken: Path, tmp_path: Path) -> None:
    settings = recipe(source, tmp_path / "run", held_out=2)
    second = Second(settings)
    train(settings, callbacks=[second])
    assert second.refused
    assert timeless(tmp_path / "run") == timeless(unbroken)


def test_a_folder_that_another_recipe_has_taken_meanwhile_is_left_alone(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It begins, and breaks off, while this one reads its text."""
    read = run_module._read

    def slow(*given: Any) -> str:
        monkeypatch.setattr(run_module, "_read", read)
        with pytest.raises(KeyboardInterrupt):
            train(recipe(source, tmp_path / "run", seed=1), callbacks=[Interrupt(2)])
        return read(*given)

    monkeypatch.setattr(run_module, "_read", slow)
    with pytest.raises(ValueError, match="holds a run of another recipe: there, 'seed' was 1, not 0"):
        train(recipe(source, tmp_path / "run"))
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["recipe"]["seed"] == 1
    assert len(read_records(tmp_path / "run" / "metrics.jsonl")) == 4


@pytest.mark.parametrize("document", [{}, {"recipe": [], "text": ""}, {"recipe": {}}])
def test_a_recipe_of_something_else_is_no_run(source: Path, tmp_path: Path, document: dict[str, Any]) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match="holds something else than a training run"):
        train(recipe(source, tmp_path))


def test_a_lock_that_a_kill_left_behind_is_nobodys(source: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / run_module.LOCK).touch()
    assert train(recipe(source, tmp_path / "run", stages=STAGES[:1])).steps == 3


class Closed(Callback):
    """Says that it was closed, and fails at it if it is to."""

    def __init__(self, fails: bool = False):
        self.fails = fails
        self.closed = False

    def close(self) -> None:
        self.closed = True
        if self.fails:
            raise OSError("no space")


def test_every_callback_is_closed_whatever_goes_wrong(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    callbacks = Closed(), Closed(fails=True), Closed()
    with pytest.raises(OSError, match="no space"):
        train(recipe(source, tmp_path / "one", stages=STAGES[:1]), callbacks=callbacks)
    assert all(callback.closed for callback in callbacks)

    opened: list[JsonLines] = []

    class Noting(JsonLines):
        def __init__(self, *given: Any):
            super().__init__(*given)
            opened.append(self)

    def refuse(*given: Any) -> None:
        raise ValueError("no account")

    monkeypatch.setattr(run_module, "JsonLines", Noting)
    monkeypatch.setattr(run_module, "make_trackers", refuse)
    with pytest.raises(ValueError, match="no account"):
        train(recipe(source, tmp_path / "two", stages=STAGES[:1]), callbacks=[alone := Closed()])
    assert alone.closed
    assert [lines._file.closed for lines in opened] == [True]


def test_a_full_disk_is_called_by_its_name(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: Any, **more: Any) -> None:
        short = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")
        raise dcp.api.CheckpointException("failed", {0: (short, None)})

    monkeypatch.setattr(dcp, "save", fail)
    with pytest.raises(OSError, match="a checkpoint could not be written") as caught:
        train(recipe(source, tmp_path / "run"))
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_is_full_for_the_model_is_named(source, tmp_path, monkeypatch, number: int) -> None:
    def fail(*given: Any, **more: Any) -> None:
        raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})")

    monkeypatch.setattr("gearshift.model.GearshiftForCausalLM.save_pretrained", fail)
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        train(recipe(source, tmp_path / "run", stages=[{"type": "stochastic", "steps": 1}]))
    assert (caught.value.errno, caught.value.filename) == (number, str(tmp_path / "run" / "model"))
    assert next((tmp_path / "run" / "checkpoints").iterdir())
