"""Loads the native library and registers its handlers with XLA, once, on first use."""

import contextlib
import ctypes
import functools
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax

#: The names of the handlers, for ``jax.ffi.ffi_call``.
FORWARD = "attnlab_forward"
BACKWARD = "attnlab_backward"
CHOOSE = "attnlab_choose"

_SYMBOLS = {
    FORWARD: "AttnlabForward",
    BACKWARD: "AttnlabBackward",
    CHOOSE: "AttnlabChoose",
}
_LOCK = threading.Lock()


class Native(NamedTuple):
    """The loaded library, or why there is none.

    Attributes:
        reason: why the library cannot be used, or None if it can.
        path: path of the library.
        isa: the instruction set in use.
        isas: all instruction sets that are built and that this processor has, the
            lowest first.
        compiler: the compiler that built it.
    """

    reason: str | None
    path: Path | None = None
    isa: str = ""
    isas: tuple[str, ...] = ()
    compiler: str = ""


def why_not() -> str | None:
    """Why the native library cannot be used here, or None if it can."""
    return load().reason


def load() -> Native:
    """Loads the library and registers its handlers; later calls return the same result.

    It reads two environment variables: ``ATTNLAB_NATIVE_LIBRARY`` is the path of
    another library, or empty to use none. ``ATTNLAB_NATIVE_ISA`` is the instruction set
    to use: ``baseline``, ``avx2``, ``avx512`` or ``avx512bf16``.
    """
    with _LOCK:
        return _load()


@contextlib.contextmanager
def instructions(isa: str) -> Iterator[None]:
    """A context in which every call of this process uses that instruction set.

    Raises:
        ValueError: if this processor or this build does not have it.
    """
    path = load().path
    if path is None or isa not in load().isas:
        raise ValueError(f"isa: expected one of {load().isas}, got {isa!r}")
    use = ctypes.CDLL(str(path)).attnlab_use
    use(isa.encode())
    try:
        yield
    finally:
        use(b"")


@functools.cache
def _load() -> Native:
    # Imported here, so that `python -m ...build` is the first to import that module.
    from attnlab._src.implementations.native import build

    path = build.LIBRARY
    named = os.environ.get("ATTNLAB_NATIVE_LIBRARY")
    if named is not None:
        path = Path(named).absolute()
        if not named:
            return Native("ATTNLAB_NATIVE_LIBRARY is empty: it is switched off")
        if not path.is_file():
            return Native(f"ATTNLAB_NATIVE_LIBRARY={named}: there is no such file")
    note = build.NOTE.read_text().strip() if build.NOTE.is_file() else ""
    if not path.is_file():
        why = f": {note}" if note else ""
        return Native(f"it was not built{why}; `{build.COMMAND}` builds it")
    again = f"; `{build.COMMAND}` builds it again"
    try:
        library = ctypes.CDLL(str(path))
        if _text(library, "source_hash") != build.source_hash():
            failed = f" (the last build failed: {note})" if note else ""
            return Native(f"its sources changed since it was built{failed}{again}")
        isa, isas, refusal, compiler = (
            _text(library, name) for name in ("isa", "isas", "refusal", "compiler")
        )
        handlers = {name: getattr(library, _SYMBOLS[name]) for name in _SYMBOLS}
    except (OSError, AttributeError) as error:
        return Native(f"it cannot be loaded: {error}{again}")
    if refusal:
        return Native(refusal)
    try:
        # Creates the backend first. Without one, JAX would register the handlers when
        # it is created, and a refused handler (if XLA's headers are newer than the
        # runtime) would make that fail.
        jax.local_devices(backend="cpu")
        for name, handler in handlers.items():
            capsule = jax.ffi.pycapsule(handler)
            jax.ffi.register_ffi_target(name, capsule, platform="cpu")
    except Exception as error:  # XLA's own, of several kinds
        return Native(f"JAX refuses it: {error}")
    return Native(None, path, isa, tuple(isas.split(",")), compiler)


def _text(library: ctypes.CDLL, name: str) -> str:
    function = library[f"attnlab_{name}"]
    function.restype = ctypes.c_char_p
    return function().decode()
