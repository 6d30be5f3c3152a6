"""Making things in one thread while another uses those before: reading, arithmetic and the disk at the same time."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

K = TypeVar("K")
T = TypeVar("T")


def made_ahead(
    keys: Iterable[K], make: Callable[[K], T], size: Callable[[K], int], most: int
) -> Generator[T, None, None]:
    """`make` of each key in order, called in a thread of its own while the caller is busy with those before.

    At most `most` are held, by `size`, the one in the caller's hands included; one that is larger by itself is made
    alone. An error is raised where its result would have come. To be closed, so that the thread ends.
    """
    waiting: deque[tuple[int, Future[T]]] = deque()
    held = 0
    pool = ThreadPoolExecutor(1, thread_name_prefix="ahead")
    try:
        for key in keys:
            need = size(key)
            while waiting and held + need > most:
                yield waiting[0][1].result()
                held -= waiting.popleft()[0]
            waiting.append((need, pool.submit(make, key)))
            held += need
        while waiting:
            yield waiting[0][1].result()
            waiting.popleft()
    finally:
        pool.shutdown(cancel_futures=True)
