"""What was done and written: the generations, the export's check, the steps, every setting."""

from pydantic import JsonValue

from gearshift.report.data import Generation, Report
from gearshift.report.html import Child, Html, tag
from gearshift.report.numbers import duration, number, size
from gearshift.report.palette import Palette
from gearshift.report.parts import Section, facts, folded, plural, table
from gearshift.report.strips import run_lengths, strip


def generations_section(report: Report, palette: Palette) -> Section | None:
    """What each placement wrote; a prompt that they share is shown once."""
    if not report.generations:
        return None
    prompts = {generation.prompt for generation in report.generations}
    shared = prompts.pop() if len(prompts) == 1 else None
    cards = [_generation(generation, palette, own_prompt=shared is None) for generation in report.generations]
    return Section("generations", "Generations", (_prompt(shared), tag("div", cards, class_="cards")))


def _prompt(prompt: str | None) -> Html | None:
    return None if prompt is None else tag("blockquote", tag("small", "prompt"), prompt)


def _generation(generation: Generation, palette: Palette, own_prompt: bool) -> Html:
    speed = f"{plural(generation.tokens, 'token')} · {number(generation.tokens_per_second)} tokens/s"
    return tag(
        "article",
        tag("h3", generation.preset),
        strip(generation.placement, palette, thin=True),
        tag("p", f"{speed} · state {size(generation.state_bytes)}", class_="about"),
        _prompt(generation.prompt) if own_prompt else None,
        tag("div", generation.text, class_="written"),
    )


def export_section(report: Report, palette: Palette) -> Section | None:
    """Whether the exported checkpoint says what the supernet says."""
    check = report.export
    if not check:
        return None
    if check.exact:
        verdict = tag("b", "Equal, bit for bit.", class_="better")
    else:
        verdict = tag("b", f"Not equal: logits differ by up to {number(check.max_abs_difference)}.", class_="worse")
    preset = (
        next((p.name for p in report.search.presets if p.placement == check.placement), None) if report.search else None
    )
    body = (
        tag(
            "p",
            verdict,
            " The exported checkpoint was reloaded by itself and compared with the supernet under the same placement.",
        ),
        strip(check.placement, palette),
        facts(
            (
                ("Preset", preset),
                ("Placement", run_lengths(check.placement)),
                ("Folder", tag("code", check.path)),
                ("Largest difference of a logit", number(check.max_abs_difference)),
            )
        ),
    )
    return Section("export", "The exported checkpoint", body)


def steps_section(report: Report, palette: Palette) -> Section | None:
    """Time and result of each step, and where it ran."""
    if not report.steps and not report.environment:
        return None
    body: list[Child] = []
    if report.steps:
        total = sum(step.seconds or 0 for step in report.steps)
        longest = max((step.seconds or 0 for step in report.steps), default=0) or 1.0
        rows: list[list[Child]] = [
            [tag("b", step.name), step.result, duration(step.seconds), _time_bar((step.seconds or 0) / longest)]
            for step in report.steps
        ]
        rows.append([tag("b", "in all"), "", tag("b", duration(total)), ""])
        body.append(tag("div", table(("step", "result", "time", ""), rows, numeric=(2,)), class_="steps"))
    if report.environment:
        place = report.environment
        versions = ", ".join(f"{name} {version}" for name, version in place.versions.items())
        body.append(facts((("Device", place.device), ("Threads", str(place.threads)), ("Versions", versions))))
    return Section("steps", "Steps and timings", tuple(body))


def _time_bar(share: float) -> Html:
    return tag("div", tag("i", style=f"width:{share * 100:.1f}%"), class_="bar", aria_hidden="true")


def settings_section(report: Report, palette: Palette) -> Section:
    """The model and every setting, folded."""
    model = report.model
    about = facts(
        (
            ("Model", model.name),
            ("Format", model.format),
            ("Parameters of the supernet", f"{model.parameters_total:,}"),
            (f"Parameters active under all-{report.main}", f"{model.parameters_active:,}"),
            ("Layers", str(model.layers)),
            ("dtype", model.dtype),
            *((f"Mixer {mixer.name}", mixer.description) for mixer in report.mixers),
        )
    )
    groups = [folded(name, setting_tree(value)) for name, value in report.settings.items()]
    return Section("settings", "Model and settings", (about, groups))


def setting_tree(value: JsonValue) -> Html:
    """Settings as nested lists of names and values."""
    if isinstance(value, dict) and value:
        return facts((name, setting_tree(item)) for name, item in value.items())
    if isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        return tag("ol", (tag("li", setting_tree(item)) for item in value))
    if isinstance(value, list) and value:
        return tag("code", ", ".join(_scalar(item) for item in value))
    return tag("code", _scalar(value))


def _scalar(value: JsonValue) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value) if value or value == 0 else "empty"
