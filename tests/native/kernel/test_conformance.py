"""Law 1 for another build of the native kernel: another compiler, or sanitizers.

The installed library is tested in ``tests/test_conformance.py``. ``ATTNLAB_EVERY=n``
tests only every n-th cell, for slow builds.
"""

import os

import jax
import pytest

from attnlab import explain
from attnlab._src.implementations.native import load
from tests import grid
from tests.test_conformance import CELLS, NATIVE_REFUSES, conform, instructions

pytestmark = pytest.mark.skipif(
    load.why_not() is not None, reason="the library is not there"
)

TAKEN = [cell for cell in CELLS if not NATIVE_REFUSES & set(cell)]


@pytest.mark.skipif(
    not os.environ.get("ATTNLAB_NATIVE_LIBRARY"), reason="the library is the installed"
)
@pytest.mark.parametrize(
    "cell", TAKEN[:: int(os.environ.get("ATTNLAB_EVERY", "1"))], ids=str
)
def test_cell(cell, tile, monkeypatch):
    conform(cell, tile, monkeypatch, {"native": instructions})


@pytest.mark.parametrize("name", sorted(NATIVE_REFUSES))
def test_what_is_refused_gives_its_reason(name):
    cell = next(c for c in CELLS if NATIVE_REFUSES & set(c) == {name})
    problem = grid.build(cell)
    options = {**problem.data, **problem.fixed, "dropout_rate": problem.dropout_rate}
    with jax.enable_x64(name == "float64"):
        words = "it (does not know the|computes in float32)"
        with pytest.raises(NotImplementedError, match=words):
            explain(**options, implementation="native")
        assert explain(**options).implementation == "tiled"
