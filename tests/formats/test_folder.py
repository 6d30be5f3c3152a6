"""Folders of safetensors: what is read, and what is refused before anything is."""

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from typer.testing import CliRunner

from gearshift.cli import app
from gearshift.formats import Checkpoint, open_checkpoint
from gearshift.formats.folder import SafetensorsSource
from gearshift.plan.execute import materialise
from tests.formats.folders import edit_config, edit_tensors, save

EMBEDDING = "model.embed_tokens.weight"
Q_PROJ = "model__layers__1__self_attn__q_proj__weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save(tmp_path / "whole").save_pretrained(tmp_path / "model", max_shard_size="20KB")
    return tmp_path / "model"


def load(path: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(path)
    return materialise(checkpoint.plan, checkpoint.source)


def refused(path: Path, says: str, kind: type[Exception] = ValueError) -> None:
    before = sorted(str(found) for found in path.parent.rglob("*"))
    with pytest.raises(kind, match=says) as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value)
    assert sorted(str(found) for found in path.parent.rglob("*")) == before


def test_shards_and_one_file_hold_the_same(folder: Path, tmp_path: Path) -> None:
    save(tmp_path / "again").save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").is_file()
    one, many = load(folder), load(tmp_path / "sharded")
    assert one.keys() == many.keys()
    assert all(one[name].equal(many[name]) for name in one)


def test_a_file_of_the_folder_names_the_folder(folder: Path) -> None:
    assert open_checkpoint(folder / "model.safetensors").plan == open_checkpoint(folder).plan
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    assert open_checkpoint(folder / "weights.safetensors").path == folder


def test_every_dtype_and_shape_is_read_whole_and_in_part(tmp_path: Path) -> None:
    dtypes = ["bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64"]
    dtypes += ["float8_e4m3fn", "float8_e5m2"]
    tensors = {name: (torch.arange(60).reshape(3, 4, 5) - 30).to(getattr(torch, name)) for name in dtypes}
    tensors |= {"scalar": torch.tensor(3.0), "vector": torch.arange(7.0), "empty": torch.zeros(0, 4)}
    save_file(tensors, tmp_path / "model.safetensors")
    source = SafetensorsSource(tmp_path)
    assert source.schema.keys() == tensors.keys()
    for name, tensor in tensors.items():
        found = source.read(name)
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert found.view(torch.uint8).equal(tensor.view(torch.uint8)) if tensor.ndim else found.equal(tensor)
    for name in dtypes:
        part = source.read(name, ((1, 3), (0, 4), (2, 5)))
        assert part.double().equal(tensors[name][1:3, :, 2:5].double())
    assert source.read("vector", ((2, 4),)).tolist() == [2.0, 3.0]


def test_extents_are_where_the_bytes_lie(tmp_path: Path) -> None:
    tensors = {"matrix": torch.arange(24.0).reshape(4, 6), "scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4)}
    save_file(tensors, tmp_path / "model.safetensors")
    source = SafetensorsSource(tmp_path)
    boxes: list[tuple[str, Any]] = [(name, None) for name in tensors]
    boxes += [("matrix", ((1, 3), (0, 6))), ("matrix", ((0, 4), (0, 6)))]
    for name, box in boxes:
        extent = source.extent(name, box)
        assert extent is not None
        data = extent.path.read_bytes()[extent.offset : extent.offset + extent.bytes]
        assert data == source.read(name, box).numpy().tobytes()
    assert source.extent("matrix", ((0, 4), (0, 5))) is None


def test_tensors_that_lie_at_odd_places_are_read(tmp_path: Path) -> None:
    header = {
        "a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "b": {"dtype": "F32", "shape": [2, 2], "data_offsets": [3, 19]},
    }
    text = json.dumps(header).encode()
    data = struct.pack("<Q", len(text)) + text + b"abc" + struct.pack("<4f", 1, 2, 3, 4)
    (tmp_path / "model.safetensors").write_bytes(data)
    assert SafetensorsSource(tmp_path).read("b").tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert SafetensorsSource(tmp_path).read("b", ((1, 2), (0, 1))).tolist() == [[3.0]]


def test_a_file_that_shrinks_after_it_was_opened(folder: Path) -> None:
    source = SafetensorsSource(folder)
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="is cut short: it changed since it was opened"):
        source.read(EMBEDDING)


