"""What the command line needs beyond typer: options that take several values, errors as sentences, exit codes."""

import json
import os
import signal
import sys
import threading
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from transformers.utils.logging import disable_progress_bar
from typer.core import TyperArgument, TyperCommand, TyperOption

from gearshift.files import NO_SPACE

INPUT_AT_FAULT, INTERRUPTED = 2, 130
_PACKAGE = Path(__file__).parent


class Command(TyperCommand):
    """A command with peaceful endings, and with options that take several values in a row.

    What is wrong with the input is said in one sentence on stderr, exit status 2; Ctrl-C ends with 130.
    `--placement A B` is `--placement A --placement B`. Values that the positional arguments still need are theirs.
    """

    def invoke(self, ctx: Any) -> Any:
        disable_progress_bar()  # transformers' own bars would interleave with ours
        try:
            with warnings.catch_warnings():
                # Ours are for the person; Python shows them to programmers alone.
                warnings.filterwarnings("default", category=DeprecationWarning, module=r"gearshift(\.|$)")
                shown = warnings.showwarning
                warnings.showwarning = lambda message, kind, file, *rest: (
                    _say(str(message)) if _PACKAGE in Path(file).parents else shown(message, kind, file, *rest)
                )
                return super().invoke(ctx)
        except KeyboardInterrupt:
            _say("stopped")
            sys.exit(INTERRUPTED)
        except (ValueError, OSError, ImportError) as error:
            said = sentence(error)
            _say(said)
            tell_torchrun(said)
            sys.exit(INPUT_AT_FAULT)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, self._spread(args))

    def _spread(self, args: list[str]) -> list[str]:
        options = {name: p for p in self.params if isinstance(p, TyperOption) for name in p.opts + p.secondary_opts}
        needed = sum(isinstance(p, TyperArgument) and p.nargs == 1 for p in self.params)
        groups = _grouped(args, options)
        # Positional arguments that stand elsewhere: what single options and flags leave over.
        loose = 0
        for name, values in groups:
            if name is None or not options[name].multiple:
                loose += len(values) - (0 if name is None or options[name].is_flag else min(1, len(values)))
        missing = max(0, needed - loose)
        spread: list[str] = []
        for name, values in groups:
            if name is None or not options[name].multiple or len(values) < 2:
                spread += [*([name] if name else []), *values]
                continue
            own = max(1, len(values) - missing)
            missing -= len(values) - own
            spread += [part for value in values[:own] for part in (name, value)] + values[own:]
        return spread


def interrupt_again(lost: Any) -> None:
    """A `sys.unraisablehook`: a Ctrl-C that falls into a finaliser, where exceptions are dropped, comes once more."""
    if lost.exc_type is not KeyboardInterrupt or not hasattr(signal, "pthread_kill"):
        sys.__unraisablehook__(lost)
        return
    with suppress(RuntimeError):  # Python is ending, and starts no threads any more
        threading.Timer(0.05, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()


def _grouped(args: list[str], options: dict[str, TyperOption]) -> list[tuple[str | None, list[str]]]:
    """Each known option with the values up to the next one; None for what stands before the first."""
    groups: list[tuple[str | None, list[str]]] = [(None, [])]
    for arg in args:
        name, equals, value = arg.partition("=")
        if arg.startswith("--") and name in options:
            groups.append((name, [value] if equals else []))
        else:
            groups[-1][1].append(arg)
    return groups


def sentence(error: Exception) -> str:
    """An error in one sentence, for a person."""
    if isinstance(error, OSError) and error.errno in NO_SPACE:
        where = f" for {error.filename}" if error.filename else " on a disk that is written to"
        return f"no space is left{where}: free some and run the same again"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


def tell_torchrun(reason: str) -> None:
    """Let torchrun's summary carry why this process ends, if it was torchrun that started it."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        details = {"py_callstack": reason, "timestamp": str(int(time.time()))}  # what it prints, where a traceback was
        Path(path).write_text(json.dumps({"message": {"message": reason, "extraInfo": details}}))


def _say(text: str) -> None:
    Console(stderr=True, soft_wrap=True, highlight=False).print(f"[bold red]gearshift:[/bold red] {escape(text)}")
