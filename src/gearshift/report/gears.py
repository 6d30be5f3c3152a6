"""What the search found: the headline's gears, the front, the placements."""

from gearshift.report.data import Candidate, DominatedMixer, Generation, Preset, Report, Search
from gearshift.report.figures import pareto
from gearshift.report.html import Child, Html, tag
from gearshift.report.numbers import cost, cost_words, number, percent, ratio, setting, size, unit_words
from gearshift.report.palette import Palette
from gearshift.report.parts import Section, facts, folded, note, plural, table, wide
from gearshift.report.strips import CELL, dot, legend, ruler, run_lengths, strip

TALL_FRONT = 40
"""A front of more placements is folded."""


def headline(report: Report, palette: Palette) -> Html:
    """Title, what was done to which model, and what each preset buys."""
    model, search = report.model, report.search
    about = [model.name, f"{plural(model.layers, 'layer')}", model.dtype, f"read as {model.format}"]
    body: list[Child] = [
        tag("p", "Gearshift", class_="brand"),
        tag("h1", report.title),
        tag("p", " · ".join(about), class_="about"),
        tag("p", _lead(report), class_="lead"),
    ]
    if search and search.presets:
        body.append(tag("div", (_gear(report, search, preset, palette) for preset in search.presets), class_="gears"))
        body.append(legend(palette.roles, palette))
        body.append(note(_terms(report, search)))
        body += [_in_no_preset(dominated) for dominated in search.dominated if dominated.in_no_preset]
    return tag("header", body, id="top")


def _lead(report: Report) -> str:
    said = f"Every layer holds {plural(len(report.mixers), 'mixer')}; {report.main} is the pretrained model's own. "
    search = report.search
    if not search or not search.presets:
        return said + f"With {report.main} in every layer the model is the teacher itself."
    main = cost(search.span.main, search.cost_unit)
    return said + (
        f"With it everywhere the model is the teacher itself, at {main} {cost_words(search.cost_unit)}. "
        f"{'The preset below runs' if len(search.presets) == 1 else 'Each preset below runs'} from the same checkpoint."
    )


def _terms(report: Report, search: Search) -> str:
    """What the cards' words mean, where it is not plain from them."""
    said = f"Cost is {unit_words(search.cost_unit)}. Divergence is from the teacher, on held-out text."
    if any(preset.state_bytes is not None for preset in search.presets):
        said += f" State is what one sequence keeps at {search.context:,} tokens."
    return said + (" Speed was measured on the generations below." if report.generations else "")


def _gear(report: Report, search: Search, preset: Preset, palette: Palette) -> Html:
    """A preset's card."""
    share = ratio(preset.cost, search.span.main)
    run = next((generation for generation in report.generations if generation.preset == preset.name), None)
    bar = tag("div", tag("i", style=f"width:{min(1.0, share or 0) * 100:.1f}%"), class_="bar", aria_hidden="true")
    lines = [
        ("Cost", f"{cost(preset.cost, search.cost_unit)} of {cost(search.span.main, search.cost_unit)}"),
        ("Divergence", f"{number(preset.divergence)} nats a token"),
        ("State", _state(search, preset, run)),
        ("Speed", f"{number(run.tokens_per_second)} tokens/s" if run else None),
    ]
    counts = (
        tag("span", dot(mixer, palette), str(preset.counts[mixer]))
        for mixer in palette.roles
        if preset.counts.get(mixer)
    )
    return tag(
        "article",
        tag("h3", preset.name),
        tag("p", tag("b", percent(share)), f" of all-{report.main}'s cost", class_="figure"),
        bar,
        facts(lines),
        strip(preset.placement, palette),
        tag("p", counts, class_="counts"),
    )


def _state(search: Search, preset: Preset, run: Generation | None) -> str | None:
    if preset.state_bytes is not None:
        main = search.main_state_bytes
        return size(preset.state_bytes) + (f" of {size(main)}" if main is not None else "")
    return f"{size(run.state_bytes)} after {plural(run.tokens, 'token')}" if run else None


def _in_no_preset(dominated: DominatedMixer) -> Html:
    return tag("p", tag("b", dominated.mixer, " is in no preset: "), dominated.reason, class_="remark")


