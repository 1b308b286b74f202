"""The public modules: ``__all__`` is complete, and each name is documented."""

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import attnlab

#: Public modules that are commands, not for import; ``ROOMS`` are all others.
COMMANDS = {"attnlab.bench.__main__", "attnlab.build"}
ROOMS = [
    importlib.import_module(module.name)
    for module in [
        pkgutil.ModuleInfo(None, "attnlab", True),
        *pkgutil.walk_packages(attnlab.__path__, "attnlab."),
    ]
    if "._" not in module.name
]
ROOMS = [room for room in ROOMS if room.__name__ not in COMMANDS]
rooms = pytest.mark.parametrize("room", ROOMS, ids=lambda m: m.__name__)


@rooms
def test_what_a_room_imports_is_what_it_offers(room):
    tree = ast.parse(Path(room.__file__).read_text())
    imported = [
        name.asname or name.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.startswith("attnlab")
        for name in node.names
    ]
    assert sorted(imported) == sorted(room.__all__)
    assert set(room.__all__) <= set(dir(room))


@rooms
def test_every_name_is_documented(room):
    for name in room.__all__:
        if not callable(getattr(room, name)):
            continue  # a table or a module
        text = inspect.getdoc(getattr(room, name))
        assert text, f"{room.__name__}.{name} has no docstring"
        assert text.splitlines()[0].endswith((".", "?")), f"{room.__name__}.{name}"


@rooms
def test_signatures_name_rng_not_key(room):
    """A PRNG argument is ``rng``; ``key`` is what a query is compared with."""
    for name in room.__all__:
        thing = getattr(room, name)
        for function in (thing, getattr(thing, "init", None)):
            if inspect.isfunction(function) or inspect.ismethod(function):
                assert "rng_key" not in inspect.signature(function).parameters


def test_flax_is_imported_where_modules_are_asked_for():
    code = """
import sys, attnlab
assert "nn" in dir(attnlab) and "flax" not in sys.modules
assert not hasattr(attnlab, "neural") and "flax" not in sys.modules
names = {}
exec("from attnlab import *", names)
assert set(attnlab.__all__) <= set(names)
assert attnlab.nn is sys.modules["attnlab.nn"] is names["nn"]
"""
    subprocess.run([sys.executable, "-c", code], check=True)
