"""Several processes on this machine, forked, so that they need no imports of their own."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any


def run_processes(world: int, work: Callable[..., Any], *given: Any, check: bool = True) -> None:
    """Call `work(*given)` in `world` processes that find each other as torchrun's do.

    With `check`, AssertionError if one fails.
    """
    context = multiprocessing.get_context("fork")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    failures = context.SimpleQueue()
    processes = [
        context.Process(target=_call, args=(rank, world, port, failures, work, given)) for rank in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        process.kill()
    said = "" if failures.empty() else failures.get()
    codes = [process.exitcode for process in processes]
    assert not check or not any(codes), said or codes


def _call(rank: int, world: int, port: int, failures: Any, work: Callable[..., Any], given: tuple[Any, ...]) -> None:
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}
    os.environ |= {name: str(value) for name, value in where.items()}
    try:
        work(*given)
    except BaseException:
        failures.put(traceback.format_exc())
        os._exit(1)
    os._exit(0)
