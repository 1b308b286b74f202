"""Searches that are compiled once for a module, whatever its weights are by then."""

import functools
from collections.abc import Callable, Hashable
from types import MethodType
from typing import Any

import jax
from flax import nnx
from flax.errors import TraceContextError


def compile_once(
    search: Callable[..., Any], step: Callable[..., Any], *data: Any, **static: Hashable
) -> Any:
    """``search(step, *data, **static)``; a module's own step is compiled once a shape.

    Of a module, or a bound method of one, the structure is part of the key under which
    the program is kept, and the arrays are data. What any other function reads may have
    changed since the last call: it is traced in every call.

    Args:
        search: a function defined once.
        step: what it searches with.
        *data: arrays.
        **static: what the program depends on.

    Raises:
        ValueError: if the step changes its module.
    """
    step = step.__call__ if isinstance(step, nnx.Module) else step
    try:
        if not isinstance(step, MethodType) or not isinstance(
            step.__self__, nnx.Module
        ):
            return search(step, *data, **static)
        graph, arrays = nnx.split(step.__self__)
        key = (search, step.__func__, graph, tuple(static.items()))
        if not _hashable(key):
            return search(step, *data, **static)
        return _run(*key, arrays, data)
    except TraceContextError as error:
        raise ValueError(
            "step: expected one that leaves its module as it is, got one that changes "
            "it, as dropout does; model.eval() would do"
        ) from error


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _run(
    search: Callable[..., Any],
    method: Callable[..., Any],
    graph: Any,
    static: tuple[tuple[str, Hashable], ...],
    arrays: Any,
    data: tuple[Any, ...],
) -> Any:
    step = functools.partial(method, nnx.merge(graph, arrays))
    return search(step, *data, **dict(static))


def _hashable(key: Any) -> bool:
    try:
        hash(key)
    except TypeError:
        return False
    return True
