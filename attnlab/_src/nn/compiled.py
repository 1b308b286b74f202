"""Compiles a search once for a module, with the module's weights as arguments."""

import functools
from collections.abc import Callable, Hashable
from types import MethodType
from typing import Any

import jax
from flax import nnx
from flax.errors import TraceContextError

from attnlab._src.types import PyTree


def compile_once(
    search: Callable[..., Any],
    step: Callable[..., Any],
    *data: PyTree,
    **static: Hashable,
) -> Any:
    """``search(step, *data, **static)``, compiled once per shape if step is a module's.

    If the step is a module, or a bound method of one, the module's structure is part of
    the key of the compiled program, and its arrays are arguments. Any other function is
    traced in every call, because values that it reads may have changed.

    Args:
        search: a module-level function; it is part of the key, too.
        step: passed to ``search``.
        *data: arrays, arguments of the compiled program.
        **static: hashable values that the program depends on.

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
            "step: expected one that does not change its module, got one that does, as "
            "dropout does; call model.eval() first"
        ) from error


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _run(
    search: Callable[..., Any],
    method: Callable[..., Any],
    graph: nnx.GraphDef,
    static: tuple[tuple[str, Hashable], ...],
    arrays: PyTree,
    data: tuple[PyTree, ...],
) -> Any:
    step = functools.partial(method, nnx.merge(graph, arrays))
    return search(step, *data, **dict(static))


def _hashable(key: object) -> bool:
    try:
        hash(key)
    except TypeError:
        return False
    return True