def test_the_fingerprint_tells_contents_apart(folder: Path) -> None:
    first = open_checkpoint(folder).fingerprint
    assert open_checkpoint(folder).fingerprint == first
    edit_config(folder, bos_token_id=9)
    second = open_checkpoint(folder).fingerprint
    edit_tensors(folder, **{Q_PROJ: torch.zeros(32, 32)})
    assert len({first, second, open_checkpoint(folder).fingerprint}) == 3


def test_the_dtype_is_that_of_the_weights_where_the_config_does_not_say(tmp_path: Path) -> None:
    save(tmp_path / "model", dtype="bfloat16")
    edit_config(tmp_path / "model", dtype=...)
    checkpoint = open_checkpoint(tmp_path / "model")
    assert checkpoint.native.dtype == "bfloat16"
    assert {info.dtype for info in checkpoint.schema.values()} == {"bfloat16"}


def test_tensors_keep_their_own_dtypes(folder: Path) -> None:
    edit_tensors(folder, **{Q_PROJ: torch.ones(32, 32, dtype=torch.bfloat16)})
    schema = open_checkpoint(folder).schema
    assert schema["model.layers.1.mixer.q_proj.weight"].dtype == "bfloat16"
    assert schema["model.layers.0.mixer.q_proj.weight"].dtype == "float32"


def test_known_junk_is_discarded_with_a_reason(folder: Path) -> None:
    edit_tensors(folder, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4))
    (discard,) = open_checkpoint(folder).plan.discards
    assert "inv_freq" in discard.name
    assert "rotary" in discard.reason


class TestTiedHeads:
    @pytest.fixture
    def tied(self, tmp_path: Path) -> Path:
        save(tmp_path / "tied", tie_word_embeddings=True)
        return tmp_path / "tied"

    def embedding(self, folder: Path) -> torch.Tensor:
        return SafetensorsSource(folder).read(EMBEDDING)

    def test_a_head_that_is_a_copy_is_discarded(self, tied: Path) -> None:
        edit_tensors(tied, lm_head__weight=self.embedding(tied).clone())
        checkpoint = open_checkpoint(tied)
        assert [discard.name for discard in checkpoint.plan.discards] == ["lm_head.weight"]
        assert "lm_head.weight" not in checkpoint.schema

    def test_a_head_that_is_none_is_refused(self, tied: Path) -> None:
        edit_tensors(tied, lm_head__weight=self.embedding(tied) + 1)
        refused(tied, "'lm_head.weight' differs from 'model.embed_tokens.weight': set tie_word_embeddings to false")

    def test_a_head_in_place_of_the_embeddings_is_taken(self, tied: Path) -> None:
        expected = self.embedding(tied).clone()
        edit_tensors(tied, lm_head__weight=expected.clone(), model__embed_tokens__weight=None)
        assert load(tied)[EMBEDDING].equal(expected)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({Q_PROJ: None}, "lacks the tensor 'model.layers.1.self_attn.q_proj.weight', which its config asks for"),
        ({Q_PROJ: torch.zeros(32, 16)}, r"q_proj.weight' has the shape \[32, 16\], but the config asks for \[32, 32\]"),
        (
            {"model__layers__1__self_attn__q_proj__bias": torch.zeros(32)},
            "q_proj.bias' that its config has no place for",
        ),
        ({"model__layers__3__input_layernorm__weight": torch.zeros(32)}, "layers.3.input_layernorm.weight' that its"),
        ({"score__weight": torch.zeros(2, 32)}, "'score.weight' that its config has no place for"),
    ],
)
def test_tensors_that_do_not_fit_the_config(folder: Path, changes: dict[str, Any], says: str) -> None:
    edit_tensors(folder, **changes)
    refused(folder, says)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"intermediate_size": 40}, r"gate_proj.weight' has the shape \[48, 32\], but the config asks for \[40, 32\]"),
        ({"num_hidden_layers": 4}, "lacks the tensor 'model.layers.3"),
        ({"num_hidden_layers": 2}, "'model.layers.2.* no place for"),
        ({"attention_bias": True}, "lacks the tensor 'model.layers.0.self_attn.q_proj.bias'"),
        ({"model_type": "lama"}, r"config.json: no format reads the model type 'lama': did you mean llama"),
        ({"model_type": ...}, "model type None"),
        ({"wings": 2}, "config.json: unknown key 'wings'"),
        ({"hidden_act": "wing"}, "wing"),
    ],
)
def test_configs_that_do_not_fit_the_tensors(folder: Path, changes: dict[str, Any], says: str) -> None:
    edit_config(folder, **changes)
    refused(folder, says)


