"""``python -m attnlab.bench``: the same as ``attnlab bench``."""

import sys

from attnlab._src.bench.cli import main

sys.exit(main(["bench", *sys.argv[1:]]))
