"""Fixtures for training: promotion, devices, folders, texts."""

import io

import jax
import numpy as np
import pytest
from rich.console import Console

from benchmarks.studies.machinery.parallel import make_mesh
from benchmarks.studies.machinery.training import Place


@pytest.fixture(autouse=True)
def promoting():
    """Standard dtype promotion, which optax's optimisers need."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def mesh():
    return make_mesh(2)


@pytest.fixture
def place(mesh, tmp_path):
    return Place(tmp_path / "run", mesh, Console(file=io.StringIO()))


@pytest.fixture(scope="session")
def long_texts(tmp_path_factory):
    """A folder of twelve documents, no two alike."""
    folder = tmp_path_factory.mktemp("documents")
    words = [
        "we",
        "the",
        "people",
        "of",
        "a",
        "great",
        "union",
        "report",
        "that",
        "peace",
        "and",
        "trade",
        "grow",
    ]
    for document in range(12):
        chosen = np.random.default_rng(document).choice(words, 900).tolist()
        lines = [
            f"{document} " + " ".join(chosen[i : i + 60])
            for i in range(0, len(chosen), 60)
        ]
        (folder / f"{document}.txt").write_text("\n\n".join(lines))
    return folder
