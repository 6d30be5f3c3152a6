"""Small files, written as a whole, and what a full disk is called."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
"""What a full disk, or one's share of it, is called."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within, an error that says that the disk is full also says for what: `path`. By itself, only opening one does."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_SPACE and error.filename is None:
            error.filename = str(path)
        raise


def write_whole(path: Path, text: str) -> None:
    """Write a text file in UTF-8: whoever reads it sees the old one or the new one, never a part."""
    fresh = path.with_name(f".{path.name}.{uuid4().hex[:8]}")  # another process may write it now too
    try:
        with writing(path):
            fresh.write_text(text, encoding="utf-8", newline="\n")
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)
