"""lm-eval under a placement: a task made on the spot, and the answer where lm-eval is missing."""

import sys

import pytest

from gearshift.evaluate import run_harness
from tests.models import supernet


def test_a_missing_lm_eval_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    model = supernet(layers=2)
    with pytest.raises(ValueError, match=r'pip install "gearshift\[eval\]"'):
        run_harness(model, None, model.spec.main, ["arc_easy"])
