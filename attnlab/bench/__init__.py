"""Measuring: what attention costs on the machine at hand, once it is right."""

from attnlab.bench.cases import PATTERNS as PATTERNS
from attnlab.bench.cases import SCORES as SCORES
from attnlab.bench.cases import Case as Case
from attnlab.bench.cases import Spec as Spec
from attnlab.bench.cases import build as build
from attnlab.bench.contenders import Implementation as Implementation
from attnlab.bench.machine import measure_peaks as measure_peaks
from attnlab.bench.peers import installed_peers as installed_peers
from attnlab.bench.runner import Group as Group
from attnlab.bench.runner import Row as Row
from attnlab.bench.runner import run as run
from attnlab.bench.text import load_documents as load_documents
from attnlab.bench.timing import Repeats as Repeats
from attnlab.bench.timing import interleave as interleave
