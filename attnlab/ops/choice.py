"""Which implementation runs, and why each other one does not."""

import jax
import jax.extend.backend

from attnlab.implementations import IMPLEMENTATIONS
from attnlab.types import AttentionInputs, Implementation

#: What the automatic choice may take, in order; the last takes everything, everywhere.
#: ``jax_nn`` holds ``[T, S]`` and ``reference`` too: they run only when asked for.
AUTOMATIC = ("native", "tiled")


def default_platform() -> str:
    """The default backend, as lowering names it: "cuda" or "rocm", never "gpu"."""
    name = jax.default_backend()
    backends = jax.extend.backend.backends().items()
    return next(key for key, backend in backends if backend.platform == name)


def _reasons(
    implementation: Implementation,
    inputs: AttentionInputs,
    platform: str | None,
    exported: bool,
) -> tuple[str, ...]:
    only = implementation.platforms
    where = ()
    if only is not None and platform is not None and platform not in only:
        where = (f"it runs on {' and '.join(only)}, not on {platform}",)
    if exported and not implementation.exportable:
        where += ("an exported program cannot carry it",)
    return (*where, *implementation.unsupported(inputs))


def choose(
    inputs: AttentionInputs,
    name: str | None,
    platform: str | None,
    exported: bool = False,
) -> tuple[Implementation, dict[str, tuple[str, ...]]]:
    """The implementation to run, and why each other one was passed over.

    Args:
        inputs: the canonical record; arrays may be shapes only.
        name: the implementation asked for; None: the automatic choice.
        platform: as lowering names it; None: not known yet, which excludes nobody.
        exported: whether the program is to run elsewhere (``jax.export``).

    Raises:
        ValueError: if there is no implementation of that name.
        NotImplementedError: if the one asked for cannot take the inputs; it names
            every reason.
    """
    if name is not None and name not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation: expected one of {', '.join(IMPLEMENTATIONS)} or None, "
            f"got {name!r}"
        )
    # JAX itself says what it thinks of exporting one that was asked for.
    exported = exported and name is None
    reasons = {
        n: _reasons(i, inputs, platform, exported) for n, i in IMPLEMENTATIONS.items()
    }
    if name is not None and reasons[name]:
        raise NotImplementedError(
            f"implementation={name!r} cannot take these inputs: "
            + "; ".join(reasons[name])
        )
    chosen = name
    if chosen is None:
        chosen = next(n for n in AUTOMATIC if not reasons[n])
    passed = {}
    for other in IMPLEMENTATIONS:
        if other == chosen:
            continue
        if name is not None:
            why = (f"{name!r} was asked for",)
        elif other in AUTOMATIC:
            why = (f"{chosen!r} comes first",)
        else:
            why = ("it holds [T, S] in memory; it runs only when asked for",)
        passed[other] = reasons[other] or why
    return IMPLEMENTATIONS[chosen], passed
