"""Making tensors in one thread while another writes those before: reading, arithmetic and the disk at the same time."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def made_ahead(
    names: Iterable[str], make: Callable[[str], T], size: Callable[[str], int], most_bytes: int
) -> Generator[T, None, None]:
    """`make` of each name in order, called in a thread of its own while the caller is busy with those before.

    At most `most_bytes` are held, by `size`, the one in the caller's hands included; one that is larger by itself is
    made alone. An error is raised where its tensor would have come. To be closed, so that the thread ends.
    """
    waiting: deque[tuple[int, Future[T]]] = deque()
    held = 0
    pool = ThreadPoolExecutor(1, thread_name_prefix="tensors")
    try:
        for name in names:
            need = size(name)
            while waiting and held + need > most_bytes:
                yield waiting[0][1].result()
                held -= waiting.popleft()[0]
            waiting.append((need, pool.submit(make, name)))
            held += need
        while waiting:
            yield waiting[0][1].result()
            waiting.popleft()
    finally:
        pool.shutdown(cancel_futures=True)
