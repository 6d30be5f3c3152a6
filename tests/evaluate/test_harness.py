"""lm-eval under a placement: a task made on the spot, and the answer where lm-eval is missing."""

import json
import string
import sys
from pathlib import Path

import pytest
from tests.models import supernet
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gearshift.evaluate import run_harness
from gearshift.spec import Placement


def letters() -> PreTrainedTokenizerFast:
    """A tokenizer of single letters."""
    vocabulary = {letter: number for number, letter in enumerate(["<unk>", "<eos>", " ", *string.ascii_lowercase])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>")


def task(folder: Path) -> dict:
    """Eight questions with two answers each."""
    file = folder / "questions.jsonl"
    rows = ({"question": f"is {'very ' * n}long?", "choices": ["yes", "no"], "gold": n % 2} for n in range(8))
    file.write_text("\n".join(map(json.dumps, rows)))
    return {
        "task": "tiny",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }


@pytest.mark.slow
def test_a_task_runs_under_the_placement(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    model = supernet(layers=2)
    ran = []
    for block in model.model.blocks:
        for name in block.spec.mixers:
            block.mixer_named(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    placement = Placement(["gdn", "kda"])
    results = run_harness(model, letters(), placement, [task(tmp_path)], batch_size=4, limit=6, bootstrap_iters=0)
    assert 0 <= results["tiny"]["acc,none"] <= 1
    assert set(ran) == {"gdn", "kda"}
    assert model.placement() == model.spec.main


def test_a_missing_lm_eval_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    model = supernet(layers=2)
    with pytest.raises(ValueError, match=r'pip install "gearshift\[eval\]"'):
        run_harness(model, None, model.spec.main, ["arc_easy"])
