"""Tokens on disk, cut into sequences: nothing lost, nothing doubled, boundaries where they belong."""

import json
import os
import shutil
import socket
from collections import Counter
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from tests.data.letters import END, letters, spelled
from tests.train.processes import run_processes

from gearshift import locks
from gearshift.data import Corpus, DataSource, TokenSequences, open_corpus, tokens
from gearshift.data.python_text import python_documents
from gearshift.data.readers import Documents, Files
from gearshift.data.tokens import tokenised, tokenizer_identity
from gearshift.locks import holder

texts = st.lists(st.text("abc", max_size=40), min_size=1, max_size=12).filter(any)


def write(path: Path, documents: list[str]) -> DataSource:
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return DataSource(path=str(path))


def corpus(folder: Path, *sources: list[str], length: int = 8, weights: tuple = (), **settings) -> Corpus:
    made = [write(folder / f"{number}.jsonl", documents) for number, documents in enumerate(sources)]
    if weights:
        made = [source.model_copy(update={"weight": weight}) for source, weight in zip(made, weights, strict=True)]
    return open_corpus(made, letters(), length, cache=folder / "cache", **settings)


def in_order(corpus: Corpus) -> list[tuple[str, list[int]]]:
    """Every sequence of a corpus of one source in the text's order: its text, and where documents begin in it."""
    read = [corpus.cuts[0].read(place) for place in range(len(corpus.cuts[0]))]
    return [(spelled(row), starts.nonzero()[0].tolist()) for row, starts in read]


def test_documents_follow_each_other_and_no_token_is_lost(tmp_path: Path) -> None:
    made = corpus(tmp_path, ["abc", "", "defghijklmnopqrstuv", "w", "xyz"])
    assert in_order(made) == [("abc|defg", [0, 4]), ("hijklmno", []), ("pqrstuv|", []), ]  # fmt: skip
    assert made.cuts[0].file.facts["documents"] == 4
    assert spelled(made.cuts[0].file.tokens) == "abc|defghijklmnopqrstuv|w|xyz|"


