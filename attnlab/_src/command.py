"""The command ``attnlab``, which imports JAX only when it runs.

An interruption of that import is reported in one line.
"""

import sys


def main() -> int:
    """As :func:`attnlab._src.bench.cli.main`."""
    try:
        from attnlab._src.bench.cli import main
    except KeyboardInterrupt:
        sys.stderr.write("attnlab: interrupted\n")
        return 130
    return main()
