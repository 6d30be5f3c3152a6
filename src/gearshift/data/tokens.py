"""Text and chats tokenised once, into memory-mapped files that every later run opens."""

import hashlib
import json
import os
import shutil
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from rich.console import Console

from gearshift.data.readers import Piece, Reader, Spans
from gearshift.files import writing
from gearshift.locks import release, wait_for
from gearshift.plan.ahead import made_ahead
from gearshift.progress import Advance, bar

LAYOUT = 2
"""Of the files. One more than before wherever the same text would be written otherwise."""
FACTS = {"dtype", "tokens", "documents", "digest"}
"""What `facts.json` says of them."""
GROUP = 4 * 2**20
"""Characters that are tokenised at a time, in parallel over documents and pieces of them."""


@dataclass(frozen=True)
class TokenFile:
    """The tokens of one source, on disk."""

    folder: Path
    name: str
    """What a person calls the source."""

    @cached_property
    def facts(self) -> dict[str, Any]:
        """`dtype`, `tokens`, `documents` and the `digest` of the tokens and their documents."""
        with self._damage():
            facts = json.loads((self.folder / "facts.json").read_text())
            if not isinstance(facts, dict) or not facts.keys() >= FACTS:
                raise ValueError(f"facts.json does not say all of {', '.join(sorted(FACTS))}")
            return facts

    @cached_property
    def tokens(self) -> np.ndarray:
        """[tokens], memory-mapped."""
        return self._mapped("tokens.bin", self.facts["dtype"], "tokens")

    @cached_property
    def starts(self) -> np.ndarray:
        """[documents], int64, rising, memory-mapped: the first token of each document."""
        return self._mapped("documents.bin", np.int64, "documents")

    @cached_property
    def counted(self) -> np.ndarray:
        """[tokens], bool, memory-mapped, of chats only: whether a token is to be learnt."""
        return self._mapped("counted.bin", np.bool_, "tokens")

    def _mapped(self, name: str, dtype: Any, length: str) -> np.ndarray:
        """A file of as many numbers as the fact `length` says. ValueError if it has others."""
        expected = self.facts[length]
        with self._damage():
            mapped = np.memmap(self.folder / name, dtype, "r")
            if len(mapped) != expected:
                raise ValueError(f"{name} holds {len(mapped):,} of {expected:,} numbers")
            return mapped

    @contextmanager
    def _damage(self) -> Iterator[None]:
        """Within, ValueError that says what to do where a file is not as it was written."""
        try:
            yield
        except (OSError, ValueError) as error:
            raise ValueError(
                f"the tokens of {self.name} in {self.folder} are damaged ({error}): remove that folder, so that they"
                " are made again"
            ) from None


