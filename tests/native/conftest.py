"""A copy of the native package, and a fake compiler."""

import importlib.util
import pathlib
import shutil
import sys

import pytest

from attnlab._src.implementations.native import build as real

#: Writes its output file, refuses -mavx512bf16, and fails if $BROKEN is set.
COMPILER = """#!/bin/sh
for argument; do
  [ "$argument" = -mavx512bf16 ] && exit 1
  [ "$before" = -o ] && out=$argument
  before=$argument
done
if [ -n "$BROKEN" ] && [ -n "$out" ]; then
  echo "kernel.cc: In function 'forward':" >&2
  echo "kernel.cc:3:1: error: expected ';'" >&2
  exit 1
fi
[ -z "$out" ] || echo "$*" > "$out"
"""


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """Sets ``$CXX`` to the fake compiler."""
    path = tmp_path / "cxx"
    path.write_text(COMPILER)
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    return path


@pytest.fixture
def build(tmp_path, monkeypatch):
    """The module ``build`` of a copy of the package without a library."""
    folder = tmp_path / "native"
    folder.mkdir()
    shutil.copy(pathlib.Path(real.__file__), folder)
    shutil.copytree(real.SOURCES, folder / "src")
    spec = importlib.util.spec_from_file_location("copy_of_build", folder / "build.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "copy_of_build", module)
    spec.loader.exec_module(module)
    return module
