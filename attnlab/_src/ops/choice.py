"""Which implementation runs, and why each other one does not."""

import jax
import jax.extend.backend

from attnlab._src.implementations import (
    IMPLEMENTATIONS,
    PRIORITIES,
    automatic,
)
from attnlab._src.types import AttentionInputs, Implementation

#: The platforms that a program may be lowered for.
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def default_platform() -> str:
    """The default backend, as lowering names it: "cuda" or "rocm", never "gpu"."""
    name = jax.default_backend()
    backends = jax.extend.backend.backends().items()
    return next(key for key, backend in backends if backend.platform == name)


def as_platform(platform: str | None) -> str:
    """A platform that lowering knows; for None, the default backend's.

    "gpu" is JAX's name for both "cuda" and "rocm": that of the default backend, if it
    is one of these, otherwise "cuda".

    Raises:
        ValueError: if lowering knows no such platform.
    """
    here = default_platform()
    if platform is None:
        return here
    if platform == "gpu":
        return here if here == "rocm" else "cuda"
    known = dict.fromkeys((*PLATFORMS, "gpu", here))
    if not isinstance(platform, str) or platform not in known:
        raise ValueError(
            f"platform: expected one of {', '.join(known)} or None, got {platform!r}"
        )
    return platform


def _program_reasons(
    implementation: Implementation,
    platform: str | None,
    exported: bool,
    shared: bool,
    divided: bool,
) -> tuple[str, ...]:
    """Why an implementation cannot run in such a program, whatever the inputs are."""
    only = implementation.platforms
    where: tuple[str, ...] = ()
    if only is not None and platform is not None and platform not in only:
        where = (f"it runs on {' and '.join(only)}, not on {platform}",)
    if exported and not implementation.exportable:
        where += ("an exported program cannot carry it",)
    if shared and not implementation.shares_program:
        where += ("a program for several platforms cannot hold it",)
    if divided and not implementation.partitionable:
        where += ("XLA cannot divide it among several devices; jax.shard_map can",)
    return where


def other_platforms(
    implementation: Implementation, platform: str | None
) -> tuple[str, ...]:
    """Why the automatic choice leaves out an implementation that runs here."""
    only = implementation.chosen_on
    if only is None or platform in only:
        return ()
    where = " and ".join(only)
    return (f"the automatic choice takes it only on {where}; it runs when asked for",)


def symbolic_sizes(inputs: AttentionInputs, letters: str = "BTS") -> dict[str, str]:
    """Sizes that are symbolic (``jax.export``), by the letter of their axis."""
    sizes = {letter: getattr(inputs.sizes, letter) for letter in letters}
    return {n: str(size) for n, size in sizes.items() if not isinstance(size, int)}


def _reasons(
    implementation: Implementation, inputs: AttentionInputs
) -> tuple[str, ...]:
    """Why an implementation cannot take the inputs."""
    unknown = symbolic_sizes(inputs)
    where = [f"{n} ({unknown[n]})" for n in unknown if n not in implementation.symbolic]
    if not where:
        return implementation.unsupported(inputs)
    verb = "are" if len(where) > 1 else "is"
    return (
        f"its plan needs sizes that are known, and {' and '.join(where)} {verb} "
        "symbolic; implementation='reference' needs no plan",
    )


def named(name: str) -> Implementation:
    """The implementation with a name.

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
    divided: bool = False,
) -> Implementation:
    """The implementation to run.

    Args:
        inputs: the canonical record; arrays may be shapes only.
        name: the implementation asked for; None: the automatic choice.
        platform: as lowering names it; None: not known yet, so not checked.
        exported: whether the program is to run elsewhere (``jax.export``).
        shared: whether it is one program for several platforms.
        divided: whether XLA divides the arrays among several devices by itself.

    Raises:
        ValueError: if there is no implementation of that name.
        NotImplementedError: if the one asked for cannot take the inputs; it names
            every reason. Or if a length is symbolic and none was asked for.
    """
    if name is None:
        # Stop at the first capable one: some must trace the user's functions to tell.
        for made in map(IMPLEMENTATIONS.__getitem__, automatic()):
            elsewhere = _program_reasons(made, platform, exported, shared, divided)
            elsewhere += other_platforms(made, platform)
            if not elsewhere and not _reasons(made, inputs):
                return made
        lengths = symbolic_sizes(inputs, "TS")
        unknown = " and ".join(f"{n} ({x})" for n, x in lengths.items())
        raise NotImplementedError(
            f"implementation: a plan needs known lengths, got symbolic {unknown}; "
            "give implementation='reference', which needs no plan but holds [T, S]"
        )
    made = named(name)
    # If it was asked for and cannot be exported, JAX raises the error.
    reasons = _program_reasons(made, platform, False, shared, divided)
    reasons += _reasons(made, inputs)
    if reasons:
        raise NotImplementedError(
            f"implementation={name!r} cannot take these inputs: " + "; ".join(reasons)
        )
    return made


def chosen_name(inputs: AttentionInputs, name: str | None) -> str | None:
    """The name of the implementation that would run here; None if none would.

    Args:
        inputs: the canonical record; arrays may be shapes only.
        name: the implementation asked for, whose platform is not checked; None: the
            automatic choice.
    """
    try:
        return choose(inputs, name, default_platform() if name is None else None).name
    except NotImplementedError:
        return None


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
        elif other in PRIORITIES:
            why = other_platforms(made, platform) or (f"{chosen!r} comes first",)
        else:
            why = (f"{made.why_not_automatic}; it runs only when asked for",)
        reasons = _program_reasons(made, platform, False, False, False) + _reasons(
            made, inputs
        )
        passed[other] = reasons or why
    return passed
