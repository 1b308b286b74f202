"""Which implementation runs, and why each other one does not."""

import jax
import jax.extend.backend

from attnlab.implementations import IMPLEMENTATIONS
from attnlab.types import AttentionInputs, Implementation

#: What the automatic choice may take, in order; the last takes everything, everywhere.
#: ``jax_nn`` holds ``[T, S]`` and ``reference`` too: they run only when asked for.
AUTOMATIC = ("native", "pallas_tpu", "tiled")
#: What a program may be lowered for.
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def default_platform() -> str:
    """The default backend, as lowering names it: "cuda" or "rocm", never "gpu"."""
    name = jax.default_backend()
    backends = jax.extend.backend.backends().items()
    return next(key for key, backend in backends if backend.platform == name)


def as_platform(platform: str | None) -> str:
    """The default backend's for None; else as it is.

    Raises:
        ValueError: if lowering knows no such platform.
    """
    here = default_platform()
    if platform is None:
        return here
    known = dict.fromkeys((*PLATFORMS, here))
    if not isinstance(platform, str) or platform not in known:
        raise ValueError(
            f"platform: expected one of {', '.join(known)} or None, got {platform!r}"
        )
    return platform


def _elsewhere(
    implementation: Implementation, platform: str | None, exported: bool, shared: bool
) -> tuple[str, ...]:
    """Why it cannot run in such a program, whatever the inputs are."""
    only = implementation.platforms
    where: tuple[str, ...] = ()
    if only is not None and platform is not None and platform not in only:
        where = (f"it runs on {' and '.join(only)}, not on {platform}",)
    if exported and not implementation.exportable:
        where += ("an exported program cannot carry it",)
    if shared and not implementation.shares_program:
        where += ("a program for several platforms cannot hold it",)
    return where


def named(name: str) -> Implementation:
    """The implementation of a name.

    Raises:
        ValueError: if there is none.
    """
    if not isinstance(name, str) or name not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation: expected one of {', '.join(IMPLEMENTATIONS)} or None, "
            f"got {name!r}"
        )
    return IMPLEMENTATIONS[name]


def choose(
    inputs: AttentionInputs,
    name: str | None,
    platform: str | None,
    exported: bool = False,
    shared: bool = False,
) -> Implementation:
    """The implementation to run.

    Args:
        inputs: the canonical record; arrays may be shapes only.
        name: the implementation asked for; None: the automatic choice.
        platform: as lowering names it; None: not known yet, which excludes nobody.
        exported: whether the program is to run elsewhere (``jax.export``).
        shared: whether it is one program for several platforms.

    Raises:
        ValueError: if there is no implementation of that name.
        NotImplementedError: if the one asked for cannot take the inputs; it names
            every reason.
    """
    if name is None:
        # Nobody behind the first that can is asked: some trace functions to answer.
        return next(
            made
            for made in map(IMPLEMENTATIONS.__getitem__, AUTOMATIC)
            if not _elsewhere(made, platform, exported, shared)
            and not made.unsupported(inputs)
        )
    made = named(name)
    # JAX itself says what it thinks of exporting one that was asked for.
    reasons = _elsewhere(made, platform, False, shared) + made.unsupported(inputs)
    if reasons:
        raise NotImplementedError(
            f"implementation={name!r} cannot take these inputs: " + "; ".join(reasons)
        )
    return made


def passed_over(
    inputs: AttentionInputs, name: str | None, platform: str | None
) -> dict[str, tuple[str, ...]]:
    """Why each implementation but the one that ``choose`` takes does not run."""
    chosen = choose(inputs, name, platform).name
    passed = {}
    for other, made in IMPLEMENTATIONS.items():
        if other == chosen:
            continue
        if name is not None:
            why = (f"{name!r} was asked for",)
        elif other in AUTOMATIC:
            why = (f"{chosen!r} comes first",)
        else:
            why = ("it holds [T, S] in memory; it runs only when asked for",)
        reasons = _elsewhere(made, platform, False, False) + made.unsupported(inputs)
        passed[other] = reasons or why
    return passed
