"""Locks between processes that leave no files."""

import os
import re
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

LOCK = ".lock"
"""In the folder of a run or a quickstart while a process writes to it, and after that process was killed."""


def take(lock: FileLock, what: str, instead: str) -> None:
    """Acquire the lock of a folder that `what` writes to, and write into its file who has it.

    ValueError, at once, if another one has it, which advises to choose another `instead`.
    """
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise ValueError(
            f"another {what} writes to {Path(lock.lock_file).parent} now{holder(lock)}: wait for it, or choose another"
            f" {instead}"
        ) from None
    _sign(lock)


def wait_for(lock: FileLock, say: Callable[[str], None]) -> None:
    """Acquire a lock, and write into its file who has it. If another one has it, `say` who (see `holder`), and wait."""
    try:
        lock.acquire(blocking=False)
    except Timeout:
        say(holder(lock))
        lock.acquire()
    _sign(lock)


def holder(lock: FileLock) -> str:
    """Who has a lock, by what is written in its file, in brackets after a space; empty where that cannot be known."""
    named = _named(Path(lock.lock_file))
    return f" ({_words(*named)})" if named else ""


def is_abandoned(file: Path) -> bool:
    """Whether nobody has the lock with this file: it is not there, or names a process of this host that has gone.

    False where that cannot be known: the process is of another host, or the file does not say which it is.
    """
    if not file.exists():
        return True
    named = _named(file)
    if named is None or named[1] != socket.gethostname():
        return False
    return not _lives(named[0])


def _lives(process: int) -> bool:
    """Whether there is such a process on this host, as far as can be known."""
    if os.name != "posix":  # signal 0, which only asks, would end it there
        return True
    try:
        with suppress(PermissionError):  # another user's
            os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    return True


def _sign(lock: FileLock) -> None:
    with suppress(OSError):  # who has it is for people; the lock holds without it
        Path(lock.lock_file).write_text(_words(os.getpid(), socket.gethostname()), encoding="utf-8")


def _words(process: int, host: str) -> str:
    return f"process {process} on {host}"


def _named(file: Path) -> tuple[int, str] | None:
    """The process and the host that a lock's file names; None if it cannot be read or names none."""
    try:
        found = re.fullmatch(r"process (\d+) on (.+)", file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return None
    return (int(found[1]), found[2]) if found else None


def release(lock: FileLock) -> None:
    """Remove the file of a lock and release it, if it is held.

    In this order no two processes can hold it: who had opened the file while it was there finds, once it gets the lock,
    that it has gone, and begins anew (filelock does so from 3.21 on).
    """
    if lock.is_locked:
        Path(lock.lock_file).unlink(missing_ok=True)
    lock.release()
