"""The main job from end to end: its steps, and a report of them."""

from collections.abc import Iterable
from pathlib import Path

from rich.console import Console

from gearshift.quickstart_job import Job, QuickstartSettings
from gearshift.quickstart_report import write_report
from gearshift.settings import load_settings
from gearshift.tiny import TINY

RECIPES = next(
    folder
    for folder in (
        Path(__file__).parent / "recipes" / "quickstart",
        Path(__file__).parents[2] / "recipes" / "quickstart",
    )
    if folder.is_dir()
)


def quickstart(
    out: str | Path,
    model: str | None = None,
    text: str | Path | None = None,
    recipe: str | Path | None = None,
    overrides: Iterable[str] = (),
    console: Console | None = None,
) -> Path:
    """Take a pretrained model the whole way, in the folder `out`; returns the path of the report.

    Each step leaves its result in `out`. Run again, finished steps are not repeated and training goes on from its last
    checkpoint.

    Args:
        out: a folder of this job's own.
        model: any model folder, .gguf file or hub name, or `tiny` for a small random one. Default: SmolLM2-135M.
        text: a file or a folder of text. Default: the English prose that every Python carries.
        recipe: a YAML file of `QuickstartSettings`.
        overrides: `key=value` changes of it.

    ValueError if something named does not exist or does not fit, if `out` holds another job, or if another process
    writes to it.
    """
    path = Path(recipe) if recipe else RECIPES / ("tiny.yaml" if model == TINY else "quickstart.yaml")
    settings = load_settings(QuickstartSettings, path, overrides)
    surgery = path.parent / settings.surgery
    job = Job(Path(out), model, text, settings, surgery, console or Console(stderr=True, highlight=False))
    with job.claimed():
        job.run()
        with job.steps.step("report", 1) as (step, advance):
            report = write_report(job)
            advance(1)
            step.result = str(report)
    return report
