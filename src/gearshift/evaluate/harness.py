"""Benchmarks of EleutherAI's lm-evaluation-harness under a placement."""

from collections.abc import Sequence
from typing import Any

from gearshift.model import GearshiftForCausalLM
from gearshift.spec import Placement


def run_harness(
    model: GearshiftForCausalLM,
    tokenizer: Any,
    placement: Placement,
    tasks: Sequence[Any],
    *,
    batch_size: int = 1,
    few_shot: int | None = None,
    limit: int | None = None,
    **settings: Any,
) -> dict[str, dict[str, Any]]:
    """Task -> its metrics, as lm-eval reports them (`acc,none`, `acc_stderr,none`, ...).

    Args:
        model: the model; its own choice of placement is put back afterwards.
        tokenizer: its tokenizer.
        placement: what runs.
        tasks: names of lm-eval tasks, or task configurations.
        batch_size: requests run at a time.
        few_shot: examples in a prompt; None for each task's own number.
        limit: examples of each task, None for all.
        settings: passed on to `lm_eval.simple_evaluate`.

    ValueError if lm-eval is not installed or the placement does not fit the model.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ValueError(f'benchmarks need lm-eval ({error}): pip install "gearshift[eval]"') from None
    before = model._placement
    model.set_placement(placement)
    try:
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
        results = lm_eval.simple_evaluate(
            model=wrapped, tasks=list(tasks), num_fewshot=few_shot, limit=limit, **settings
        )
    finally:
        model.set_placement(before)
    return dict(results["results"])
