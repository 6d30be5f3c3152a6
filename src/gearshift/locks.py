"""Locks between processes that leave no files."""

from pathlib import Path

from filelock import FileLock


def release(lock: FileLock) -> None:
    """Remove the file of a lock and release it, if it is held.

    In this order no two processes can hold it: who had opened the file while it was there finds, once it gets the lock,
    that it has gone, and begins anew (filelock does so from 3.21 on).
    """
    if lock.is_locked:
        Path(lock.lock_file).unlink(missing_ok=True)
    lock.release()
