"""The page of a run: where it stands, its curves, its heat maps."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from gearshift.files import write_whole
from gearshift.report.curves import Points, run_curve
from gearshift.report.history import Rows, RunHistory, StageHistory
from gearshift.report.html import Child, Html, tag
from gearshift.report.learning import losses_section
from gearshift.report.numbers import count, duration, number, percent
from gearshift.report.page import document
from gearshift.report.palette import Palette
from gearshift.report.parts import Section, folded, plural, table, wide
from gearshift.report.record import setting_tree
from gearshift.report.strips import CELL, dot, heat_map, legend

HEADS = ("stage", "steps", "loss", "tokens/s", "time left", "held-out")
"""Of the table of stages, here and in a terminal."""


def write_run(history: RunHistory, path: Path) -> None:
    """Write the page of a run. A reader sees the old page or the new one, never a part."""
    page = render_run(history)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, page)


def render_run(history: RunHistory) -> str:
    """The whole page. The same history gives the same text."""
    palette = Palette.of(history.mixers, history.main or "")
    sections = [
        losses_section([stage.as_stage() for stage in history.stages], palette),
        _errors(history, palette),
        *(_sampled(stage, palette) for stage in history.stages),
        _held_out(history, palette),
        _watched(history),
        _calibration(history, palette),
        _settings(history),
    ]
    foot = ("Exact values are in ", tag("code", "metrics.jsonl"), f" in {history.folder}.")
    return document(_title(history), _top(history, palette), [section for section in sections if section], foot)


def stage_rows(history: RunHistory) -> list[tuple[str, ...]]:
    """The stages in words and numbers, under `HEADS`."""
    return [_stage_row(stage, history.at_work) for stage in history.stages]


def _stage_row(stage: StageHistory, at_work: bool) -> tuple[str, ...]:
    left = stage.seconds_left if at_work else None
    waiting = not stage.steps and stage.end is None
    return (
        stage.name,
        f"{len(stage.steps):,} of {stage.planned:,}",
        number(stage.loss),
        number(stage.tokens_per_second),
        "not begun" if waiting else "done" if stage.end is not None else duration(left),
        ", ".join(f"{mixer} {number(value)}" for mixer, value in (stage.held_out or ("", {}))[1].items())
        or number(None),
    )


def status(history: RunHistory) -> str:
    """Where the run stands, in a sentence or two."""
    share = percent(history.done / history.planned) if history.planned else "all"
    if history.finished:
        return f"Finished: {plural(history.done, 'step')}."
    if history.stopped is not None:
        return f"Stopped after {history.done:,} of {plural(history.planned, 'step')} ({share}): {history.stopped}."
    done = f"{history.done:,} of {plural(history.planned, 'step')} done ({share})"
    if not history.at_work:
        done += ". No process is at the run now: the same command goes on with it"
    elif history.seconds_left is not None:
        done += f", {duration(history.seconds_left)} left at the present pace"
    return f"{done}. The record last grew at {history.written:%Y-%m-%d %H:%M:%S}."


def left_out(history: RunHistory) -> list[str]:
    """What is in the record and not shown, a sentence each."""
    sentences = []
    if history.unknown:
        kinds = ", ".join(f"{kind} ({number:,})" for kind, number in history.unknown.items())
        sentences.append(
            f"Left out: records of kinds that this version of Gearshift does not know, {kinds}. A newer one shows them."
        )
    if history.damaged:
        lines, first = plural(len(history.damaged), "line"), history.damaged[0]
        sentences.append(f"Left out: {lines} of metrics.jsonl that cannot be read (the first: line {first}).")
    return sentences


def _title(history: RunHistory) -> str:
    return f"Run {history.folder.resolve().name}"


def _top(history: RunHistory, palette: Palette) -> Html:
    tokens = sum(step["tokens"] for stage in history.stages for step in stage.steps)
    seconds = sum(step["seconds"] for stage in history.stages for step in stage.steps)
    about = [
        str(history.recipe.get("model", "")),
        f"{count(tokens)} tokens in {duration(seconds)}",
        f"seed {history.recipe['seed']}" if "seed" in history.recipe else "",
    ]
    rows = [[tag("b", name), *rest] for name, *rest in stage_rows(history)]
    body: list[Child] = [
        tag("p", "Gearshift", class_="brand"),
        tag("h1", _title(history)),
        tag("p", " · ".join(filter(None, about)), class_="about"),
        tag("p", status(history), class_="lead"),
        *(tag("p", tag("b", remark), class_="remark") for remark in left_out(history)),
        table(HEADS, rows, numeric=(1, 2, 3, 4)),
        legend(history.mixers, palette),
    ]
    return tag("header", body, id="top")


def _errors(history: RunHistory, palette: Palette) -> Section | None:
    """The error of each layer at the first and at the last step of the first stage that judges layers."""
    stage = next((stage for stage in history.stages if stage.layer_errors()), None)
    if not stage:
        return None
    words = (
        f"How far each mixer's output is from the main mixer's own, in each layer, at the first and the last recorded"
        f" step of the {stage.name} stage: squared error over the output's own square. 0 is exact, 1 is no better than "
        "silence. The scale is logarithmic."
    )
    return Section("errors", "Error of each layer", (tag("p", words), _heat(stage.layer_errors(), palette)))


def _sampled(stage: StageHistory, palette: Palette) -> Section | None:
    """What the steps of a stage sampled, and what they lost when they did."""
    tally = stage.tally
    if not tally.cells:
        return None
    maps: tuple[tuple[str, str, Rows, bool], ...] = (
        (
            "Times sampled",
            "Steps in which the layer ran the mixer.",
            {m: [*n] for m, n in tally.times().items()},
            False,
        ),
        ("Mean loss when sampled", "Mean loss of those steps. The scale is logarithmic.", tally.mean_loss(), True),
        (
            "Loss beyond the running mean",
            "The same, each loss less the running mean of the steps before it, which leaves out what time has changed. "
            "Above 0, the steps that ran the mixer there did worse than the average step.",
            tally.mean_excess(),
            False,
        ),
    )
    body = [
        (tag("h3", title), tag("p", words, class_="note"), _heat({"": rows}, palette, logarithmic))
        for title, words, rows, logarithmic in maps
    ]
    words = "Each step runs one placement; its loss counts for the mixer that it ran in each layer."
    if stage.layer_errors():
        words = (
            "At each step all mixers learn on the hidden states of one placement, the student. The loss is the mean"
            " over all of them; here it counts for those that the student ran."
        )
    return Section(f"sampled-{stage.index}", f"What was sampled: {stage.name}", (tag("p", words), body))


def _heat(moments: dict[str, Rows], palette: Palette, logarithmic: bool = True) -> Html:
    """A heat map of moment -> mixer -> numbers by layer."""
    mixers = [mixer for mixer in palette.roles if any(mixer in rows for rows in moments.values())]
    rows = [(mixer, {name: found[mixer] for name, found in moments.items() if mixer in found}) for mixer in mixers]
    layers = max((len(values) for _, named in rows for values in named.values()), default=0)
    return wide(heat_map(rows, palette, logarithmic), least=CELL * layers + 180)


def _held_out(history: RunHistory, palette: Palette) -> Section | None:
    """What each stage's end says on held-out text."""
    ends = [(stage.name, *stage.held_out) for stage in history.stages if stage.held_out]
    if not ends:
        return None
    names = dict.fromkeys(name for _, _, found in ends for name in found)
    ordered = sorted(names, key=lambda name: [*palette.roles, name].index(name))
    rows = [
        [
            [dot(name, palette) if name in palette.roles else None, name],
            *(number(found.get(name)) for _, _, found in ends),
        ]
        for name in ordered
    ]
    heads = ["", *(f"{stage}: {words}" for stage, words, _ in ends)]
    words = (
        "Measured at the end of each stage on sequences that are never trained on. A layerwise error is a mean over "
        "layers; forward KL is from the teacher, with the one mixer in every layer that offers it; cross-entropy is "
        "that of what the assistant says in chats, under the same placements and the presets that were sampled."
    )
    body = table(heads, rows, numeric=range(1, len(heads)))
    return Section("held-out", "Held-out text", (tag("p", words), body))


