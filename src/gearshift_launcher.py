"""The `gearshift` command before its imports: Ctrl-C is answered in peace from the first moment on."""

import os
import signal
import sys

INTERRUPTED = 130


def main() -> None:
    """Run the command line; 130 if interrupted."""
    # Nothing is done while the imports run, so leaving at once is safe; an exception could get lost in a finaliser.
    signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
    from gearshift.cli import main as command

    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        command()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
