"""Law 1 for the native kernel: the whole grid, on every instruction set that runs here.

``ATTNLAB_EVERY=n`` takes each n-th cell only: for builds that are slow.
"""

import os

import jax
import pytest

from attnlab import explain
from attnlab.implementations.native import load
from tests import grid
from tests.test_conformance import CELLS, conform

pytestmark = pytest.mark.skipif("load.why_not()", reason="the library is not there")

#: What the kernel does not know, by design: the user's own functions, and float64.
REFUSED = {"own", "stacked", "float64"}
TAKEN = [cell for cell in CELLS if not REFUSED & set(cell)]


def instructions():
    for isa in load.load().isas:
        with load.instructions(isa):
            yield isa


@pytest.mark.parametrize(
    "cell", TAKEN[:: int(os.environ.get("ATTNLAB_EVERY", "1"))], ids=str
)
def test_cell(cell, tile, monkeypatch):
    conform(cell, tile, monkeypatch, "native", instructions)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_is_refused_gives_its_reason(name):
    cell = next(c for c in CELLS if REFUSED & set(c) == {name})
    problem = grid.build(cell)
    options = {**problem.data, **problem.fixed, "dropout_rate": problem.dropout_rate}
    with jax.enable_x64(name == "float64"):
        words = "it (does not know the|computes in float32)"
        with pytest.raises(NotImplementedError, match=words):
            explain(**options, implementation="native")
        assert explain(**options).implementation == "tiled"
