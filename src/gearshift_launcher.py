"""The `gearshift` command before its imports: Ctrl-C is answered in peace from the first moment on."""

import sys


def main() -> None:
    """Run the command line; 130 if interrupted."""
    try:
        from gearshift.cli import main as command

        command()
    except KeyboardInterrupt:
        sys.exit(130)
