"""What was learnt: the mixers before and after, the loss curves, the error of each layer."""

from collections.abc import Sequence

from gearshift.report.curves import loss_curves
from gearshift.report.data import PureQuality, Quality, Report, Stage
from gearshift.report.html import Child, Html, tag
from gearshift.report.numbers import change, count, duration, number, setting
from gearshift.report.palette import Palette
from gearshift.report.parts import Section, listed, note, plural, table, wide
from gearshift.report.strips import CELL, dot, heat_map


def quality_section(report: Report, palette: Palette) -> Section | None:
    """The table of every pure placement before and after training."""
    quality = report.quality
    if not quality or not (quality.before or quality.after):
        return None
    judged = (
        f"Every row runs one mixer in all {report.model.layers} layers, judged on {quality.tokens:,} held-out tokens "
        f"in sequences of {quality.sequence_length:,}. Divergence is forward KL from the teacher in nats a token: "
        "0 is the teacher itself."
    )
    title = "Before and after training" if quality.after else "The mixers by themselves"
    return Section("quality", title, (tag("p", judged), _quality_table(report, quality, palette), _worse(quality)))


def _quality_table(report: Report, quality: Quality, palette: Palette) -> Html:
    before, after = _by_mixer(quality.before), _by_mixer(quality.after)
    longest = max((found.divergence or 0 for found in (*quality.before, *quality.after)), default=0) or 1.0
    rows: list[list[Child]] = []
    for mixer in report.mixers:
        then, now = before.get(mixer.name), after.get(mixer.name)
        if not then and not now:
            continue
        row: list[Child] = [[dot(mixer.name, palette), tag("b", mixer.name), tag("small", mixer.description)]]
        row.append(number(then.divergence if then else None))
        if quality.after:
            row += [number(now.divergence if now else None), _change(then, now)]
        row.append(_bar(then, now, longest, palette.css(mixer.name)))
        row.append(number(then.perplexity if then else None))
        if quality.after:
            row.append(number(now.perplexity if now else None))
        rows.append(row)
    heads = ["mixer", "divergence before", "after", "change", "", "perplexity before", "after"]
    if not quality.after:
        heads = ["mixer", "divergence", "", "perplexity"]
    teacher: list[Child] = [
        "the teacher",
        *(tag("div", class_="pair") if not head else None for head in heads[1:-1]),
        number(quality.teacher_perplexity),
    ]
    numeric = [place for place, head in enumerate(heads) if place and head]
    return table(heads, [*rows, teacher], numeric)


def _by_mixer(measured: tuple[PureQuality, ...]) -> dict[str, PureQuality]:
    return {found.mixer: found for found in measured}


def _change(before: PureQuality | None, after: PureQuality | None) -> Html:
    then, now = (found.divergence if found else None for found in (before, after))
    mood = None if then is None or now is None or then == now else "better" if now < then else "worse"
    return tag("span", change(then, now), class_=mood)


def _bar(before: PureQuality | None, after: PureQuality | None, longest: float, colour: str) -> Html:
    """The divergences as bars of one scale: pale before, full after."""
    bars = []
    for found, mood in ((before, "pale" if after else None), (after, None)):
        if found and found.divergence:
            share = max(0.0, found.divergence / longest)
            bars.append(tag("i", class_=mood, style=f"width:{share * 100:.1f}%;background:{colour}"))
    return tag("div", bars, class_="pair", aria_hidden="true")


def _worse(quality: Quality) -> Html | None:
    """Say plainly what training made worse."""
    before, after = _by_mixer(quality.before), _by_mixer(quality.after)
    known = [(name, before[name].divergence, after[name].divergence) for name in before if name in after]
    worse = [name for name, then, now in known if then is not None and now is not None and now > then]
    if not worse:
        return None
    words = f"Training made {listed(worse)} worse by this measure."
    return tag("p", tag("b", words), class_="remark")


def training_section(report: Report, palette: Palette) -> Section | None:
    """The loss curves of every stage."""
    return losses_section(report.training, palette)


def losses_section(stages: Sequence[Stage], palette: Palette) -> Section | None:
    """The loss curves of stages, each with what it took."""
    drawn = [_stage(stage, palette, f"loss-{place}") for place, stage in enumerate(stages) if stage.records]
    if not drawn:
        return None
    return Section("training", "Loss curves", (tag("div", drawn, class_="curves"),))


def _stage(stage: Stage, palette: Palette, name: str) -> Html:
    picture = loss_curves(stage, palette, name)
    tokens, seconds = _total(stage)
    speed = f", {count(tokens / seconds)} tokens/s" if seconds else ""
    rates = [record.learning_rate for record in stage.records if record.learning_rate is not None]
    first, last = stage.records[0].loss, stage.records[-1].loss
    words = (
        f"{plural(len(stage.records), 'step')}, {count(tokens)} tokens in {duration(seconds)}{speed}. "
        f"Loss {number(first)} → {number(last)}" + (f", learning rate up to {setting(max(rates))}." if rates else ".")
    )
    body = wide(picture, least=330) if picture else note("No loss of this stage is finite.")
    return tag("figure", tag("h3", stage.name), body, tag("figcaption", words))


def _total(stage: Stage) -> tuple[int, float]:
    return sum(record.tokens for record in stage.records), sum(record.seconds or 0 for record in stage.records)


def errors_section(report: Report, palette: Palette) -> Section | None:
    """The error of each mixer in each layer as a heat map."""
    errors = report.layer_errors
    moments = {"before": errors.before, "after": errors.after} if errors else {}
    rows = [
        (mixer.name, {moment: named[mixer.name] for moment, named in moments.items() if mixer.name in named})
        for mixer in report.mixers
    ]
    rows = [(mixer, named) for mixer, named in rows if named]
    if not rows:
        return None
    words = (
        "How far each mixer's output is from the main mixer's own, in each layer, when both see the teacher's hidden "
        "states: squared error over the output's own square. 0 is exact, 1 is no better than silence; the scale is "
        "logarithmic, and the mean of each row stands at its end."
    )
    picture = wide(heat_map(rows, palette), least=CELL * report.model.layers + 110)
    return Section("errors", "Error of each layer", (tag("p", words), picture))
