"""Entry point of the command ``attnlab``.

It imports JAX, which takes a while, inside ``main``, so that an interruption (Ctrl-C)
during the import is reported in one line.
"""

import sys


def main() -> int:
    """Runs :func:`attnlab._src.bench.cli.main`; returns the exit status."""
    try:
        from attnlab._src.bench.cli import main
    except KeyboardInterrupt:
        sys.stderr.write("attnlab: interrupted\n")
        return 130
    return main()
