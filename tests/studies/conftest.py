"""Devices and a place to train."""

import io

import pytest
from rich.console import Console

from benchmarks.studies.parallel import make_mesh
from benchmarks.studies.training import Place


@pytest.fixture
def mesh():
    return make_mesh(2)


@pytest.fixture
def place(mesh, tmp_path):
    return Place(tmp_path / "run", mesh, Console(file=io.StringIO()))
