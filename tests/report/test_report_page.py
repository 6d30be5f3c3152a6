import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from sample import PROMPT, TEXTS, minimal, sample

import gearshift.report as report_package
from gearshift.report import Generation, LayerErrors, Report, render, write
from gearshift.report.html import VOID

OPTIONAL = [name for name, field in Report.model_fields.items() if not field.is_required()]


class Reader(HTMLParser):
    """Follows the tags, and keeps what a test asks about."""

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.handle_startendtag(tag, attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        named = dict(attrs)
        assert len(named) == len(attrs), f"an attribute of {tag} twice"
        self.ids += [value for name, value in attrs if name == "id" and value]
        self.links += [value for name, value in attrs if name in ("href", "src") and value]

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def report() -> Report:
    return sample(layers=4, layerwise_steps=5, stochastic_steps=4)


@pytest.fixture(scope="module")
def page(report: Report) -> str:
    return render(report)


def without(report: Report, *parts: str) -> Report:
    return Report(**{name: value for name, value in report if name not in parts})


def test_well_formed(page: str) -> None:
    reader = Reader(page)
    assert len(set(reader.ids)) == len(reader.ids)
    assert all(link.startswith("#") and link[1:] in ["", *reader.ids] for link in reader.links)
    assert reader.tags.count("svg") == 3


def test_self_contained(page: str) -> None:
    rest = page.replace('xmlns="http://www.w3.org/2000/svg"', "")
    rest = rest.replace('xmlns:xlink="http://www.w3.org/1999/xlink"', "")
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", rest)
    assert not {"link", "script", "img", "iframe"} & set(Reader(page).tags)


def test_every_section_is_there_in_a_readers_order(page: str) -> None:
    expected = ["top", "quality", "front", "placements", "training", "errors"]
    expected += ["generations", "export", "steps", "settings"]
    assert [name for name in Reader(page).ids if name in expected] == expected


def test_deterministic(report: Report, page: str) -> None:
    assert render(report) == page
    assert render(Report.model_validate_json(report.model_dump_json())) == page


def test_text_is_escaped(page: str) -> None:
    assert "<script" not in page
    text = Reader(page).text
    assert PROMPT in text
    assert TEXTS["fast"] in text


def test_hostile_text_everywhere(report: Report) -> None:
    hostile = "</style><script>\"'&\x00\x1b[0m"
    values = {**dict(minimal()), "title": hostile, "settings": {hostile: {hostile: hostile}}}
    values["generations"] = [
        Generation(
            preset=hostile,
            placement="attention*2",
            prompt=hostile,
            text=hostile,
            tokens=1,
            tokens_per_second=1,
            state_bytes=1,
        )
    ]
    page = render(Report(**values))
    assert "script" not in Reader(page).tags
    assert "\x00" not in page
    assert "\x1b" not in page


def test_nothing_but_the_model() -> None:
    page = render(minimal())
    assert [name for name in Reader(page).ids if name in ("quality", "front", "training", "settings")] == ["settings"]


@pytest.mark.parametrize("part", OPTIONAL)
def test_any_part_may_be_absent(report: Report, part: str) -> None:
    assert report.search
    unpainted = report.search.model_copy(update={"candidates": ()})
    Reader(render(without(report.model_copy(update={"search": unpainted, "training": ()}), part)))


def test_numbers_that_are_not_finite(report: Report) -> None:
    values = re.sub(r":\s*-?\d+\.\d+", ": null", report.model_dump_json())
    holes = Report.model_validate_json(values)
    page = render(holes)
    Reader(page)
    assert not re.search(r"\b(nan|inf|None)\b", Reader(page).text)


def test_zero_and_equal_errors(report: Report) -> None:
    for value in (0.0, 0.5):
        errors = LayerErrors(before={"gdn": (value,) * 4}, after={"gdn": (value, None) * 2})
        Reader(render(report.model_copy(update={"layer_errors": errors})))


def test_what_is_bad_is_said(report: Report) -> None:
    assert report.quality
    assert report.export
    assert "kda is in no preset" in Reader(render(report)).text
    swapped = report.quality.model_copy(update={"before": report.quality.after, "after": report.quality.before})
    wrong = report.export.model_copy(update={"exact": False, "max_abs_difference": 0.25})
    text = Reader(render(report.model_copy(update={"quality": swapped, "export": wrong}))).text
    assert "Training made window, gdn and kda worse" in text
    assert "logits differ by up to 0.250" in text


def test_a_run_in_which_everything_is_the_same(report: Report) -> None:
    """A tiny model: one step, presets that coincide, divergences of 0, costs that are all alike."""
    assert report.search
    for value in (0.0, -1e-9, 3.0):
        same = {"placement": "attention*4", "cost": 100.0, "divergence": value}
        only = report.search.candidates[0].model_copy(update=same)
        presets = [preset.model_copy(update={**same, "counts": {"attention": 4}}) for preset in report.search.presets]
        search = report.search.model_copy(update={"candidates": (only,), "front": (only,), "presets": tuple(presets)})
        record = report.training[1].records[0].model_copy(update={"loss": value, "loss_terms": {}})
        stage = report.training[1].model_copy(update={"records": (record,)})
        text = Reader(render(report.model_copy(update={"search": search, "training": (stage,)}))).text
        assert "quality, balanced, fast" in text


def test_the_cost_may_be_no_size(report: Report) -> None:
    assert report.search
    search = report.search.model_copy(update={"cost_unit": "milliseconds a token", "main_state_bytes": None})
    text = Reader(render(report.model_copy(update={"search": search}))).text
    assert "milliseconds a token" in text


def test_write_replaces_both_files_whole(report: Report, page: str, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    for _ in range(2):
        assert write(report, folder) == folder / "report.html"
    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "report.json"]
    assert (folder / "report.html").read_text("utf-8") == page
    assert Report.model_validate_json((folder / "report.json").read_text("utf-8")) == report


def test_a_failed_write_leaves_what_was_there(report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(minimal(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write(report, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_room_imports_no_torch_and_matplotlib_only_to_draw() -> None:
    for path in Path(report_package.__file__).parent.glob("*.py"):
        for line in path.read_text("utf-8").splitlines():
            assert not re.match(r"(import|from) (torch|matplotlib)|\s+(import|from) torch", line), (
                f"{path.name}: {line}"
            )
