"""Progress for people: a bar with an estimate while a step runs, one line of result when it is done."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Advance = Callable[[float], None]
_open: ContextVar[Progress | None] = ContextVar("open", default=None)
"""The bars on the terminal, where there are any: a terminal has room for one such display."""


def silent(amount: float) -> None:
    """Progress that nobody watches."""


@contextmanager
def bar(console: Console, what: str, total: float) -> Iterator[Advance]:
    """A progress bar over `total` units; the yielded function moves it on. Gone when the block ends. Terminals only.

    Inside the block of another bar, it appears below that one.
    """
    if not console.is_terminal:
        yield silent
        return
    outer = _open.get()
    if outer is not None:
        task = outer.add_task(what, total=total)
        try:
            yield lambda amount: outer.advance(task, amount)
        finally:
            outer.remove_task(task)
        return
    columns = (
        TextColumn("[progress.description]{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=total)
        token = _open.set(progress)
        try:
            yield lambda amount: progress.advance(task, amount)
        finally:
            _open.reset(token)


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
    def step(self, name: str, units: float) -> Iterator[tuple[Step, Advance]]:
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
