"""Files of an installation, with a (fake) compiler and without one."""

import pathlib
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

from attnlab._src.implementations.native import build

pytest.importorskip("setuptools", minversion="77")

ROOT = pathlib.Path(__file__).parent.parent.parent
NATIVE = "attnlab/_src/implementations/native"


@pytest.fixture
def project(tmp_path):
    """A copy of the project without built files."""
    folder = tmp_path / "project"
    unwanted = shutil.ignore_patterns("__pycache__", "_native.*")
    shutil.copytree(ROOT / "attnlab", folder / "attnlab", ignore=unwanted)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def tags(files):
    (name,) = (name for name in files if name.endswith(".dist-info/WHEEL"))
    return files[name]


def package(project, what):
    """Builds an archive as pip would; returns its path and the messages."""
    script = (
        "from setuptools import build_meta\n"
        f"print('made', build_meta.build_{what}({str(project.parent)!r}))"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, cwd=project, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Customization incompatible" not in done.stderr
    return project.parent / done.stdout.split("made ")[-1].strip(), done.stderr


def contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def source_files():
    return {
        f"{NATIVE}/src/{path.relative_to(build.SOURCES).as_posix()}"
        for path in build.SOURCES.rglob("*.*")
    }


def test_a_wheel_with_it_is_for_this_platform(project, compiler):
    wheel, _ = package(project, "wheel")
    files = contents(wheel)
    library = f"{NATIVE}/{build.LIBRARY.name}"
    assert b"-shared" in files[library]
    assert f"{NATIVE}/{build.NOTE.name}" not in files
    assert source_files() <= files.keys()  # so that it can be built again
    assert "attnlab/_src/command.py" in files
    assert not wheel.name.endswith("-any.whl")
    assert "-py3-none-" in wheel.name
    assert b"Root-Is-Purelib: false" in tags(files)
    assert not (project / library).exists()


def test_a_wheel_without_it_is_for_every_platform(project, monkeypatch, compiler):
    package(project, "wheel")  # leaves a library in the build folder
    monkeypatch.setenv("BROKEN", "1")
    wheel, said = package(project, "wheel")
    files = contents(wheel)
    assert f"{NATIVE}/{build.LIBRARY.name}" not in files
    assert b"expected ';'" in files[f"{NATIVE}/{build.NOTE.name}"]
    assert "attnlab goes without its native library: " in said
    assert wheel.name.endswith("-py3-none-any.whl")
    assert b"Root-Is-Purelib: true" in tags(files)


def test_the_sources_travel(project, compiler):
    (project / NATIVE / build.LIBRARY.name).write_text("built here")
    archive, _ = package(project, "sdist")
    with tarfile.open(archive) as tar:
        names = {name.split("/", 1)[-1] for name in tar.getnames()}
    assert source_files() <= names
    assert f"{NATIVE}/{build.LIBRARY.name}" not in names


def test_an_editable_installation_builds_in_place(project, monkeypatch, compiler):
    wheel, _ = package(project, "editable")
    library = project / NATIVE / build.LIBRARY.name
    assert "-shared" in library.read_text()
    assert wheel.name.endswith("-py3-none-any.whl")  # without the library
    library.write_text("old")
    monkeypatch.setenv("CXX", "no-such-compiler")
    package(project, "editable")
    assert library.read_text() == "old"
    assert "no-such-compiler" in (project / NATIVE / build.NOTE.name).read_text()