@pytest.mark.parametrize(
    ("text", "says"), [("{", "not valid JSON"), ("[1]", "not hold a JSON object"), ("\xff", "JSON")]
)
def test_a_config_that_is_no_json_object(folder: Path, text: str, says: str) -> None:
    (folder / "config.json").write_text(text, encoding="latin-1")
    refused(folder, f"config.json.*{says}")


def with_header(folder: Path, change: Any) -> None:
    """Rewrite the header of a folder's only file."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = change(data[8 : 8 + length])
    path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])


def edited_entry(key: str, value: Any) -> Any:
    def change(header: bytes) -> bytes:
        entries = json.loads(header)
        entries[EMBEDDING][key] = value
        return json.dumps(entries).encode()

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda header: b"{" + header, "header of .*model.safetensors is corrupt: it is not valid JSON"),
        (lambda header: b"[]", "is not a JSON object"),
        (lambda header: b"\xff" * 40, "not valid JSON"),
        (edited_entry("dtype", "F33"), "unknown dtype 'F33'"),
        (edited_entry("dtype", 3), "it describes the tensor"),
        (edited_entry("shape", [61, -32]), r"has the shape \[61, -32\]"),
        (edited_entry("shape", [61, 33]), "cannot have 7808 bytes"),
        (edited_entry("data_offsets", [0]), "it describes the tensor"),
        (edited_entry("data_offsets", [8, 7816]), "a gap or an overlap"),
    ],
)
def test_corrupt_headers(folder: Path, change: Any, says: str) -> None:
    with_header(folder, change)
    refused(folder, says)


def test_files_that_are_cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for kept, says in (
        (len(whole) - 4, "is cut short: its header promises"),
        (100, "do not hold its header"),
        (3, "3 bytes"),
    ):
        path.write_bytes(whole[:kept])
        refused(folder, says)
    path.write_bytes(whole + b"xx")
    refused(folder, "2 bytes follow its last tensor")
    path.write_bytes(struct.pack("<Q", 1 << 60) + whole[8:])
    refused(folder, "do not hold its header")


def edited_index(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def test_indices_that_do_not_fit_their_shards(sharded: Path, tmp_path: Path) -> None:
    shards = sorted(path.name for path in sharded.glob("*.safetensors"))
    cases = [
        (
            lambda index: index.update({EMBEDDING: "model-9.safetensors"}),
            "names the shard 'model-9.safetensors', which is not there",
        ),
        (lambda index: index.update({"wings": shards[0]}), "holds the tensor 'wings', which it does not"),
        (lambda index: index.update({EMBEDDING: shards[-1]}), f"{EMBEDDING}', which it does not, but {shards[0]} does"),
        (lambda index: index.update({EMBEDDING: "../model.safetensors"}), "is no safetensors file of its folder"),
        (lambda index: index.clear(), "has no 'weight_map'"),
    ]
    for number, (change, says) in enumerate(cases):
        copy = tmp_path / f"copy{number}"
        shutil.copytree(sharded, copy)
        edited_index(copy, change)
        refused(copy, says)


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    first, *_, last = sorted(sharded.glob("*.safetensors"))
    shutil.copyfile(first, last)
    refused(sharded, f"is in two files, {first.name} and {last.name}")


def test_shards_without_an_index(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    refused(sharded, "safetensors files, but no model.safetensors.index.json")


def test_a_shard_with_a_tensor_that_the_index_does_not_name(sharded: Path) -> None:
    edited_index(sharded, lambda weight_map: weight_map.pop(EMBEDDING))
    refused(sharded, f"index.json does not name the tensor '{EMBEDDING}', which model-00001-of-.* holds")


def test_one_file_of_several_is_read_alone(folder: Path) -> None:
    whole = open_checkpoint(folder)
    save_file({"other": torch.ones(2)}, folder / "adapter.safetensors")
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    refused(folder, "2 safetensors files, but no model.safetensors.index.json")
    assert open_checkpoint(folder / "weights.safetensors").schema == whole.schema


def test_a_key_that_is_there_twice(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text().replace("{", '{"hidden_size": 48,', 1))
    refused(folder, "config.json is not valid JSON: it has the key 'hidden_size' twice")


class TestNewerConfigs:
    def test_an_error_says_that_the_config_is_newer(self, folder: Path) -> None:
        edit_config(folder, wings=2, transformers_version="99.1.0")
        refused(folder, r"unknown key 'wings'.* \(transformers 99\.1\.0 wrote this config, a newer version than")

    @pytest.mark.parametrize("version", ["4.40.0", None, "soon", 3])
    def test_other_errors_are_left_alone(self, folder: Path, version: Any) -> None:
        edit_config(folder, wings=2, transformers_version=version)
        with pytest.raises(ValueError, match="unknown key 'wings'") as caught:
            open_checkpoint(folder)
        assert "newer" not in str(caught.value)

    def test_a_newer_config_that_can_be_read_is_read(self, folder: Path) -> None:
        edit_config(folder, transformers_version="99.1.0")
        with pytest.warns(
            UserWarning, match=r"config\.json: transformers 99\.1\.0 wrote this config, and it is read as"
        ):
            assert open_checkpoint(folder).native.spec.hidden_size == 32
        shown = CliRunner().invoke(app, ["info", str(folder)])
        assert shown.exit_code == 0
        assert shown.stderr.startswith("gearshift: ")
        assert len(shown.stderr.splitlines()) == 1

    def test_one_of_the_same_generation_is_read_in_silence(
        self, folder: Path, recwarn: pytest.WarningsRecorder
    ) -> None:
        edit_config(folder, transformers_version=f"{transformers.__version__.partition('.')[0]}.999.0")
        open_checkpoint(folder)
        assert not recwarn.list


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    refused(tmp_path, "holds no config.json", FileNotFoundError)
    with pytest.raises(FileNotFoundError, match=r"there is no .*/missing: name a model folder"):
        open_checkpoint(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match=r"there is no .*missing\.gguf"):
        open_checkpoint(tmp_path / "missing.gguf")
    (tmp_path / "notes.txt").write_text("hello")
    refused(tmp_path / "notes.txt", "neither a model folder nor")


class TestHub:
    def test_a_hub_name_is_downloaded(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[str] = []

        def download(name: str, **settings: Any) -> str:
            asked.append(name)
            return str(folder)

        monkeypatch.setattr("huggingface_hub.snapshot_download", download)
        checkpoint: Checkpoint = open_checkpoint("some-org/some-model")
        assert asked == ["some-org/some-model"]
        assert checkpoint.native.source == {"format": "llama", "name": "some-org/some-model"}

    def test_a_hub_that_does_not_answer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def download(name: str, **settings: Any) -> str:
            raise ConnectionError("no route\nto host")

        monkeypatch.setattr("huggingface_hub.snapshot_download", download)
        with pytest.raises(
            FileNotFoundError, match=r"no folder some-org/model, and the hub could not give it: no route \("
        ):
            open_checkpoint("some-org/model")
