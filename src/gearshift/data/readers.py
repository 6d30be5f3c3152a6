"""Text and chats from where they lie, a piece at a time: plain files, jsonl, parquet, datasets of the hub."""

import hashlib
import json
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Protocol

TEXT = (".txt", ".md", ".rst", ".text")
LINES = (".jsonl", ".ndjson")
PARQUET = (".parquet",)
PIECE = 2**20
"""Bytes. A longer plain text is read in pieces, cut at ends of lines."""
ROWS = 1000
"""Of a table, read at a time."""
EXTRA = 'pip install "gearshift[data]"'

Spans = list[tuple[int, int]]
"""Stretches of a text: (first character, the one after the last), rising and apart."""


class Piece(NamedTuple):
    """A document, or a part of one."""

    text: str
    ends: bool
    """Whether the document ends here."""
    amount: float
    """How much of the reader's `size` was read for it."""
    counted: Spans | None = None
    """Of a chat, the characters that are to be learnt."""


class ChatRenderer(Protocol):
    """What makes a text of a row's chat."""

    def identity(self) -> Any:
        """What changes if chats may come out otherwise, as JSON."""
        ...

    def __call__(self, value: Any, field: str, where: str) -> tuple[str, Spans]:
        """A chat's text and what of it is to be learnt. ValueError, beginning with `where`, if it is no chat."""
        ...


class Reader(Protocol):
    """A source of text."""

    name: str
    """What a person calls it."""
    size: int
    """What all pieces' amounts add up to."""
    chats: ChatRenderer | None
    """What made the pieces of chats. None: they are plain text."""

    def identity(self) -> Any:
        """What changes if the text may have changed, as JSON."""
        ...

    def pieces(self) -> Iterator[Piece]:
        """All documents, in order. ValueError, in a sentence, where one cannot be read."""
        ...


def find_files(path: Path, of_chats: bool) -> list[Path]:
    """The file at `path`, or all below a folder that may hold text (or chats), sorted. ValueError if there is none."""
    what, suffixes = ("chats", (*LINES, *PARQUET)) if of_chats else ("text", (*TEXT, *LINES, *PARQUET))
    if not path.exists():
        raise ValueError(f"no {what} at {path}: there is no such file or folder")
    inside = (file for file in path.rglob("*") if _suffix(file) in suffixes and file.is_file())
    files = sorted(inside) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"no {what} in {path}: it holds no file that ends in {', '.join(sorted(suffixes))}")
    if of_chats and _suffix(path) not in suffixes and not path.is_dir():
        raise ValueError(f"no chats in {path}: they are read from files that end in {', '.join(sorted(suffixes))}")
    return files


class Files:
    """A file, or all files below a folder that hold text, sorted by path: `.jsonl`, `.parquet`, or plain text."""

    def __init__(self, path: str | Path, field: str = "text", chats: ChatRenderer | None = None):
        """`field` is the key or column of the text, or of the `chats`. ValueError if there is no such file."""
        self.name = str(path)
        self.field = field
        self.chats = chats
        self.files = find_files(Path(path), of_chats=chats is not None)
        self.size = sum(file.stat().st_size for file in self.files)

    def identity(self) -> Any:
        stats = [(str(file.resolve()), file.stat()) for file in self.files]
        seen = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
        return [self.field, seen, *_identity(self.chats)]

    def pieces(self) -> Iterator[Piece]:
        for file in self.files:
            if _suffix(file) in LINES:
                yield from _lines(file, self.field, self.chats)
            elif _suffix(file) in PARQUET:
                yield from _parquet(file, self.field, self.chats)
            else:
                yield from _plain(file)


class Dataset:
    """A dataset of the Hugging Face hub, or anything else that `datasets.load_dataset` takes by name."""

    def __init__(
        self, dataset: str, config: str | None, split: str, field: str = "text", chats: ChatRenderer | None = None
    ):
        """`field` is the column of the text, or of the `chats`. ValueError if there is none, or no such dataset."""
        self.name = dataset
        self.field = field
        self.chats = chats
        load_dataset = _load_dataset()
        try:
            self.rows = load_dataset(dataset, config, split=split)
        except Exception as error:  # what loading a dataset runs into is as varied as datasets are
            said = str(error).strip().splitlines() or [type(error).__name__]
            raise ValueError(f"the dataset {dataset!r} cannot be loaded: {said[0]}") from None
        _check_column(f"the dataset {dataset!r}", field, self.rows.column_names)
        self.size = len(self.rows)

    def identity(self) -> Any:
        return [self.name, self.field, self.rows._fingerprint, *_identity(self.chats)]

    def pieces(self) -> Iterator[Piece]:
        batches = self.rows.select_columns([self.field]).iter(ROWS)
        values = chain.from_iterable(rows[self.field] for rows in batches)
        for number, value in enumerate(values, start=1):
            yield _document(value, self.field, f"{self.name}, row {number}", 1, self.chats)


