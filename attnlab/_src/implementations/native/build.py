"""Builds the native library: ``python -m attnlab.build``.

It needs a C++17 compiler and nothing else. It runs while attnlab is installed, so it
imports neither attnlab nor jax.
"""

import argparse
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = HERE / "src"
COMMAND = "python -m attnlab.build"
COMPILERS = ("g++", "clang++", "c++")

#: The library and, if the last build failed, a note with the reason; both lie beside
#: this file.
LIBRARY = HERE / f"_native.{'dylib' if sys.platform == 'darwin' else 'so'}"
NOTE = LIBRARY.with_suffix(".txt")

Flags = tuple[str, ...]

_AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mbmi2")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
_X86: dict[str, Flags] = {
    "baseline": (),
    "avx2": _AVX2,
    "avx512": _AVX512,
    "avx512bf16": (*_AVX512, "-mavx512bf16"),
}
#: Compiler flags of each instruction set, the lowest first. Objects are linked in this
#: order, so that of an inline function in several the linker keeps the lowest version.
ISAS = _X86 if platform.machine().lower() in ("x86_64", "amd64") else {"baseline": ()}
#: Exported symbols; templates of the C++ standard library stay local.
_EXPORTS = "{ global: Attnlab*; attnlab_*; local: *; };"
#: Without -ffast-math, because NaN and inf must be handled.
FLAGS = (
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
    "-isysteminclude",  # xla/
)


class BuildError(Exception):
    """The library cannot be built; the message says why."""


def source_hash() -> str:
    """Hash of sources and flags, which the library contains; a stale one differs."""
    digest = hashlib.sha256(repr((ISAS, FLAGS)).encode())
    for path in sorted(p for p in SOURCES.rglob("*") if p.suffix in (".cc", ".h")):
        digest.update(path.relative_to(SOURCES).as_posix().encode() + b"\0")
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def find_compiler(command: str | None = None) -> list[str]:
    """``command``, ``$CXX``, or the first compiler on the path, as arguments.

    Raises:
        BuildError: if there is none.
    """
    command = command or os.environ.get("CXX")
    for candidate in (command,) if command else COMPILERS:
        arguments = shlex.split(candidate)
        if shutil.which(arguments[0]):
            return arguments
    if command:
        raise BuildError(f"there is no compiler {command!r}")
    raise BuildError("no C++ compiler was found")


def build(
    out: Path = LIBRARY, compiler: str | None = None, sanitize: str = ""
) -> tuple[str, ...]:
    """Compiles every instruction set and links the library.

    Args:
        out: path of the library; an existing file is replaced once the new one is
            complete.
        compiler: a command; see :func:`find_compiler`.
        sanitize: value of ``-fsanitize``: ``"address,undefined"`` or ``"thread"``.

    Returns:
        The instruction sets in the library, the lowest first.

    Raises:
        BuildError: if it cannot be built.
    """
    if sys.platform not in ("linux", "darwin"):
        raise BuildError("it is built on Linux and macOS only")
    command = find_compiler(compiler)
    mode = ["-O3", "-DNDEBUG"]
    if sanitize:
        mode = ["-O1", "-g", "-fno-omit-frame-pointer", f"-fsanitize={sanitize}"]
        mode.append("-fno-sanitize-recover=all")
    with (
        tempfile.TemporaryDirectory() as folder,
        ThreadPoolExecutor(_cores()) as pool,
    ):
        accepted = pool.map(lambda isa: _accepts(command, ISAS[isa], folder), ISAS)
        isas = tuple(isa for isa, yes in zip(ISAS, accepted, strict=True) if yes)
        if "baseline" not in isas:
            _run([*command, "-c", _empty(folder), "-o", f"{folder}/empty.o"])
        common = [*command, *mode, *FLAGS]
        common.append(f"-DATTNLAB_ISAS(X)={' '.join(f'X({isa})' for isa in isas)}")
        objects = [f"{folder}/{name}.o" for name in ("handlers", *isas)]
        # The highest instruction sets take longest, so they are compiled first.
        steps = [
            [*common, *ISAS[isa], f"-DATTNLAB_ISA={isa}", "-c", "kernel.cc", "-o", o]
            for isa, o in reversed([*zip(isas, objects[1:], strict=True)])
        ]
        hash_flag = f'-DATTNLAB_SOURCE_HASH="{source_hash()}"'
        steps.append([*common, hash_flag, "-c", "handlers.cc", "-o", objects[0]])
        list(pool.map(_run, steps))
        out = out.absolute()
        handle, linked = tempfile.mkstemp(dir=out.parent, suffix=out.suffix)
        os.close(handle)
        try:
            _run(
                [*command, *mode, "-shared", *_link(folder, sanitize), *objects]
                + ["-o", linked]
            )
            os.chmod(linked, 0o755)
            os.replace(linked, out)
        finally:
            Path(linked).unlink(missing_ok=True)
    return isas


def build_or_note(folder: Path = HERE) -> str | None:
    """Builds the library in a folder; if that fails, writes a note there.

    A library of the same sources and flags is kept: installing attnlab into a second
    environment, which takes the sources where they are, takes seconds.

    Returns:
        The reason of the failure, or None.
    """
    note, library = folder / NOTE.name, folder / LIBRARY.name
    try:
        if not (library.exists() and source_hash().encode() in library.read_bytes()):
            build(library)
    except (BuildError, OSError) as error:
        note.write_text(f"{error}\n")
        return str(error)
    note.unlink(missing_ok=True)
    return None


def main() -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog=COMMAND, description="Builds the library.")
    parser.add_argument(
        "--compiler", help="a command; default: $CXX, g++, clang++, c++"
    )
    parser.add_argument("--sanitize", default="", metavar="address,undefined")
    parser.add_argument("--out", type=Path, default=LIBRARY, metavar="FILE")
    options = parser.parse_args()
    start = time.perf_counter()
    try:
        isas = build(options.out, options.compiler, options.sanitize)
    except BuildError as error:
        sys.stderr.write(f"not built: {error}\n")
        return 1
    if options.out == LIBRARY:
        NOTE.unlink(missing_ok=True)
    sys.stdout.write(
        f"{options.out}: {', '.join(isas)}; {options.out.stat().st_size / 1e6:.2f} MB "
        f"in {time.perf_counter() - start:.0f} s\n"
    )
    return 0


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _link(folder: str, sanitize: str) -> list[str]:
    if sys.platform == "darwin":
        return [] if sanitize else ["-Wl,-x"]
    exports = Path(folder, "exports.map")
    exports.write_text(_EXPORTS)
    return [f"-Wl,--version-script={exports}", *([] if sanitize else ["-s"])]


def _empty(folder: str) -> str:
    path = Path(folder, "empty.cc")
    path.touch()
    return str(path)


def _accepts(command: list[str], flags: Flags, folder: str) -> bool:
    probe = [*command, "-std=c++17", *flags, "-fsyntax-only", _empty(folder)]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


def _run(arguments: list[str]) -> None:
    done = subprocess.run(
        arguments, cwd=SOURCES, capture_output=True, text=True, check=False
    )
    if done.returncode:
        lines = (done.stderr + done.stdout).splitlines()
        errors = [x for x in lines if "error" in x.lower()] or lines
        raise BuildError(
            f"{arguments[0]} failed: {' | '.join(errors[:3]) or done.returncode}"[:600]
        )
    sys.stderr.write(done.stderr)  # warnings


if __name__ == "__main__":
    sys.exit(main())
