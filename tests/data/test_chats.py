"""Chats on disk: rendered as the template does, the assistant's turns marked, whole chats in every sequence."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.data.letters import letters, spelled

from gearshift.data import Batch, ChatSource, Corpus, TokenSequences, open_chats
from gearshift.data.chats import ChatTemplate
from gearshift.data.corpus import chat_rows
from gearshift.data.readers import Files
from gearshift.data.tokens import tokenised

PLAIN = (
    "{% for m in messages %}{{ '<' + m.role[0] + '>' + m.content + '#\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<a>' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<' + m.role[0] + '>' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '#' }}{% endgeneration %}{% else %}{{ m.content + '#' }}{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<a>' }}{% endif %}"
)
WITHOUT_PROMPT = (
    "{% for m in messages %}{{ '[' + m.content + ']' if m.role == 'user' else m.content + '#' }}{% endfor %}"
)
FORGETFUL = "{% for m in messages %}{{ '<' + m.role[0] + '>' + (m.content if loop.last else '') + '#' }}{% endfor %}"
UNENDED = "{% for m in messages %}{{ '[' + m.content + ']' if m.role == 'user' else m.content }}{% endfor %}"
CALLING = PLAIN.replace("m.content", "(m.content or '') + (m.tool_calls[0].function.name if m.tool_calls else '')")
NOTHING = ord("_") - 32
STRICT = "{% if messages[0].role != 'user' %}{{ raise_exception('the user must begin') }}{% endif %}" + PLAIN


def tokenizer(template: str | None = PLAIN):
    made = letters()
    made.chat_template = template
    return made


def chat(*said: str) -> list[dict[str, str]]:
    """`u:hello` -> a message of the user."""
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return [{"role": roles[text[0]], "content": text[2:]} for text in said]


def write(path: Path, *values, field: str = "messages") -> Path:
    path.write_text("".join(json.dumps({field: value}) + "\n" for value in values))
    return path


def corpus(folder: Path, *chats, length: int = 24, template: str = PLAIN, **settings) -> Corpus:
    source = ChatSource(path=str(write(folder / "chats.jsonl", *chats)))
    return open_chats([source], tokenizer(template), length, cache=folder / "cache", **settings)


def rendered(value, template: str = PLAIN) -> tuple[str, list[str]]:
    """A chat's text, and the stretches of it that count."""
    text, spans = ChatTemplate(tokenizer(template))(value, "messages", "here")
    return text, [text[first:end] for first, end in spans]


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["compared", "marked"])
def test_the_assistant_is_marked_up_to_the_end_of_its_turn(template: str) -> None:
    value = chat("s:be brief", "u:hi", "a: hello\n", "u:why?", "a:", "t:42", "a:so", "u:bye")
    text, counted = rendered(value, template)
    assert text == "<s>be brief#\n<u>hi#\n<a> hello\n#\n<u>why?#\n<a>#\n<t>42#\n<a>so#\n<u>bye#\n"
    assert counted == [" hello\n#", "#", "so#"]


def test_a_template_without_a_prompt_for_the_assistant() -> None:
    assert rendered(chat("u:hi", "a:ho", "u:x", "a:"), WITHOUT_PROMPT) == ("[hi]ho#[x]#", ["ho#", "#"])


def test_turns_of_no_character_do_not_count() -> None:
    marked = "{% for m in messages %}{{ m.role }}{% generation %}{% endgeneration %}{% endfor %}"
    assert rendered(chat("u:hi", "a:", "u:x", "a:y"), UNENDED) == ("[hi][x]y", ["y"])
    assert rendered(chat("u:hi", "a:", "u:x", "a:"), UNENDED) == rendered(chat("u:hi", "a:"), marked) == ("", [])


def test_tokens_and_marks_are_those_of_transformers(tmp_path: Path) -> None:
    value = chat("u:hi there", "a:hello", "u:so", "a:well")
    theirs = tokenizer(MARKED).apply_chat_template(value, return_assistant_tokens_mask=True, return_dict=True)
    for template in (PLAIN, MARKED):
        file = corpus(tmp_path, value, template=template).cuts[0].file
        assert file.tokens.tolist() == theirs["input_ids"]
        assert file.counted.tolist() == [bool(mark) for mark in theirs["assistant_masks"]]


