import math

import pytest
from sample import sample

from gearshift.report import numbers
from gearshift.report.curves import loss_curves, run_curve, smooth
from gearshift.report.figures import pareto
from gearshift.report.html import Html, markup, tag
from gearshift.report.labels import Label, along_steps, place_labels, spread
from gearshift.report.palette import DARK, LIGHT, Palette
from gearshift.report.strips import heat_map, run_lengths, strip
from gearshift.report.svg import inline


def test_every_colour_has_a_dark_twin_and_is_its_own() -> None:
    assert set(LIGHT) == set(DARK)
    assert len(set(LIGHT.values())) == len(LIGHT), "a picture's colours are told apart by their light value"


@pytest.mark.parametrize(("colours", "least"), [(LIGHT, 2.1), (DARK, 4.0)])
def test_mixers_stand_out_from_the_card(colours: dict[str, str], least: float) -> None:
    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    card = luminance(colours["card"])
    for name, colour in colours.items():
        if name.startswith("mixer-"):
            low, high = sorted((card, luminance(colour)))
            assert (high + 0.05) / (low + 0.05) >= least, name


def test_a_mixer_keeps_its_colour_and_main_has_its_own() -> None:
    palette = Palette.of(["b", "main", "c"], "main")
    assert palette.roles == {"main": "mixer-0", "b": "mixer-1", "c": "mixer-2"}
    many = Palette.of([f"m{place}" for place in range(20)], "m3")
    assert [name for name, role in many.roles.items() if role == "mixer-0"] == ["m3"]


def test_pictures_follow_the_theme_and_hint() -> None:
    report = sample(layers=4)
    assert report.search
    palette = Palette.of([mixer.name for mixer in report.mixers], report.main)
    picture = pareto(report.search, palette)
    assert picture is not None
    assert "var(--mixer-1, " in picture
    assert "<title>pure: " in picture
    assert "font-family" not in picture
    assert picture == pareto(report.search, palette)
    bare = report.search.model_copy(update={"candidates": ()})
    assert pareto(bare, palette) is None
    curves = loss_curves(report.training[0], palette, "loss-0")
    assert curves is not None
    assert ">gdn</text>" in curves


def test_ids_of_two_pictures_do_not_meet() -> None:
    svg = '<svg width="1pt" viewBox="0 0 1 1"><g id="a"><path id="p"/></g><use xlink:href="#p"/></svg>'
    assert '<g><path id="one-p"/></g><use href="#one-p"/>' in inline(svg, "one", "a <label>")
    assert 'aria-label="a &lt;label&gt;"' in inline(svg, "one", "a <label>")


def test_strips_have_a_cell_a_layer_with_a_hint() -> None:
    palette = Palette.of(["a", "b"], "a")
    cells = strip("a*2,b", palette)
    assert cells.count("<i ") == 3
    assert 'title="layer 2: b"' in cells
    assert run_lengths("a*2,b") == "<code>a*2,<wbr>b</code>"


def test_heat_map_spans_the_scale() -> None:
    palette = Palette.of(["a", "b"], "a")
    picture = heat_map([("b", {"before": (1.0, None), "after": (0.01, 0.1)})], palette)
    assert all(f"--heat:{share}%" in picture for share in (0, 50, 100))
    assert 'class="unknown"' in picture


def test_a_linear_heat_map_holds_zero_and_shows_counts_in_full() -> None:
    palette = Palette.of(["a", "b"], "a")
    picture = heat_map([("a", {"": [5, 10]}), ("b", {"": [0, None]})], palette, logarithmic=False)
    assert all(
        f'--heat:{share}%" title="{hint}"' in picture for share, hint in ((50, "a, layer 0: 5"), (0, "b, layer 0: 0"))
    )
    assert "heat alone" in picture
    below = heat_map([("a", {"": [-1.0, 3.0]})], palette, logarithmic=False)
    assert f'--heat:0%" title="a, layer 0: {numbers.MINUS}1.00"' in below


