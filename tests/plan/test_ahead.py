import threading
import time
from collections import deque
from contextlib import closing

import pytest

from gearshift.plan.ahead import made_ahead

NAMES = [f"tensor {number}" for number in range(20)]


def test_values_come_in_order_from_one_other_thread():
    threads = set()

    def make(name):
        threads.add(threading.get_ident())
        return name.upper()

    with closing(made_ahead(NAMES, make, lambda name: 1, 4)) as values:
        assert list(values) == [name.upper() for name in NAMES]
    assert len(threads) == 1
    assert threading.get_ident() not in threads


@pytest.mark.parametrize("most", [1, 3, 7])
def test_no_more_is_held_than_allowed(most):
    sizes = {name: 1 + number % 3 for number, name in enumerate(NAMES)}
    made, held, largest = [], [], []
    with closing(made_ahead(NAMES, lambda name: made.append(name) or name, sizes.__getitem__, most)) as values:
        for name in values:
            time.sleep(0.002)
            held.append(name)
            outstanding = [other for other in [*made] if other not in held[:-1]]
            largest.append(sum(sizes[other] for other in outstanding))
            assert largest[-1] <= most or outstanding == [name]
    assert held == NAMES
    assert most < 3 or max(largest) > 1


def test_an_error_comes_where_its_value_would_have():
    def make(name):
        if name == NAMES[5]:
            raise KeyboardInterrupt
        return name

    seen = []
    with pytest.raises(KeyboardInterrupt), closing(made_ahead(NAMES, make, lambda name: 1, 10)) as values:
        deque(map(seen.append, values), maxlen=0)
    assert seen == NAMES[:5]


def test_what_is_not_taken_is_not_made():
    made = []
    with closing(made_ahead(NAMES, lambda name: made.append(name), lambda name: 1, 2)) as values:
        next(values)
    assert len(made) <= 3
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]
