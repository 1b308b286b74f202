"""The build: finding compilers, notes of failures, stale libraries."""

import os
import subprocess
import sys

import pytest


def run(command):
    return subprocess.run(command, capture_output=True, text=True, check=False)


def without_compiler(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", os.devnull)


def test_it_builds_every_instruction_set_that_the_compiler_takes(build, compiler):
    isas = build.build()
    assert isas == tuple(isa for isa in build.ISAS if isa != "avx512bf16")
    assert build.LIBRARY.stat().st_mode & 0o111
    linked = build.LIBRARY.read_text().split()  # the command that linked it
    objects = [word.rsplit("/", 1)[1] for word in linked if word.endswith(".o")]
    assert objects == ["handlers.o", *(f"{isa}.o" for isa in isas)]  # lowest first


def test_no_compiler_leaves_a_note(build, monkeypatch):
    without_compiler(monkeypatch)
    assert build.build_or_note() == "no C++ compiler was found"
    assert build.NOTE.read_text() == "no C++ compiler was found\n"
    assert not build.LIBRARY.exists()


def test_a_compiler_that_is_asked_for_must_be_there(build, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -O3")
    with pytest.raises(build.BuildError, match="no compiler 'no-such-compiler -O3'"):
        build.find_compiler()
    assert build.find_compiler(f"{sys.executable} -x") == [sys.executable, "-x"]


def test_a_failure_keeps_its_reason_and_the_old_library(build, compiler, monkeypatch):
    build.LIBRARY.write_text("old")
    monkeypatch.setenv("BROKEN", "1")
    before = sorted(build.HERE.iterdir())
    reason = build.build_or_note()
    assert "kernel.cc:3:1: error: expected ';'" in reason
    assert "In function" not in reason
    assert build.NOTE.read_text() == f"{reason}\n"
    assert build.LIBRARY.read_text() == "old"
    assert sorted(build.HERE.iterdir()) == sorted([*before, build.NOTE])

    monkeypatch.delenv("BROKEN")
    assert build.build_or_note() is None
    assert build.LIBRARY.read_text() != "old"
    assert not build.NOTE.exists()


def test_a_library_of_the_same_sources_is_kept(build, monkeypatch):
    without_compiler(monkeypatch)
    kept = f"library {build.source_hash()}"
    build.LIBRARY.write_text(kept)
    assert build.build_or_note() is None
    assert build.LIBRARY.read_text() == kept
    assert not build.NOTE.exists()


def test_the_hash_is_that_of_the_sources(build):
    first = build.source_hash()
    (build.SOURCES / "include" / "xla" / "README.md").write_text("other")
    assert build.source_hash() == first
    kernel = build.SOURCES / "kernel.cc"
    kernel.write_text(kernel.read_text() + "\n")
    assert build.source_hash() != first


@pytest.mark.parametrize("out", [None, "other.so"])
def test_the_command(build, compiler, tmp_path, monkeypatch, out):
    target = build.LIBRARY if out is None else tmp_path / out
    build.NOTE.write_text("the note of a build that failed")
    # Run by its path, because it needs neither attnlab nor jax.
    command = [sys.executable, "-S", build.HERE / "build.py", "--sanitize", "thread"]
    command += [] if out is None else ["--out", target]
    done = run(command)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{target}: baseline")
    assert "-fsanitize=thread" in target.read_text()
    assert build.NOTE.exists() == (out is not None)

    without_compiler(monkeypatch)
    done = run(command)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "not built: no C++ compiler was found\n"
    assert "-fsanitize=thread" in target.read_text()
