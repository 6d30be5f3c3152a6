"""What the command line needs beyond typer: options that take several values, errors as sentences, exit codes."""

import sys
from collections.abc import Callable
from typing import Any

import click
import typer
from rich.console import Console
from typer.core import TyperCommand


class Command(TyperCommand):
    """A command whose repeatable options also take several values in a row: `--placement A B` is `--placement A
    --placement B`. Values that the positional arguments still need are left to those."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, self._spread(args))

    def _spread(self, args: list[str]) -> list[str]:
        options = {name: p for p in self.params if isinstance(p, click.Option) for name in p.opts + p.secondary_opts}
        needed = sum(isinstance(p, click.Argument) and p.nargs == 1 for p in self.params)
        groups: list[tuple[str | None, list[str]]] = [(None, [])]
        for arg in args:
            name, _, value = arg.partition("=")
            if arg.startswith("--") and name in options:
                groups.append((name, [value] if value else []))
            else:
                groups[-1][1].append(arg)
        # How many positional arguments stand elsewhere: what single options and flags leave over.
        loose = 0
        for name, values in groups:
            takes = 0 if name is None or options[name].is_flag else 1
            loose += len(values[takes:]) if name is None or not options[name].multiple else 0
        missing = max(0, needed - loose)
        spread: list[str] = []
        for name, values in groups:
            if name is None:
                spread += values
            elif not options[name].multiple or len(values) < 2:
                spread += [name, *values]
            else:
                own = max(1, len(values) - missing)
                missing -= len(values) - own
                for value in values[:own]:
                    spread += [name, value]
                spread += values[own:]
        return spread


def run(app: typer.Typer, args: list[str] | None = None) -> int:
    """Run the command line. 0: done, 2: the input was at fault (one sentence on stderr), 130: interrupted."""
    command: Callable[..., Any] = typer.main.get_command(app)
    try:
        result = command(args=args, prog_name="gearshift", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.exceptions.Abort:
        return _stopped()
    except KeyboardInterrupt:
        return _stopped()
    except click.ClickException as error:
        error.show()
        return 2
    except (ValueError, OSError) as error:
        _say(sentence(error))
        return 2


def sentence(error: Exception) -> str:
    """An error in one sentence, for a person."""
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


def _stopped() -> int:
    _say("stopped; run the same command again to go on where it can be resumed")
    return 130


def _say(text: str) -> None:
    Console(stderr=True, soft_wrap=True, highlight=False).print(f"[bold red]gearshift:[/bold red] {_escape(text)}")
    sys.stderr.flush()


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