def _watched(history: RunHistory) -> Section | None:
    """Learning rate, gradient norm and speed over all steps."""
    stages = [(stage.name, stage.steps) for stage in history.stages if stage.steps]
    curves: tuple[tuple[str, Callable[[dict[str, Any]], float | None], bool, bool], ...] = (
        ("Learning rate", lambda step: step["learning_rate"], False, False),
        # A step without anything to learn has a norm of 0.
        ("Gradient norm", lambda step: step["gradient_norm"] or None, True, True),
        ("Tokens a second", lambda step: step["tokens"] / step["seconds"] if step["seconds"] else None, True, False),
    )
    drawn = []
    for place, (title, read, smoothed, logarithmic) in enumerate(curves):
        lines = [(name, _points(steps, read)) for name, steps in stages]
        if picture := run_curve(lines, f"run-{place}", title, smoothed, logarithmic):
            drawn.append(tag("figure", tag("h3", title), wide(picture, least=330)))
    words = (
        "The learning rate is before its factors by parameter, the gradient's norm before clipping. A pale line is"
        " every step, a full one its running mean."
    )
    return (
        Section("watched", "Rates and speed", (tag("p", words), tag("div", drawn, class_="curves"))) if drawn else None
    )


def _points(steps: Iterable[dict[str, Any]], read: Callable[[dict[str, Any]], float | None]) -> Points:
    return [(step["global_step"], value) for step in steps if (value := read(step)) is not None]


def _calibration(history: RunHistory, palette: Palette) -> Section | None:
    """What the calibration before the first step did."""
    record = next((stage.calibration for stage in history.stages if stage.calibration), None)
    if not record:
        return None
    moments = {name: record[name] for name in ("before", "after")}
    words = (
        "The error of each layer before and after the new mixers' output projections were fitted, in "
        f"{duration(record['seconds'])}. The scale is logarithmic."
    )
    return Section("calibration", "Calibration", (tag("p", words), _heat(moments, palette)))


def _settings(history: RunHistory) -> Section | None:
    """The recipe, folded."""
    if not history.recipe:
        return None
    recipe: JsonValue = dict(history.recipe)
    return Section("settings", "Recipe", (folded("Every setting", setting_tree(recipe)),))