def test_rounding_does_not_take_the_whole_scale() -> None:
    palette = Palette.of(["a", "b"], "a")
    picture = heat_map([("b", {"": [1e-14, 0.01, 1.0]})], palette)
    assert all(f"--heat:{share}%" in picture for share in (0, 50, 100))
    stage = sample(layers=4).training[0]
    tiny = stage.model_copy(
        update={
            "records": tuple(
                record.model_copy(update={"mixer_losses": {**record.mixer_losses, "window": 1e-14}})
                for record in stage.records
            )
        }
    )
    curves = loss_curves(tiny, Palette.of(["attention", "window", "gdn", "kda"], "attention"), "loss")
    assert curves is not None
    assert ">window</text>" in curves
    assert "1e-14" not in curves


def test_long_lines_are_smoothed() -> None:
    few = [(step, float(step % 2)) for step in range(60)]
    assert smooth(few) == few
    many = [(step, float(step % 2)) for step in range(400)]
    smoothed = smooth(many)
    assert [step for step, _ in smoothed] == [step for step, _ in many]
    assert all(abs(value - 0.5) < 0.05 for _, value in smoothed)


def test_a_value_over_a_run() -> None:
    assert run_curve([("one", [])], "name", "Speed") is None
    stages = [("one", [(0, 20_000.0), (1, 40_000.0)]), ("two", [(2, 30_000.0)])]
    picture = run_curve(stages, "name", "Speed")
    assert picture is not None
    assert all(f">{word}</text>" in picture for word in ("one", "two", "20.0 K"))


def test_labels_keep_clear_of_each_other() -> None:
    labels = [Label("quality", 100, 100), Label("balanced", 104, 101), Label("fast", 98, 103)]
    boxes = [
        offset.box(label) for label, offset in zip(labels, place_labels(labels, [], (0, 0, 300, 300)), strict=True)
    ]
    for place, one in enumerate(boxes):
        for other in boxes[:place]:
            assert one[0] >= other[2] or other[0] >= one[2] or one[1] >= other[3] or other[1] >= one[3]


def test_steps_are_followed() -> None:
    assert along_steps([(0, 10), (12, 10 - 24)], every=12) == [(6, 10), (12, 10), (12, 2), (12, -6)]
    assert along_steps([(1, 1)]) == []


def test_spread_keeps_order_and_middle() -> None:
    moved = spread([10, 11, 50], gap=14)
    assert moved[1] - moved[0] >= 14
    assert moved == sorted(moved)
    assert sum(moved) == pytest.approx(71)


def test_markup_escapes_once() -> None:
    assert tag("p", "a<b", Html("<i>"), None, title='"') == '<p title="&quot;">a&lt;b<i></p>'
    assert markup(["&", Html("&amp;")]) == "&amp;&amp;"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.04214, "0.0421"),
        (3.14159, "3.14"),
        (9.999, "10.0"),
        (999.7, "1,000"),
        (14203, "14,203"),
        (0, "0"),
        (-0.5, "−0.500"),  # noqa: RUF001
        (1.234e-6, "1.23 × 10⁻⁶"),  # noqa: RUF001
        (5e9, "5 × 10⁹"),  # noqa: RUF001
        (math.nan, "–"),  # noqa: RUF001
        (None, "–"),  # noqa: RUF001
    ],
)
def test_numbers(value: float | None, text: str) -> None:
    assert numbers.number(value) == text


def test_units() -> None:
    assert [numbers.size(value) for value in (0, 12, 61_440, 285.4e6, 999_700)] == [
        "0 B",
        "12 B",
        "61.4 KB",
        "285 MB",
        "1.00 MB",
    ]
    assert [numbers.count(value) for value in (7, 134_515_008)] == ["7", "135 M"]
    assert [numbers.duration(value) for value in (0.42, 12.34, 125, 59.97, 3725)] == [
        "0.420 s",
        "12.3 s",
        "2 min 05 s",
        "1 min 00 s",
        "1 h 02 min",
    ]
    assert [numbers.percent(value) for value in (0.412, 0.0421, 0, 1.2)] == ["41%", "4.2%", "0.0%", "120%"]
    assert [numbers.change(*pair) for pair in ((4, 2), (2, 3), (1, 1), (0, 0), (0, 1), (None, 1))] == [
        "\N{MINUS SIGN}50%",
        "+50%",
        "0.0%",
        "0%",
        "\N{EN DASH}",
        "\N{EN DASH}",
    ]