def test_share_gpt_and_tables_say_the_same(tmp_path: Path) -> None:
    ours = rendered(chat("s:x", "u:hi", "a:ho"))
    spoken = [{"from": "system", "value": "x"}, {"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
    assert rendered(spoken) == ours
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    messages = [message | {"tool_calls": None} for message in chat("s:x", "u:hi", "a:ho")]
    parquet.write_table(pyarrow.table({"conversations": [spoken], "messages": [messages]}), tmp_path / "a.parquet")
    renderer = ChatTemplate(tokenizer())
    for field in ("conversations", "messages"):
        assert [piece.text for piece in Files(tmp_path, field, renderer).pieces()] == [ours[0]]


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


def test_a_content_in_parts_is_one_text() -> None:
    value = [{"role": "user", "content": parts("h", "i")}, {"role": "assistant", "content": parts("ho")}]
    assert rendered(value) == rendered(chat("u:hi", "a:ho"))
    assert rendered([{"from": "human", "value": parts("hi")}, *value[1:]]) == rendered(value)


@pytest.mark.parametrize(
    "said",
    [{"role": "assistant", "content": None}, {"role": "assistant"}, {"from": "gpt", "value": None}],
    ids=["null", "none", "ShareGPT"],
)
def test_a_turn_that_only_calls_tools_is_rendered_as_transformers_does(said: dict[str, Any]) -> None:
    calls = [{"type": "function", "function": {"name": "add", "arguments": {}}}]
    value = [*chat("u:1+1"), {**said, "tool_calls": calls}, *chat("t:2", "a:two")]
    text, counted = rendered(value, CALLING)
    plain = [*value[:1], {"role": "assistant", "content": None, "tool_calls": calls}, *value[2:]]
    assert text == tokenizer(CALLING).apply_chat_template(plain, tokenize=False)
    assert counted == ["add#", "two#"]
    with pytest.raises(ValueError, match=r"here: the chat template cannot render .* 'content'; mend the chat, or give"):
        rendered(value)


def test_a_dataset_of_chats(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    write(tmp_path / "train.jsonl", chat("u:hi", "a:ho"), chat("u:x", "a:y"))
    made = open_chats([ChatSource(dataset=str(tmp_path))], tokenizer(), 24, cache=tmp_path / "cache")
    assert spelled(made.cuts[0].file.tokens) == "<u>hi#\n<a>ho#\n<u>x#\n<a>y#\n"


def rows(made: Corpus) -> list[tuple[str, str, list[int]]]:
    """Every sequence in the chats' order: its text, what counts in it (the rest is `_`), where chats begin."""
    read = [made.cuts[0].read(place) for place in range(len(made.cuts[0]))]
    return [
        (spelled(tokens), spelled(np.where(counted, tokens, NOTHING)), starts.nonzero()[0].tolist())
        for tokens, starts, counted in read
    ]


def unpadded(text: str, starts: list[int]) -> str:
    """A sequence's text without its padding, which begins as no chat does."""
    return text[: starts[-1]] if text[starts[-1]] == " " else text


def test_a_sequence_holds_whole_chats_and_padding(tmp_path: Path) -> None:
    made = corpus(tmp_path, chat("u:1", "a:2"), chat("u:3", "a:4"), chat("u:5", "a:67"))
    assert rows(made) == [
        ("<u>1#\n<a>2#\n<u>3#\n<a>4#\n", "_" * 9 + "2#" + "_" * 10 + "4#_", [0, 12]),
        ("<u>5#\n<a>67#\n" + " " * 11, "_" * 9 + "67#" + "_" * 12, [0, 13]),
    ]


def test_a_long_chat_is_cut_and_one_without_an_answer_left_out(tmp_path: Path, caplog) -> None:
    long, late = chat("u:12", "a:" + "x" * 40), chat("u:" + "y" * 40, "a:z")
    with caplog.at_level(logging.WARNING):
        made = corpus(tmp_path, chat("u:1", "a:2"), long, late, chat("u:3"), length=16)
    assert [text for text, _, _ in rows(made)] == ["<u>1#\n<a>2#\n    ", "<u>12#\n<a>xxxxxx"]
    assert "of 3 chats, 1 are cut after 16 tokens, and 1 are left out because" in caplog.text
    caplog.clear()
    assert len(corpus(tmp_path, chat("u:1", "a:2"), long, length=16, quiet=True)) == 2
    assert not caplog.text
    with pytest.raises(ValueError, match=r"in every chat in .*chats.jsonl, the assistant speaks only after 16 tokens"):
        corpus(tmp_path, late, length=16)


texts = st.text("xyz ", max_size=12)
chats = st.lists(st.lists(st.tuples(texts, texts), min_size=1, max_size=3), min_size=1, max_size=8)


@given(chats=chats, length=st.integers(12, 60))
def test_no_token_is_lost_but_those_beyond_a_sequence(tmp_path_factory, chats, length: int) -> None:
    folder = tmp_path_factory.mktemp("chats")
    values = [
        chat(*(line for question, answer in turns for line in (f"u:{question}", f"a:{answer}"))) for turns in chats
    ]
    whole = [ChatTemplate(tokenizer())(value, "messages", "here") for value in values]
    kept = [(text[:length], spans) for text, spans in whole if spans and spans[0][0] < length]
    if not kept:
        with pytest.raises(ValueError, match=r"the assistant speaks only after|nothing of the assistant"):
            corpus(folder, *values, length=length)
        return
    found = rows(corpus(folder, *values, length=length))
    assert "".join(unpadded(text, starts) for text, _, starts in found) == "".join(text for text, _ in kept)
    counted = sum(min(end, length) - min(first, length) for _, spans in kept for first, end in spans)
    assert sum(mark != "_" for _, marks, _ in found for mark in marks) == counted
    for text, _, starts in found:
        assert len(text) == length
        assert starts[0] == 0


def rows_one_by_one(file: SimpleNamespace, length: int) -> tuple[list[tuple[int, int]], int, int]:
    """The definition of `chat_rows`: its rows, and how many chats are cut and lost."""
    ends = [*file.starts[1:].tolist(), len(file.tokens)]
    found: list[tuple[int, int]] = []
    chat, cut, lost = 0, 0, 0
    while chat < len(ends):
        first, after = int(file.starts[chat]), chat
        while after < len(ends) and ends[after] <= first + length:
            after += 1
        if after > chat:
            found.append((first, ends[after - 1]))
        elif file.counted[first + 1 : first + length].any():
            found.append((first, first + length))
            cut += 1
        else:
            lost += 1
        chat = max(after, chat + 1)
    return found, cut, lost


@given(
    chats=st.lists(st.lists(st.booleans(), min_size=1, max_size=12), min_size=1, max_size=30), length=st.integers(2, 12)
)
def test_rows_are_those_found_chat_by_chat(chats: list[list[bool]], length: int) -> None:
    counted = np.array([mark for one in chats for mark in one])
    starts = np.cumsum([0, *map(len, chats[:-1])])
    file: Any = SimpleNamespace(name="x", starts=starts, tokens=counted, counted=counted)
    expected, cut, lost = rows_one_by_one(file, length)
    with patch("gearshift.data.corpus._log.warning") as said:
        if not expected:
            with pytest.raises(ValueError, match="the assistant speaks only after"):
                chat_rows(file, length)
            return
        made = chat_rows(file, length)
    assert made.dtype == np.int64
    assert made.tolist() == [list(row) for row in expected]
    assert [call.args[2:] for call in said.call_args_list] == ([(len(chats), cut, length, lost)] if cut or lost else [])


def test_batches_carry_the_marks_and_know_their_targets(tmp_path: Path) -> None:
    values = [chat(f"u:{number}", f"a:{number}{number}") for number in range(10, 30)]
    joined, packed = (corpus(tmp_path, *values, length=32, boundaries=kind) for kind in ("joined", "packed"))
    batch = packed.draw(range(4), 3)
    assert torch.equal(batch.tokens, joined.draw(range(4), 3).tokens)
    assert joined.draw(range(4), 3).starts is None
    following = batch.tokens.flatten().roll(-1)[batch.targeted]
    assert spelled(following).count("#") == 8
    assert batch.weight == len(following) == 40
    assert sum(part.weight for part in batch.split(3)) == 40
    assert [len(part) for part in batch.split(3)] == [3, 1]
    rest, held_out = packed.split(2)
    assert held_out.all.weight == 20
    assert len(rest) == 8
    memory = TokenSequences.of(packed.draw(range(10)))
    assert memory.draw(range(3), 1).weight == memory.split(4)[1].all.weight - 10 == 30


def test_a_token_without_anything_before_it_is_no_target() -> None:
    starts, counted = torch.zeros(2, 2, 4, dtype=torch.bool)
    counted[:] = torch.tensor([True, False, True, True])
    starts[1, 2] = True
    assert Batch(torch.zeros(2, 4).long(), None, counted).targeted.tolist() == [1, 2, 5, 6]
    assert Batch(torch.zeros(2, 4).long(), starts, counted).targeted.tolist() == [1, 2, 6]


def test_chats_are_tokenised_once_for_each_template(tmp_path: Path) -> None:
    class Reading(Files):
        def pieces(self):
            raise AssertionError("read again")

    value = chat("u:hi", "a:ho")
    first = corpus(tmp_path, value).cuts[0].file
    names = ["counted.bin", "documents.bin", "facts.json", "tokens.bin"]
    assert sorted(path.name for path in first.folder.iterdir()) == names
    again, other = (ChatTemplate(tokenizer(template)) for template in (PLAIN, STRICT))
    path = tmp_path / "chats.jsonl"
    assert tokenised(Reading(path, "messages", again), tokenizer(), tmp_path / "cache").folder == first.folder
    with pytest.raises(AssertionError, match="read again"):
        tokenised(Reading(path, "messages", other), tokenizer(), tmp_path / "cache")


def test_other_marks_on_the_same_text_are_other_data(tmp_path: Path) -> None:
    everything = "{% generation %}" + PLAIN + "{% endgeneration %}"
    digests = {corpus(tmp_path, chat("u:hi", "a:ho"), template=template).digest() for template in (PLAIN, everything)}
    assert len(digests) == 2


@pytest.mark.parametrize(
    ("value", "template", "sentence"),
    [
        ("hello", PLAIN, "'messages' is not a list of messages but str"),
        (None, PLAIN, "'messages' is not a list of messages but null"),
        (["hello"], PLAIN, "message 0 of 'messages' is not an object but str"),
        (
            [{"role": "bot", "content": "x"}],
            PLAIN,
            "message 0 of 'messages' has the role 'bot': known are system, .*gpt",
        ),
        ([{"content": "x"}], PLAIN, "has the role None"),
        ([{"role": "user"}], PLAIN, "message 0 of 'messages' has a content that is not a text but null"),
        ([{"role": "user", "content": ["x"]}], PLAIN, "has a content in parts, of which one is no text but str: only"),
        (
            [{"role": "user", "content": [*parts("x"), {"type": "image_url", "image_url": "y"}]}],
            PLAIN,
            r"line 1: message 0 .* one is no text but of type 'image_url': only text can be learnt, so take",
        ),
        ([{"role": "user", "content": 3}], PLAIN, "has a content that is not a text but int"),
        (
            [{"role": "assistant", "content": None, "tool_calls": []}],
            PLAIN,
            "has a content that is not a text but null",
        ),
        (chat("a:x", "u:y"), STRICT, "the chat template cannot render 'messages': the user must begin"),
        (chat("u:x", "a:y", "u:z"), FORGETFUL, r"what leads up to message 1 otherwise.* chat_template in the recipe"),
        (chat("u:x"), PLAIN, "there is no chat in .*: all that it holds has nothing of the assistant"),
        (chat("u:x", "a: "), PLAIN, "there is no chat in .*: all that it holds has nothing of the assistant"),
        (chat("u:x", "a:"), UNENDED, "there is no chat in .*: all that it holds has nothing of the assistant"),
    ],
)
def test_what_is_no_chat_is_refused_in_a_sentence(tmp_path: Path, value, template: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        corpus(tmp_path, value, template=template)
    assert "chats.jsonl" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_sources_and_tokenizers_that_cannot_serve_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("hello")
    write(tmp_path / "other.jsonl", "x", field="text")
    for path, sentence in [
        ("text.txt", r"no chats in .*text.txt: they are read from files that end in .jsonl, .ndjson, .parquet"),
        ("nowhere.jsonl", "no chats at .*nowhere.jsonl"),
        ("other.jsonl", "line 1: there is no column 'messages'; there is text"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            open_chats([ChatSource(path=str(tmp_path / path))], tokenizer(), 8, cache=tmp_path / "cache")
    with pytest.raises(ValueError, match=r"has no chat template: give a template file as chat_template in the recipe"):
        ChatTemplate(tokenizer(None))
