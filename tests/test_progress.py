"""Progress bars on a terminal."""

import io

from rich.console import Console

from gearshift.progress import bar, silent


def test_a_bar_inside_another_shares_its_display() -> None:
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=100)
    with bar(console, "training", 2) as advance:
        with bar(Console(file=shown, force_terminal=True, width=100), "tokenising", 10) as inner:
            inner(10)
        advance(1)
        with bar(console, "again", 1):
            pass
    assert all(name in shown.getvalue() for name in ("training", "tokenising", "again"))
    with bar(console, "afterwards", 1):
        pass
    assert "afterwards" in shown.getvalue()


def test_without_a_terminal_there_is_no_bar() -> None:
    shown = io.StringIO()
    with bar(Console(file=shown), "training", 2) as advance:
        assert advance is silent
    assert shown.getvalue() == ""


def test_a_note_stands_beside_the_bar_in_eighty_columns() -> None:
    shown = io.StringIO()
    with bar(Console(file=shown, force_terminal=True, width=80), "training", 2) as advance:
        advance(1, "stage 2/3 stochastic, loss 0.4123")
        advance(1)
    *_, last = shown.getvalue().split("training")
    assert "stage 2/3 stochastic, loss 0.4123" in last
    assert "100%" in last
