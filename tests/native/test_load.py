"""Loading: every reason for failure, and every instruction set of this processor."""

import ctypes
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import jax
import pytest

from attnlab._src.implementations.native import build, load


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    load.load()  # loads as the environment of this run says, before it is changed
    for name in ("ATTNLAB_NATIVE_ISA", "ATTNLAB_NATIVE_LIBRARY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def somewhere(tmp_path, monkeypatch):
    """A folder without a library and without a note."""
    for name in ("LIBRARY", "NOTE"):
        path = tmp_path / getattr(build, name).name
        monkeypatch.setattr(build, name, path)
    return tmp_path


@pytest.fixture
def library(monkeypatch, tmp_path):
    """A copy of the library that has not selected an instruction set yet."""
    if why := load.why_not():
        pytest.skip(why)
    path = shutil.copy(load.load().path, tmp_path / "copy.so")
    monkeypatch.setenv("ATTNLAB_NATIVE_LIBRARY", str(path))
    return ctypes.CDLL(str(path))


def again():
    """Loads again, as a new process would."""
    return load._load.__wrapped__()


def foreign(path, *lines):
    """Compiles a library from lines of C++."""
    try:
        compiler = build.find_compiler()
    except build.BuildError as error:
        pytest.skip(str(error))
    source = path.with_suffix(".cc")
    source.write_text("\n".join(f'extern "C" {line}' for line in lines))
    subprocess.run([*compiler, "-shared", "-fPIC", source, "-o", path], check=True)


def test_not_built(somewhere):
    command = "`python -m attnlab.build` builds it"
    assert again().reason == f"it was not built; {command}"
    build.NOTE.write_text("no C++ compiler was found\n")
    reason = again().reason
    assert reason == f"it was not built: no C++ compiler was found; {command}"


def test_stale(somewhere):
    foreign(build.LIBRARY, 'const char* attnlab_source_hash() { return "old"; }')
    assert again().reason == (
        "its sources changed since it was built; "
        "`python -m attnlab.build` builds it again"
    )
    build.NOTE.write_text("g++ failed: error\n")
    assert "(the last build failed: g++ failed: error)" in again().reason


def test_not_a_library(somewhere):
    build.LIBRARY.write_text("text")
    assert again().reason.startswith("it cannot be loaded: ")


def test_another_library(somewhere):
    foreign(build.LIBRARY, "int nothing() { return 0; }")
    reason = again().reason
    assert reason.startswith("it cannot be loaded: ")
    assert "attnlab_source_hash" in reason


def test_switched_off(monkeypatch, tmp_path):
    monkeypatch.setenv("ATTNLAB_NATIVE_LIBRARY", "")
    assert again().reason == "ATTNLAB_NATIVE_LIBRARY is empty: it is switched off"
    missing = tmp_path / "missing.so"
    monkeypatch.setenv("ATTNLAB_NATIVE_LIBRARY", str(missing))
    reason = again().reason
    assert reason == f"ATTNLAB_NATIVE_LIBRARY={missing}: there is no such file"


def test_an_unknown_instruction_set(library, monkeypatch):
    monkeypatch.setenv("ATTNLAB_NATIVE_ISA", "mmx")
    reason = again().reason
    assert reason.startswith("ATTNLAB_NATIVE_ISA=mmx: it was built for baseline")


@pytest.mark.skipif("avx2" not in build.ISAS, reason="there is only the baseline")
def test_an_instruction_set_that_the_processor_lacks(library, monkeypatch):
    lacking = [isa for isa in build.ISAS if isa not in load.load().isas]
    if not lacking:
        pytest.skip("this processor has all")
    monkeypatch.setenv("ATTNLAB_NATIVE_ISA", lacking[0])
    assert "this processor lacks it; it has baseline" in again().reason


@pytest.mark.parametrize("isa", build.ISAS)
def test_an_instruction_set_by_name(library, monkeypatch, isa):
    if isa not in load.load().isas:
        pytest.skip("this processor, or the compiler, lacks it")
    monkeypatch.setenv("ATTNLAB_NATIVE_ISA", isa)
    assert load._text(library, "isa") == isa


def test_the_highest_runs_unasked(library):
    assert load._text(library, "isa") == load.load().isas[-1]
    assert load.load().isas[0] == "baseline"
    assert load.load().compiler


def test_refused_handlers_are_no_error(library, monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("wrong version")

    monkeypatch.setattr(jax.ffi, "register_ffi_target", refuse)
    assert again().reason == "JAX refuses it: wrong version"


def test_it_is_loaded_once():
    with ThreadPoolExecutor(8) as pool:
        first, *others = pool.map(lambda _: load.load(), range(32))
    assert all(other is first for other in others)


def test_why_not_in_a_process_of_its_own(library, monkeypatch):
    monkeypatch.setenv("ATTNLAB_NATIVE_ISA", "mmx")
    script = (
        "from attnlab._src.implementations.native import load; print(load.why_not())"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("ATTNLAB_NATIVE_ISA=mmx: it was built for")
