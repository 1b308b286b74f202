"""``python -m attnlab.build``: builds the kernel for CPUs, or builds it again."""

import sys

from attnlab._src.implementations.native.build import main

if __name__ == "__main__":
    sys.exit(main())
