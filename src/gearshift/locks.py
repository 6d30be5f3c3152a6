"""Locks between processes that leave no files."""

import os
import socket
from contextlib import suppress
from pathlib import Path

from filelock import FileLock


def take(lock: FileLock) -> None:
    """Acquire a lock, and write into its file who has it. Timeout, at once, if another one has it."""
    lock.acquire(blocking=False)
    with suppress(OSError):  # who has it is for people; the lock holds without it
        Path(lock.lock_file).write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")


def holder(lock: FileLock) -> str:
    """Who has a lock, by what `take` has written, in brackets after a space; empty where that cannot be known."""
    try:
        said = Path(lock.lock_file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
    return f" ({said})" if said else ""


def release(lock: FileLock) -> None:
    """Remove the file of a lock and release it, if it is held.

    In this order no two processes can hold it: who had opened the file while it was there finds, once it gets the lock,
    that it has gone, and begins anew (filelock does so from 3.21 on).
    """
    if lock.is_locked:
        Path(lock.lock_file).unlink(missing_ok=True)
    lock.release()