def cache_folder() -> Path:
    """Where tokens are kept: $GEARSHIFT_CACHE, or `gearshift` in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("GEARSHIFT_CACHE") or Path(home) / "gearshift") / "tokens"


def tokenised(reader: Reader, tokenizer: Any, cache: str | Path | None = None) -> TokenFile:
    """The tokens of a source: those an earlier call has written, or new ones, with a progress bar on a terminal.

    Each document but a chat is followed by the tokenizer's end-of-sequence token, if it has one. Of processes that want
    the same tokens at the same time, one writes and the others wait, and say so on stderr: of a torchrun job the first
    on each machine alone. ValueError if the source has no text, or nothing of the assistant in any chat, or cannot be
    read.
    """
    cache = Path(cache) if cache else cache_folder()
    identity = json.dumps([LAYOUT, reader.identity(), tokenizer_identity(tokenizer)])
    target = cache / hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        lock = FileLock(cache / f"{target.name}.lock")
        try:
            wait_for(lock, lambda who: _say_waiting(reader.name, who))
            if not target.exists():
                _write(reader, tokenizer, target)
        finally:
            release(lock)
    return TokenFile(target, reader.name)


def _say_waiting(name: str, who: str) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"waiting for the tokens of {name}, which another process makes{who}", file=sys.stderr)


def tokenizer_identity(tokenizer: Any) -> str:
    """A digest of all that decides the tokens of a text."""
    if getattr(tokenizer, "is_fast", False):
        said = tokenizer.backend_tokenizer.to_str()
    else:
        said = json.dumps([type(tokenizer).__name__, tokenizer.get_vocab(), repr(tokenizer.init_kwargs)])
    return hashlib.blake2b(f"{said} {tokenizer.eos_token_id}".encode(), digest_size=16).hexdigest()


def _write(reader: Reader, tokenizer: Any, target: Path) -> None:
    """Tokenise all of a source into `target`, written aside and renamed."""
    fresh = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    try:
        with writing(target), bar(Console(stderr=True), f"tokenising {reader.name}", reader.size) as advance:
            facts = _write_tokens(reader, tokenizer, fresh, advance)
            (fresh / "facts.json").write_text(json.dumps(facts))
        if not facts["tokens"]:
            what = ("text", "is empty") if reader.chats is None else ("chat", "has nothing of the assistant")
            raise ValueError(f"there is no {what[0]} in {reader.name}: all that it holds {what[1]}")
        fresh.rename(target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _write_tokens(reader: Reader, tokenizer: Any, folder: Path, advance: Advance) -> dict[str, Any]:
    """Write `tokens.bin` and `documents.bin`, and `counted.bin` of chats. Returns the facts."""
    dtype = np.min_scalar_type(max(tokenizer.get_vocab().values()))
    chats = reader.chats is not None  # their template ends them
    end = b"" if tokenizer.eos_token_id is None or chats else np.array([tokenizer.eos_token_id], dtype).tobytes()
    digest = hashlib.blake2b(digest_size=16)
    starts, written, begun = array("q"), 0, False

    def encode(group: list[Piece]) -> list[tuple[Piece, bytes, bytes]]:
        encoded = tokenizer(
            [piece.text for piece in group],
            add_special_tokens=False,
            return_attention_mask=False,
            return_offsets_mapping=chats,
            verbose=False,
        )
        contents = [np.array(ids, dtype).tobytes() for ids in encoded["input_ids"]]
        marks = [b""] * len(group)
        if chats:
            placed = zip(group, encoded["offset_mapping"], strict=True)
            marks = [_overlapping(offsets, piece.counted or []).tobytes() for piece, offsets in placed]
        return list(zip(group, contents, marks, strict=True))

    ahead = made_ahead(_groups(reader.pieces()), encode, lambda group: 1, most=2)
    with ExitStack() as stack:
        file = stack.enter_context((folder / "tokens.bin").open("wb"))
        marked = stack.enter_context((folder / "counted.bin").open("wb")) if chats else None
        for group in stack.enter_context(closing(ahead)):
            for piece, content, marks in group:
                if content and not begun:
                    starts.append(written)
                    begun = True
                if piece.ends and begun:
                    content += end
                    begun = False
                file.write(content)
                digest.update(content)
                if marked is not None:
                    marked.write(marks)
                    digest.update(marks)
                written += len(content) // dtype.itemsize
                advance(piece.amount)
    documents = np.array(starts, np.int64).tobytes()
    (folder / "documents.bin").write_bytes(documents)
    digest.update(documents)
    return {"dtype": dtype.name, "tokens": written, "documents": len(starts), "digest": digest.hexdigest()}


def _overlapping(offsets: Sequence[tuple[int, int]], spans: Spans) -> np.ndarray:
    """[tokens], bool: whether a token, with the characters `offsets` [tokens], has one of those in `spans`."""
    edges = np.array(offsets, np.int64).reshape(-1, 2)
    marks = np.zeros(len(edges), np.bool_)
    for first, end in spans:
        marks |= (edges[:, 0] < end) & (edges[:, 1] > first)
    return marks


def _groups(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Pieces in lists of about GROUP characters."""
    group: list[Piece] = []
    size = 0
    for piece in pieces:
        group.append(piece)
        size += len(piece.text)
        if size >= GROUP:
            yield group
            group, size = [], 0
    if group:
        yield group
