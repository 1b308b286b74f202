"""Compiling for accelerators that are not here, and what their compilers tell."""

from attnlab._src.bench.targets import TARGETS as TARGETS
from attnlab._src.bench.targets import CompilerMissing as CompilerMissing
from attnlab._src.bench.targets import Kernel as Kernel
from attnlab._src.bench.targets import Study as Study
from attnlab._src.bench.targets import Target as Target
from attnlab._src.bench.targets import lowered as lowered
from attnlab._src.bench.targets import on as on
from attnlab._src.bench.targets import study as study

__all__ = [
    "TARGETS",
    "CompilerMissing",
    "Kernel",
    "Study",
    "Target",
    "lowered",
    "on",
    "study",
]
