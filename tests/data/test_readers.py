"""Text from files of each kind, and every sentence about those that cannot be read."""

import builtins
import json
import tracemalloc
from pathlib import Path

import pytest

from gearshift.data import DataSource, readers
from gearshift.data.readers import Dataset, Documents, Files, read_text


def documents(reader) -> list[str]:
    made = [""]
    for piece in reader.pieces():
        made[-1] += piece.text
        if piece.ends:
            made.append("")
    assert made.pop() == ""
    assert sum(piece.amount for piece in reader.pieces()) == pytest.approx(reader.size)
    return made


def jsonl(path: Path, *rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def parquet(path: Path, **columns) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet as writer

    writer.write_table(pyarrow.table(columns), path)
    return path


def test_a_folder_gives_its_files_in_order_whatever_their_kind(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "last.md").write_text("äö\r\nü", encoding="utf-8", newline="")
    jsonl(tmp_path / "a.jsonl", {"text": "one", "id": 1}, {"text": "two\nlines"})
    parquet(tmp_path / "b.parquet", text=["three", "four"], id=[1, 2])
    (tmp_path / "code.py").write_text("no text")
    assert documents(Files(tmp_path)) == ["one", "two\nlines", "three", "four", "äö\nü"]


def test_another_field(tmp_path: Path) -> None:
    assert documents(Files(jsonl(tmp_path / "a.jsonl", {"body": "x"}), "body")) == ["x"]
    assert documents(Files(parquet(tmp_path / "a.parquet", body=["x", "y"]), "body")) == ["x", "y"]


def test_a_long_text_comes_in_pieces_of_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(f"line {number} ü\n" for number in range(100)) + "end"
    (tmp_path / "long.txt").write_text(text, encoding="utf-8")
    monkeypatch.setattr(readers, "PIECE", 64)
    pieces = list(Files(tmp_path / "long.txt").pieces())
    assert len(pieces) > 10
    assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert all(piece.text.endswith("\n") for piece in pieces[:-1])
    assert documents(Files(tmp_path / "long.txt")) == [text]
    assert read_text(tmp_path / "long.txt") == text


def test_blank_lines_of_jsonl_are_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n\n{"text": "y"}')
    assert [text for text in documents(Files(tmp_path / "a.jsonl")) if text] == ["x", "y"]


def test_read_text_parts_files_by_blank_lines(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt"):
        (tmp_path / name).write_text(name)
    assert read_text(tmp_path) == "a.txt\n\n\nb.txt"


BAD = {
    "bad.txt": (b"good\n\xff\xfe", r"bad.txt is not UTF-8 text: byte 5 cannot be read"),
    "bad.jsonl": (b'{"text": "x"}\n{"text": \n', r"bad.jsonl, line 2: not valid JSON \(Expecting value, column 9\)"),
    "utf.jsonl": (b'{"text": "x"}\n{"text": "\xff"}\n', r"utf.jsonl, line 2: not UTF-8 text, byte 10 of the line"),
    "list.jsonl": (b'["x"]', r"list.jsonl, line 1: not an object with the key 'text'"),
    "key.jsonl": (b'{"body": "x", "id": 1}', r"line 1: there is no column 'text'; there is body, id"),
    "type.jsonl": (b'{"text": "x"}\n{"text": 3}', r"line 2: 'text' is not a text but int"),
    "half.jsonl": (b'{"text": "ab\\ud800"}', r"line 1: 'text' is not Unicode text: character 2 is half of a pair"),
    "null.jsonl": (b'{"text": null}', r"line 1: 'text' is not a text but null"),
    "bad.parquet": (b"PAR1 nonsense", r"bad.parquet cannot be read as parquet"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_said_in_a_sentence(tmp_path: Path, name: str) -> None:
    content, sentence = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=sentence) as caught:
        list(Files(tmp_path / name).pieces())
    assert "\n" not in str(caught.value)


def test_the_columns_of_a_parquet_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no column 'text'; there is body, id"):
        list(Files(parquet(tmp_path / "a.parquet", body=["x"], id=[1])).pieces())
    with pytest.raises(ValueError, match=r"a.parquet, row 2: 'text' is not a text but null"):
        list(Files(parquet(tmp_path / "a.parquet", text=["x", None])).pieces())


def test_missing_places_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no text at .*nowhere: there is no such file or folder"):
        Files(tmp_path / "nowhere")
    (tmp_path / "picture.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"it holds no file that ends in \.jsonl, .*\.txt"):
        Files(tmp_path)


def test_identity_follows_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    before = Files(path).identity()
    assert Files(path).identity() == before
    assert Files(path, "body").identity() != before
    path.write_text("two, longer")
    assert Files(path).identity() != before
    assert Documents("x", ["a", "b"]).identity() != Documents("x", ["ab"]).identity()


def test_a_table_is_read_in_parts(tmp_path: Path) -> None:
    pieces = Files(parquet(tmp_path / "a.parquet", text=[f"{row:05}" * 1000 for row in range(4000)])).pieces()
    tracemalloc.start()
    assert next(pieces).text.startswith("0000000000")
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 10e6


def test_the_case_of_a_suffix_is_all_one(tmp_path: Path) -> None:
    (tmp_path / "a.JSONL").write_text('{"text": "one"}\n')
    (tmp_path / "b.TXT").write_text("two")
    assert documents(Files(tmp_path / "a.JSONL")) == ["one"]
    assert documents(Files(tmp_path)) == ["one", "two"]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch):
    """The hub, replaced by two rows in memory."""
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        if name == "org/silent":
            raise ConnectionError
        if name != "org/name":
            raise ConnectionError(f"Couldn't reach {name}\nand more")
        return datasets.Dataset.from_dict({"text": ["x", "y"], "id": [1, 2], "title": ["x", None]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_a_dataset_of_the_hub(hub) -> None:
    reader = Dataset("org/name", "en", "train")
    assert hub == [("org/name", "en", "train")]
    assert documents(reader) == ["x", "y"]
    assert json.dumps(reader.identity()) == json.dumps(Dataset("org/name", "en", "train").identity())
    assert documents(DataSource(dataset="org/name").reader()) == ["x", "y"]
    assert hub[-1] == ("org/name", None, "train")
    with pytest.raises(ValueError, match="the dataset 'org/name': there is no column 'body'; there is text, id, title"):
        Dataset("org/name", None, "train", "body")
    with pytest.raises(ValueError, match=r"^org/name, row 2: 'title' is not a text but null"):
        documents(Dataset("org/name", None, "train", "title"))
    with pytest.raises(ValueError, match=r"'org/other' cannot be loaded: Couldn't reach org/other$"):
        Dataset("org/other", None, "train")
    with pytest.raises(ValueError, match=r"'org/silent' cannot be loaded: ConnectionError$"):
        Dataset("org/silent", None, "train")


def test_packages_that_are_missing_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = parquet(tmp_path / "a.parquet", text=["x"])
    real = builtins.__import__

    def without(name, *rest):
        if name.split(".")[0] in ("pyarrow", "datasets"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"needs pyarrow: pip install \"gearshift\[data\]\""):
        list(Files(path).pieces())
    with pytest.raises(ValueError, match=r"datasets is not installed: pip install \"gearshift\[data\]\""):
        Dataset("org/name", None, "train")
