"""Measuring: what attention costs on the machine at hand, once it is right."""

from attnlab._src.bench.cases import PATTERNS as PATTERNS
from attnlab._src.bench.cases import SCORES as SCORES
from attnlab._src.bench.cases import Case as Case
from attnlab._src.bench.cases import Spec as Spec
from attnlab._src.bench.cases import build as build
from attnlab._src.bench.collectives import Collective as Collective
from attnlab._src.bench.collectives import collectives as collectives
from attnlab._src.bench.contenders import Implementation as Implementation
from attnlab._src.bench.machine import measure_peaks as measure_peaks
from attnlab._src.bench.peers import installed_peers as installed_peers
from attnlab._src.bench.runner import Group as Group
from attnlab._src.bench.runner import Row as Row
from attnlab._src.bench.runner import run as run
from attnlab._src.bench.text import load_documents as load_documents
from attnlab._src.bench.timing import Repeats as Repeats
from attnlab._src.bench.timing import interleave as interleave

__all__ = [
    "PATTERNS",
    "SCORES",
    "Case",
    "Collective",
    "Group",
    "Implementation",
    "Repeats",
    "Row",
    "Spec",
    "build",
    "collectives",
    "installed_peers",
    "interleave",
    "load_documents",
    "measure_peaks",
    "run",
]