@given(documents=texts, length=st.integers(1, 9))
def test_sequences_put_together_are_the_documents(tmp_path_factory, documents: list[str], length: int) -> None:
    folder = tmp_path_factory.mktemp("corpus")
    file = tokenised(Documents("x", documents), letters(), folder)
    whole = "".join(f"{document}|" for document in documents if document)
    assert spelled(file.tokens) == whole
    if len(whole) < length:
        return
    rows = in_order(corpus(folder, documents, length=length))
    assert "".join(text for text, _ in rows) == whole[: len(whole) // length * length]
    begun = [number * length + start for number, (_, starts) in enumerate(rows) for start in starts]
    ends = [0, *(place + 1 for place, letter in enumerate(whole) if letter == "|")]
    assert begun == [end for end in ends if end < len(rows) * length and end < len(whole)]


def test_without_an_end_token_documents_still_begin_somewhere(tmp_path: Path) -> None:
    file = tokenised(Documents("x", ["ab", "c"]), letters(end=False), tmp_path)
    assert (spelled(file.tokens), file.starts.tolist()) == ("abc", [0, 2])


def test_a_document_in_pieces_is_one_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gearshift.data.readers.PIECE", 4)
    monkeypatch.setattr(tokens, "GROUP", 10)
    for name, text in (("a.txt", "one\ntwo\nthree\n"), ("b.txt", ""), ("c.txt", "four")):
        (tmp_path / name).write_text(text)
    file = tokenised(Files(tmp_path), letters(), tmp_path / "cache")
    assert (spelled(file.tokens), file.starts.tolist()) == ("one\ntwo\nthree\n|four|", [0, 15])


@pytest.mark.parametrize(("largest", "dtype"), [(96, "uint8"), (300, "uint16"), (70_000, "uint32")])
def test_tokens_take_the_fewest_bytes(tmp_path: Path, largest: int, dtype: str) -> None:
    tokenizer = letters()
    tokenizer.add_tokens([f"<{number}>" for number in range(largest - END)])
    file = tokenised(Documents("x", [f"a<{largest - END - 1}>" if largest > END else "a"]), tokenizer, tmp_path)
    assert file.facts["dtype"] == file.tokens.dtype.name == dtype
    assert max(largest, END) == int(file.tokens.max())


def drawn(made, numbers, seed=0) -> list[str]:
    return [spelled(row) for row in made.draw(numbers, seed).tokens]


def alphabet(count: int) -> list[str]:
    return [chr(33 + number) * 7 for number in range(count)]


def test_any_sequence_of_the_order_can_be_had_by_itself(tmp_path: Path) -> None:
    made = corpus(tmp_path, alphabet(20), alphabet(9), weights=(3, 1))
    order = drawn(made, range(100), 5)
    assert order == drawn(corpus(tmp_path, alphabet(20), alphabet(9), weights=(3, 1)), range(100), 5)
    assert drawn(made, [77, 3, 50], 5) == [order[77], order[3], order[50]]
    assert order != drawn(made, range(100), 6)


def test_each_epoch_has_every_sequence_once_in_another_order(tmp_path: Path) -> None:
    made = corpus(tmp_path, alphabet(20))
    epochs = [drawn(made, range(20 * epoch, 20 * epoch + 20)) for epoch in range(3)]
    assert all(sorted(epoch) == sorted(f"{text}|" for text in alphabet(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_sources_are_mixed_by_their_weights_whatever_their_sizes(tmp_path: Path) -> None:
    made = corpus(tmp_path, ["a" * 7] * 50, ["b" * 7] * 3, ["c" * 7] * 10, weights=(0.5, 0.3, 0.2))
    counts = Counter(text[0] for text in drawn(made, range(1000)))
    assert {letter: round(count, -1) for letter, count in counts.items()} == {"a": 500, "b": 300, "c": 200}
    early = Counter(text[0] for text in drawn(made, range(40)))
    assert abs(early["b"] - 12) <= 2


def test_what_is_held_out_is_spread_and_never_drawn(tmp_path: Path) -> None:
    made = corpus(tmp_path, alphabet(20))
    rest, held_out = made.split(3)
    assert [spelled(row)[0] for row in held_out.tokens] == [chr(33 + number) for number in (0, 10, 19)]
    assert len(rest) == 17
    epoch = drawn(rest, range(17))
    assert sorted(epoch) == sorted(f"{text}|" for number, text in enumerate(alphabet(20)) if number not in (0, 10, 19))
    less, more_held_out = rest.split(2)
    epoch = drawn(less, range(15)) + [spelled(row) for row in (*held_out.tokens, *more_held_out.tokens)]
    assert sorted(epoch) == sorted(f"{text}|" for text in alphabet(20))
    mixed = corpus(tmp_path, alphabet(20), alphabet(9), weights=(3, 1)).split(4)[1]
    assert len(mixed) == 4
    with pytest.raises(ValueError, match="the text gives 20 sequences of 8 tokens: too few to hold out 20"):
        made.split(20)
    with pytest.raises(ValueError, match=r"the text in .*0.jsonl gives 20 sequences of 8 tokens: too few"):
        corpus(tmp_path, alphabet(20), alphabet(9), weights=(30, 1)).split(25)


def test_what_is_held_out_in_memory_is_the_same(tmp_path: Path) -> None:
    made = corpus(tmp_path, alphabet(20))
    everything = TokenSequences(torch.tensor(np.stack([made.cuts[0].read(place)[0] for place in range(20)])).long())
    for ours, theirs in zip(made.split(6), everything.split(6), strict=True):
        assert torch.equal(ours.draw(range(40), 7).tokens, theirs.draw(range(40), 7).tokens)


def test_packed_sequences_know_their_documents(tmp_path: Path) -> None:
    documents = ["abc", "defghijklmnopqrstuv", "w", "xyz"]
    joined, packed = (corpus(tmp_path, documents, boundaries=kind) for kind in ("joined", "packed"))
    assert joined.draw(range(3)).starts is None
    batch = packed.draw(range(3))
    assert torch.equal(batch.tokens, joined.draw(range(3)).tokens)
    first = [spelled(row) for row in batch.tokens].index("abc|defg")
    assert batch.starts[first].nonzero().flatten().tolist() == [0, 4]
    assert batch.cu_seqlens.tolist() == sorted({0, 8, 16, 24, 8 * first + 4})
    assert packed.split(1)[1].starts.tolist() == [[True, False, False, False, True, False, False, False]]


def test_a_second_run_does_not_tokenise(tmp_path: Path) -> None:
    first = corpus(tmp_path, alphabet(20))
    tokenizer = letters()

    class Reading(Files):
        def pieces(self):
            raise AssertionError("read again")

    file = tokenised(Reading(tmp_path / "0.jsonl"), tokenizer, tmp_path / "cache")
    assert file.folder == first.cuts[0].file.folder
    assert sorted(path.name for path in file.folder.iterdir()) == ["documents.bin", "facts.json", "tokens.bin"]
    os.utime(tmp_path / "0.jsonl", ns=(1, 1))
    with pytest.raises(AssertionError, match="read again"):
        tokenised(Reading(tmp_path / "0.jsonl"), tokenizer, tmp_path / "cache")


def test_another_tokenizer_makes_other_tokens(tmp_path: Path) -> None:
    more = letters()
    more.add_tokens(["<more>"])
    assert len({tokenizer_identity(tokenizer) for tokenizer in (letters(), letters(), letters(end=False), more)}) == 3
    before = corpus(tmp_path, alphabet(20)).digest()
    assert corpus(tmp_path, alphabet(20)).digest() == before
    assert corpus(tmp_path, alphabet(20), length=9).digest() != before
    assert corpus(tmp_path, alphabet(21)).digest() != before


def test_an_interrupted_run_leaves_nothing_that_is_mistaken_for_tokens(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", ["good"])
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n{"text"')
    with pytest.raises(ValueError, match=r"a.jsonl, line 2: not valid JSON"):
        open_corpus([source], letters(), 2, cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
    write(tmp_path / "a.jsonl", ["good"])
    assert len(open_corpus([source], letters(), 2, cache=tmp_path / "cache")) == 2
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.parametrize("facts", ["{}", "[]"])
def test_facts_that_leave_something_out_are_damaged(tmp_path: Path, facts: str) -> None:
    given = [write(tmp_path / "a.jsonl", alphabet(20))], letters(), 8, "packed", tmp_path / "cache"
    open_corpus(*given)
    (damaged,) = (tmp_path / "cache").glob("*/facts.json")
    damaged.write_text(facts)
    with pytest.raises(ValueError, match=r"a.jsonl in .* are damaged \(facts.json does not say all of"):
        open_corpus(*given)


@pytest.mark.parametrize("file", ["tokens.bin", "documents.bin", "facts.json"])
@pytest.mark.parametrize("left", [0.5, 0, None])
def test_damaged_tokens_are_not_mistaken_for_all_of_them(tmp_path: Path, file: str, left: float | None) -> None:
    """A part of a file, an empty file, none."""
    given = [write(tmp_path / "a.jsonl", alphabet(20))], letters(), 8, "packed", tmp_path / "cache"
    whole = open_corpus(*given).draw(range(3))
    (damaged,) = (tmp_path / "cache").glob(f"*/{file}")
    content = damaged.read_bytes()
    damaged.unlink() if left is None else damaged.write_bytes(content[: int(left * len(content))])
    with pytest.raises(ValueError, match=r"the tokens of .*a.jsonl in .* are damaged \(.*\): remove that folder"):
        open_corpus(*given).draw(range(3))
    shutil.rmtree(damaged.parent)
    assert torch.equal(open_corpus(*given).draw(range(3)).starts, whole.starts)


def _count_writers(path: str, cache: str, counted: str) -> None:
    class Counting(Files):
        def pieces(self):
            with Path(counted).open("a") as file:
                file.write("once\n")
            return super().pieces()

    assert spelled(tokenised(Counting(path), letters(), cache).tokens).startswith("!!!!!!!|")


def test_of_processes_that_want_the_same_tokens_one_writes(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", alphabet(60) * 50)
    run_processes(3, _count_writers, *(str(tmp_path / name) for name in ("a.jsonl", "cache", "counted")))
    assert (tmp_path / "counted").read_text() == "once\n"


@pytest.mark.parametrize("rank", [None, "0", "1"])
def test_who_waits_for_tokens_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, rank) -> None:
    """But not in processes of a torchrun job that others of their machine speak for."""
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    given = Documents("x", ["ab"]), letters(), tmp_path
    other, waits = Thread(target=tokenised, args=given), Event()

    def watched(lock: FileLock) -> str:
        waits.set()
        return holder(lock)

    def slow(*to_write: Any) -> None:
        other.start()
        assert waits.wait(20)
        write_tokens(*to_write)

    write_tokens = tokens._write
    monkeypatch.setattr(locks, "holder", watched)
    monkeypatch.setattr(tokens, "_write", slow)
    tokenised(*given)
    other.join()
    who = f"process {os.getpid()} on {socket.gethostname()}"
    said = f"waiting for the tokens of x, which another process makes ({who})\n"
    assert capsys.readouterr().err == ("" if rank == "1" else said)
    assert [path.suffix for path in tmp_path.iterdir()] == [""]


def test_without_sources_there_is_the_text_that_python_carries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = python_documents()[:9]
    monkeypatch.setattr("gearshift.data.corpus.python_documents", lambda: few)
    made = open_corpus([], letters(), 64, cache=tmp_path)
    assert spelled(made.cuts[0].file.tokens).startswith(few[0][:10])
    assert made.cuts[0].file.facts["documents"] == 9


def test_texts_that_are_too_short_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the text is too short: 4 tokens do not make one sequence of 8"):
        corpus(tmp_path, ["abc"])
    with pytest.raises(ValueError, match=r"the text in .*1.jsonl is too short: 4 tokens"):
        corpus(tmp_path, ["abcdefghi"], ["abc"])
    with pytest.raises(ValueError, match=r"there is no text in .*0.jsonl: all that it holds is empty"):
        corpus(tmp_path, ["", ""])


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ({}, "either a path or a dataset"),
        ({"path": "x", "dataset": "y"}, "either a path or a dataset"),
        ({"path": "x", "split": "train"}, "config and split belong to a dataset"),
        ({"path": "x", "weight": 0}, "greater than 0"),
        ({"path": "x", "column": "text"}, "Extra inputs"),
    ],
)
def test_sources_that_make_no_sense_are_refused(source: dict, sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        DataSource.model_validate(source)