def front_section(report: Report, palette: Palette) -> Section | None:
    """The Pareto front, what the search did, and every candidate."""
    search = report.search
    picture = pareto(search, palette) if search else None
    if not search or not picture:
        return None
    body = (
        tag("p", _search_words(search)),
        tag("figure", wide(picture, least=620)),
        note(
            "Lower left is better. Each point is an evaluated placement: squares hold one mixer in every layer, small "
            "dots change one layer of all-main and have the new mixer's colour, grey ones of the search's proposals "
            "were verified. The line is the front, the diamonds are the presets, and dotted lines are their budgets as "
            "shares of the cost span. The lowest step of the vertical scale is linear down to 0, the teacher itself."
        ),
        [tag("p", _dominated_words(dominated), class_="remark") for dominated in search.dominated],
        folded(f"All {plural(len(search.candidates), 'candidate')}", _candidate_table(search, search.candidates)),
    )
    return Section("front", "Divergence against cost", body)


def _search_words(search: Search) -> str:
    done, saved = search.layer_evaluations, search.layer_evaluations_saved
    words = f"{plural(len(search.candidates), 'placement')} evaluated, {len(search.front):,} of them on the front."
    if saved:
        words += (
            f" Reusing the hidden states of shared layers took {done:,} layer evaluations instead of {done + saved:,}: "
            f"{percent(saved / (done + saved))} were saved."
        )
    return words


def _dominated_words(dominated: DominatedMixer) -> Child:
    presets = "It is in no preset." if dominated.in_no_preset else "It is in a preset all the same."
    return [tag("b", dominated.mixer, " is dominated. "), dominated.reason, " ", presets]


def _candidate_table(search: Search, candidates: tuple[Candidate, ...]) -> Html:
    ordered = sorted(candidates, key=lambda found: (found.cost is None, found.cost or 0.0, found.placement))
    rows = (
        (
            run_lengths(found.placement),
            found.kind,
            cost(found.cost, search.cost_unit),
            number(found.divergence),
            number(found.predicted),
        )
        for found in ordered
    )
    return table(("placement", "kind", "cost", "divergence", "predicted"), rows, numeric=(2, 3, 4))


def placements_section(report: Report, palette: Palette) -> Section | None:
    """The presets' placements in full, and the front as a ladder of strips."""
    search = report.search
    if not search or not (search.presets or search.front):
        return None
    body = [
        note("One cell a layer, the first layer at the left. The text under a strip can be given to any command."),
        legend(palette.roles, palette),
        wide((_placement(preset, report, palette) for preset in search.presets), least=CELL * report.model.layers),
    ]
    if search.front:
        ladder = wide(_ladder(search, report.model.layers, palette), least=CELL * report.model.layers + 230)
        body.append(tag("h3", "The front, step by step"))
        body.append(note("From the cheapest placement to the dearest; presets are named where they stand."))
        body.append(folded(f"{len(search.front)} placements", ladder) if len(search.front) > TALL_FRONT else ladder)
    return Section("placements", "Placements", tuple(body))


def _placement(preset: Preset, report: Report, palette: Palette) -> Html:
    budget = None if preset.budget_share is None else f"budget {setting(preset.budget_share)} of the cost span"
    counts = ", ".join(f"{preset.counts[mixer]} {mixer}" for mixer in palette.roles if preset.counts.get(mixer))
    return tag(
        "div",
        tag("p", tag("b", preset.name), tag("span", " · ".join(filter(None, (budget, counts)))), class_="strip-head"),
        strip(preset.placement, palette),
        ruler(report.model.layers),
        run_lengths(preset.placement, block=True),
        class_="placement",
    )


def _ladder(search: Search, layers: int, palette: Palette) -> Html:
    rungs = []
    for point in sorted(search.front, key=lambda point: point.cost or 0.0):
        names = ", ".join(preset.name for preset in search.presets if preset.placement == point.placement)
        figures = (tag("span", cost(point.cost, search.cost_unit)), tag("span", number(point.divergence)))
        rungs.append(tag("div", tag("b", names), strip(point.placement, palette, thin=True), figures))
    head = tag("div", tag("b"), tag("span"), tag("span", "cost"), tag("span", "nats"), class_="ladder-head")
    foot = tag("div", tag("b"), ruler(layers), tag("span"), tag("span"))
    return tag("div", head, rungs, foot, class_="ladder")
