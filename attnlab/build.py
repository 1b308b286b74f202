"""``python -m attnlab.build``: compiles the kernel for CPUs, or compiles it again."""

import sys

from attnlab._src.implementations.native.build import main

if __name__ == "__main__":
    sys.exit(main())
