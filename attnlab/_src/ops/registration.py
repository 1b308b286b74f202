"""Registers implementations of users, and removes them, by name."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

from attnlab._src.exact import inherits
from attnlab._src.implementations import BUILT_IN, IMPLEMENTATIONS, PRIORITIES
from attnlab._src.ops.attention import compiled_attention
from attnlab._src.ops.primitive import compute
from attnlab._src.types import Implementation


def register(implementation: Implementation, *, priority: float | None = None) -> None:
    """Lets ``attention(..., implementation=name)`` find an implementation.

    A second one of the same name replaces the first. Programs that were compiled before
    keep the implementation that they were compiled with.

    Args:
        implementation: an instance; callers give its ``name``.
        priority: the automatic choice takes the capable implementation of the greatest
            priority. attnlab's own have 20 (``native``), 10 (``pallas_tpu``), 5
            (``batched``, on GPUs) and 0 (``tiled``). None: it runs only when asked for
            by name.

    Raises:
        TypeError: if it is no instance of :class:`attnlab.extend.Implementation`, lacks
            a method, or if the priority is no number.
        ValueError: if the name is empty or one of attnlab's own; or if a priority is
            given to a ``differentiable`` implementation: the automatic choice is made
            when a program is lowered, after JAX has differentiated it.

    Example:
        >>> from attnlab import extend
        >>> class Dense(extend.Implementation):
        ...     name = "dense"
        ...     differentiable = True
        ...
        ...     def forward(self, inputs): ...
        >>> extend.register(Dense())
        >>> extend.unregister("dense")
    """
    name = checked_name(implementation)
    if priority is not None:
        number = isinstance(priority, (int, float)) and not isinstance(priority, bool)
        if not number or not math.isfinite(priority):
            raise TypeError(f"priority: expected a number or None, got {priority!r}")
        if implementation.differentiable:
            raise ValueError(
                f"priority: {name!r} is differentiable by JAX: it runs only when asked "
                "for; give it a backward to let the automatic choice take it"
            )
    IMPLEMENTATIONS[name] = implementation
    PRIORITIES.pop(name, None)
    if priority is not None:
        PRIORITIES[name] = float(priority)
    _forget()


def checked_name(implementation: object) -> str:
    """The name of an implementation that is not attnlab's own.

    Raises:
        TypeError, ValueError: as :func:`register`.
    """
    kind = type(implementation).__name__
    if not isinstance(implementation, Implementation):
        hint = ""
        if isinstance(implementation, type):
            hint = f"; register an instance: {implementation.__name__}()"
        raise TypeError(
            "implementation: expected an attnlab.extend.Implementation, got "
            f"{kind}{hint}"
        )
    name = getattr(implementation, "name", None)
    if not isinstance(name, str) or not name:
        raise ValueError(f"implementation: {kind}.name must be a string, got {name!r}")
    if name in BUILT_IN:
        raise ValueError(
            f"implementation: {name!r} is attnlab's own; take another name"
        )
    needed = ["forward"] if implementation.differentiable else ["forward", "backward"]
    for method in needed:
        if inherits(implementation, Implementation, method):
            raise TypeError(f"implementation: {kind} has no {method} of its own")
    return name


@contextlib.contextmanager
def registered_for_now(implementation: Implementation) -> Iterator[None]:
    """Registers an implementation under its name for a while, in place of any other.

    Raises:
        TypeError, ValueError: as :func:`register`.
    """
    name = checked_name(implementation)
    before = IMPLEMENTATIONS.get(name)
    IMPLEMENTATIONS[name] = implementation
    _forget()
    try:
        yield
    finally:
        if before is None:
            del IMPLEMENTATIONS[name]
        else:
            IMPLEMENTATIONS[name] = before
        _forget()


def unregister(name: str) -> None:
    """Removes an implementation that was registered with :func:`register`.

    Raises:
        ValueError: if no implementation was registered under that name.
    """
    if name in BUILT_IN or name not in IMPLEMENTATIONS:
        raise ValueError(f"name: {name!r} was not registered")
    del IMPLEMENTATIONS[name]
    PRIORITIES.pop(name, None)
    _forget()


def _forget() -> None:
    """Clears caches: the next call is traced again and may choose another one."""
    jitted: tuple[Any, ...] = (compiled_attention, compute)
    for function in jitted:
        function.clear_cache()
