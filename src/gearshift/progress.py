"""Progress for people: a bar with an estimate while a step runs, one line of result when it is done."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column

Advance = Callable[[float], None]


class Bar(Protocol):
    """Moves a bar on."""

    def __call__(self, amount: float, note: str | None = None) -> None:
        """By `amount`; a `note` stands beside the bar from now on."""


_open: ContextVar[Progress | None] = ContextVar("open", default=None)
"""The bars on the terminal, where there are any: a terminal has room for one such display."""


def silent(amount: float, note: str | None = None) -> None:
    """Progress that nobody watches."""


@contextmanager
def bar(console: Console, what: str, total: float) -> Iterator[Bar]:
    """A progress bar over `total` units; the yielded function moves it on. Gone when the block ends. Terminals only.

    Inside the block of another bar, it appears below that one.
    """
    if not console.is_terminal:
        yield silent
        return
    outer = _open.get()
    if outer is not None:
        task = outer.add_task(what, total=total, note="")
        try:
            yield _mover(outer, task)
        finally:
            outer.remove_task(task)
        return
    columns = (
        TextColumn("[progress.description]{task.description}"),
        BarColumn(bar_width=None, table_column=Column(max_width=40)),  # narrower where a note needs the room
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=total, note="")
        token = _open.set(progress)
        try:
            yield _mover(progress, task)
        finally:
            _open.reset(token)


def say_if_piped(console: Console, line: str) -> None:
    """Print a line where no bar can be seen."""
    if not console.is_terminal:
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def _mover(progress: Progress, task: TaskID) -> Bar:
    def move(amount: float, note: str | None = None) -> None:
        if note is not None:
            progress.update(task, note=note)
        progress.advance(task, amount)

    return move


@dataclass
class Step:
    """One finished or running step of a job."""

    name: str
    seconds: float = 0.0
    result: str = ""


@dataclass
class Steps:
    """The steps of a long job: numbered, timed, each with one line of result."""

    console: Console
    total: int
    done: list[Step] = field(default_factory=list)

    @contextmanager
    def step(self, name: str, units: float) -> Iterator[tuple[Step, Bar]]:
        """Run one step. Set the yielded step's `result` before the block ends."""
        step = Step(name)
        number = f"{len(self.done) + 1}/{self.total}"
        started = time.perf_counter()
        with bar(self.console, f"{number} {name}", units) as advance:
            yield step, advance
        step.seconds = time.perf_counter() - started
        self.done.append(step)
        self._say(f"{step.seconds:.1f} s")

    def skip(self, step: Step) -> None:
        """Count a step that an earlier run has done."""
        self.done.append(step)
        self._say("done before")

    def _say(self, time: str) -> None:
        step = self.done[-1]
        line = f"{len(self.done)}/{self.total} [bold]{step.name}[/bold]  [dim]{time}[/dim]  {escape(step.result)}"
        self.console.print(line, soft_wrap=True)
