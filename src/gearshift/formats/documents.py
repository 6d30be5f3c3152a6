"""The small files of a checkpoint: JSON, the tokenizer, the settings of generation."""

import json
import shutil
from pathlib import Path
from typing import Any

from gearshift.files import write_whole

GENERATION = "generation_config.json"

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""What makes up a tokenizer, its chat template included. A model card or a license is the source's own."""

_DEEPEST = 100
_LONGEST = 1000

_NOT_KEPT = ("transformers_version", "_from_model_config", "cache_implementation")
"""Settings of generation that are about the class that ran the source, not about the text."""


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. ValueError, naming the file, if it holds something else."""
    try:
        value = parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    return value


def parse_json(text: bytes) -> Any:
    """What a JSON text says. ValueError if it is none, if it has a key twice, or if it is nested absurdly deep."""
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_object)
        _check_depth(value)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has the key {next(name for name in names if names.count(name) > 1)!r} twice")
    return found


def _check_depth(value: Any) -> None:
    """RecursionError beyond what any checkpoint has: code that walks such a value by recursion would fail later."""
    level, depth = [value], 0
    while level:
        if depth == _DEEPEST:
            raise RecursionError
        nested = [item for item in level if isinstance(item, dict | list)]
        level = [below for item in nested for below in (item.values() if isinstance(item, dict) else item)]
        depth += 1


def in_one_line(text: str) -> str:
    """A text as one printable line that a person can take in: of what is very long, the beginning and the end."""
    line = " ".join(text.split())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in line)
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 200]} ... {line[-195:]}"


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object as people and git like to read it, as a whole."""
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def copy_documents(source: Path, out: Path) -> None:
    """Copy the tokenizer and the settings of generation from one folder to another."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            if name.endswith(".json"):
                read_json(source / name)  # a broken tokenizer is better found now than when the model is used
            shutil.copyfile(source / name, out / name)
    if (source / GENERATION).is_file():
        settings = read_json(source / GENERATION)
        write_json(out / GENERATION, {key: value for key, value in settings.items() if key not in _NOT_KEPT})
