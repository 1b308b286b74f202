"""Builds the native library when attnlab is installed; see pyproject.toml.

If it cannot be built, the installation continues without it and leaves a note for
:func:`attnlab._src.implementations.native.load.why_not`. setuptools loads this file by
its path, before attnlab's dependencies are installed.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py


def _load_build() -> ModuleType:
    path = Path(__file__).with_name("build.py")
    spec = importlib.util.spec_from_file_location("_attnlab_native_build", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_BUILD = _load_build()
_PACKAGE = ("attnlab", "_src", "implementations", "native")


class BuildPy(build_py):
    """Builds the library next to the copied modules, or, if editable, the sources."""

    def run(self) -> None:
        """See setuptools."""
        super().run()
        folder = _BUILD.HERE
        if not self.editable_mode:
            folder = Path(self.build_lib, *_PACKAGE)
            for stale in (_BUILD.LIBRARY, _BUILD.NOTE):
                (folder / stale.name).unlink(missing_ok=True)
        if reason := _BUILD.build_or_note(folder):
            sys.stderr.write(f"attnlab goes without its native library: {reason}\n")


class BdistWheel(bdist_wheel):
    """Tags the wheel for this platform if it contains the library."""

    def get_tag(self) -> tuple[str, str, str]:
        """See setuptools: the library works with any Python 3, on this platform."""
        library = Path(self.bdist_dir or "", *_PACKAGE, _BUILD.LIBRARY.name)
        self.root_is_pure = not library.is_file()
        return "py3", "none", super().get_tag()[2]
