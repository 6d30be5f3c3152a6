"""A lock whose file is removed still lets in one at a time."""

import os
import socket
from pathlib import Path
from unittest.mock import Mock

import pytest
from filelock import FileLock, Timeout

from gearshift.locks import holder, is_abandoned, release, take

fcntl = pytest.importorskip("fcntl")


def test_who_waited_for_a_lock_keeps_others_out_though_its_file_was_removed(tmp_path: Path, monkeypatch) -> None:
    """The second has opened the file and is about to lock it when the first goes."""
    first, second, third = (FileLock(tmp_path / "lock") for _ in range(3))
    first.acquire()
    flock = fcntl.flock

    def late(file: int, what: int) -> None:
        if first.is_locked and what != fcntl.LOCK_UN:
            release(first)
        flock(file, what)

    monkeypatch.setattr(fcntl, "flock", late)
    second.acquire(timeout=5)
    check(second, third)


def test_who_comes_as_a_lock_is_released_keeps_others_out(tmp_path: Path, monkeypatch) -> None:
    first, second, third = (FileLock(tmp_path / "lock") for _ in range(3))
    first.acquire()
    flock = fcntl.flock

    def followed(file: int, what: int) -> None:
        flock(file, what)
        if what == fcntl.LOCK_UN:
            monkeypatch.setattr(fcntl, "flock", flock)
            second.acquire(timeout=5)

    monkeypatch.setattr(fcntl, "flock", followed)
    release(first)
    check(second, third)


def check(holding: FileLock, other: FileLock) -> None:
    with pytest.raises(Timeout):
        other.acquire(blocking=False)
    release(holding)
    assert not Path(holding.lock_file).exists()
    other.acquire(blocking=False)
    release(other)


def test_a_lock_that_is_not_held_is_left_alone(tmp_path: Path) -> None:
    held, other = (FileLock(tmp_path / "lock") for _ in range(2))
    held.acquire()
    release(other)
    assert Path(held.lock_file).exists()
    release(held)


def test_who_has_a_lock_is_in_its_file(tmp_path: Path, monkeypatch) -> None:
    lock = FileLock(tmp_path / "lock")
    file = Path(lock.lock_file)
    assert (holder(lock), is_abandoned(file)) == ("", True)
    take(lock, "run", "folder")
    assert holder(lock) == f" (process {os.getpid()} on {socket.gethostname()})"
    assert not is_abandoned(file)
    monkeypatch.setattr(os, "kill", Mock(side_effect=PermissionError))  # a process of another user
    assert not is_abandoned(file)
    monkeypatch.setattr(os, "kill", Mock(side_effect=ProcessLookupError))
    assert is_abandoned(file)
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    assert not is_abandoned(file)
    file.write_text("process")
    assert (holder(lock), is_abandoned(file)) == ("", False)
    release(lock)
