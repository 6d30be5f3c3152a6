"""The page: one HTML file that needs nothing else, and the same numbers as JSON beside it."""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from gearshift.files import write_whole
from gearshift.report import gears, learning, record
from gearshift.report.data import Report
from gearshift.report.html import Child, Html, markup, tag
from gearshift.report.palette import Palette, stylesheet
from gearshift.report.parts import Section

SECTIONS = (
    learning.quality_section,
    gears.front_section,
    gears.placements_section,
    learning.training_section,
    learning.errors_section,
    record.generations_section,
    record.export_section,
    record.steps_section,
    record.settings_section,
)
"""In a reader's order. Each gives a Section, or None when the run has nothing to say in it."""


def render(report: Report) -> str:
    """The whole page. The same report gives the same text."""
    palette = Palette.of([mixer.name for mixer in report.mixers], report.main)
    sections = [section for make in SECTIONS if (section := make(report, palette))]
    foot = ("Exact values are in ", tag("code", "report.json"), ", beside this page.")
    return document(report.title, gears.headline(report, palette), sections, foot)


def document(title: str, top: Child, sections: Sequence[Section], foot: Child) -> str:
    """A page of its own: a table of contents, the top, the sections, a last line."""
    contents = tag(
        "nav",
        tag("a", "Overview", href="#top"),
        (tag("a", section.title, href=f"#{section.anchor}") for section in sections),
        aria_label="Contents",
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{title} · Gearshift"),
        tag("style", Html(stylesheet() + files(__package__).joinpath("page.css").read_text("utf-8"))),
    )
    main = tag("main", top, (section.html() for section in sections), tag("footer", foot))
    return "<!doctype html>\n" + markup(tag("html", head, "\n", tag("body", contents, main), lang="en")) + "\n"


def write(report: Report, folder: Path | str) -> Path:
    """Write `report.json` and `report.html` to a folder, made if it is not there. Gives the page's path.

    `Report.model_validate_json` reads `report.json` back.
    """
    folder = Path(folder)
    page = render(report)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "report.json", report.model_dump_json(indent=2) + "\n")
    write_whole(folder / "report.html", page)
    return folder / "report.html"
