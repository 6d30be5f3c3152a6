"""Small files, written as a whole."""

from pathlib import Path
from uuid import uuid4


def write_whole(path: Path, text: str) -> None:
    """Write a text file in UTF-8: whoever reads it sees the old one or the new one, never a part."""
    fresh = path.with_name(f".{path.name}.{uuid4().hex[:8]}")  # another process may write it now too
    try:
        fresh.write_text(text, encoding="utf-8", newline="\n")
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)
