"""The small files of a checkpoint: JSON, the tokenizer, the settings of generation."""

import json
import shutil
from pathlib import Path
from typing import Any

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

_NOT_KEPT = ("transformers_version", "_from_model_config", "cache_implementation")
"""Settings of generation that are about the class that ran the source, not about the text."""


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. ValueError, naming the file, if it holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object as people and git like to read it."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


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