class Documents:
    """Texts in memory."""

    def __init__(self, name: str, texts: list[str]):
        self.name = name
        self.chats: ChatRenderer | None = None
        self.texts = texts
        self.size = sum(map(len, texts))

    def identity(self) -> Any:
        return hashlib.blake2b("\0".join(self.texts).encode(), digest_size=16).hexdigest()

    def pieces(self) -> Iterator[Piece]:
        return (Piece(text, True, len(text)) for text in self.texts)


def read_text(path: str | Path) -> str:
    """The text of a file, or of all text files below a folder, sorted by path. ValueError if there is none."""
    return "".join(piece.text + "\n\n\n" * piece.ends for piece in Files(path).pieces()).removesuffix("\n\n\n")


def _suffix(path: Path) -> str:
    return path.suffix.lower()


def _plain(path: Path) -> Iterator[Piece]:
    with path.open("rb") as file:
        at = 0
        lines = file.readlines(PIECE)
        while lines:
            content = b"".join(lines)
            lines = file.readlines(PIECE)
            try:
                text = content.decode()
            except UnicodeDecodeError as error:
                raise ValueError(f"{path} is not UTF-8 text: byte {at + error.start} cannot be read") from None
            yield Piece(text.replace("\r\n", "\n").replace("\r", "\n"), not lines, len(content))
            at += len(content)


def _lines(path: Path, field: str, chats: ChatRenderer | None) -> Iterator[Piece]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}, line {number}"
            if not line.strip():
                yield Piece("", True, len(line))
                continue
            try:
                row = json.loads(line.rstrip())
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not valid JSON ({error.msg}, column {error.colno})") from None
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: not UTF-8 text, byte {error.start} of the line cannot be read") from None
            if not isinstance(row, dict):
                raise ValueError(f"{where}: not an object with the key {field!r}")
            _check_column(where, field, row)
            yield _document(row[field], field, where, len(line), chats)


def _parquet(path: Path, field: str, chats: ChatRenderer | None) -> Iterator[Piece]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ValueError(f"reading {path} needs pyarrow: {EXTRA}") from None
    try:
        with parquet.ParquetFile(path) as file:
            _check_column(str(path), field, file.schema_arrow.names)
            amount = path.stat().st_size / max(1, file.metadata.num_rows)
            batches = file.iter_batches(batch_size=ROWS, columns=[field])  # by itself 65,536: of books, all memory
            values = chain.from_iterable(rows.column(0).to_pylist() for rows in batches)
            for number, value in enumerate(values, start=1):
                yield _document(value, field, f"{path}, row {number}", amount, chats)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as parquet: {str(error).splitlines()[0]}") from None


def _load_dataset() -> Callable[..., Any]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(f"the package datasets is not installed: {EXTRA}") from None
    return load_dataset


def _check_column(where: str, field: str, names: Any) -> None:
    if field not in names:
        there = f"{', '.join(map(str, names))}: name one in field" if names else "none at all"
        raise ValueError(f"{where}: there is no column {field!r}; there is {there}")


def _identity(chats: ChatRenderer | None) -> list[Any]:
    """What a reader's identity says of chats: nothing where there are none."""
    return [] if chats is None else [chats.identity()]


def _document(value: Any, field: str, where: str, amount: float, chats: ChatRenderer | None) -> Piece:
    """What a row holds under `field`."""
    if chats is None:
        return Piece(_text(value, field, where), True, amount)
    text, counted = chats(value, field, where)
    return Piece(_text(text, field, where), True, amount, counted)


def _text(value: Any, field: str, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: {field!r} is not a text but {'null' if value is None else type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: {field!r} is not Unicode text: character {error.start} is half of a pair") from None
    return value
