"""What the tests of many processes rely on."""

import time

import pytest

from tests.train import processes


def test_a_process_that_hangs_is_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "PATIENCE", 0.1)
    with pytest.raises(AssertionError, match="-9"):
        processes.run_processes(1, time.sleep, 3600)
