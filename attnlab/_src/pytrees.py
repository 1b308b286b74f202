"""Classes whose arrays are data and whose other fields are structure."""

import dataclasses
import functools
import importlib
import pickle
import types
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, dataclass_transform

import jax
import numpy as np
from jax.tree_util import GetAttrKey

_T = TypeVar("_T")


def static(**kwargs: Any) -> Any:
    """A dataclass field that is structure: hashable, part of the compilation key."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field, static))
def pytree(cls: type[_T]) -> type[_T]:
    """Makes a class a frozen dataclass and a pytree; ``static()`` fields are structure.

    Two instances are equal if they are of one class, hold the same array objects (the
    numbers in them are not compared), and their other fields are equal; ``hash`` agrees
    with that. A class may define ``__eq__`` itself.

    Example:
        >>> @pytree
        ... class Shift:
        ...     amount: float
        ...     name: str = static(default="shift")
        >>> jax.tree.leaves(Shift(amount=3.0))
        [3.0]
    """
    described = cls.__repr__ is not object.__repr__
    compared = "__eq__" in vars(cls)
    made: Any = dataclasses.dataclass(frozen=True, repr=not described, eq=compared)(cls)
    if not compared:
        made.__eq__, made.__hash__ = _equal, _hash
    fields = dataclasses.fields(made)
    data = [f.name for f in fields if not f.metadata.get("static")]
    rest = [f.name for f in fields if f.metadata.get("static")]
    keys = [GetAttrKey(name) for name in data]

    def flatten(x: Any) -> tuple[list[Any], tuple[Any, ...]]:
        structure = tuple([by_name(getattr(x, n)) for n in rest])
        return [getattr(x, n) for n in data], structure

    def with_keys(x: Any) -> tuple[Any, tuple[Any, ...]]:
        children, structure = flatten(x)
        return list(zip(keys, children, strict=True)), structure

    def unflatten(structure: tuple[Any, ...], children: Iterable[Any]) -> Any:
        values = zip([*data, *rest], [*children, *structure], strict=True)
        return _remade(made, dict(values))

    if made.__reduce__ is object.__reduce__:
        made.__reduce__ = _reduce
    # Not register_dataclass: with it, jax 0.10 takes the structures of two classes for
    # equal, and may run what was compiled for the other class.
    jax.tree_util.register_pytree_with_keys(made, with_keys, unflatten, flatten)
    return made


def _equal(x: Any, other: object) -> bool:
    return (
        _identity(x) == _identity(other) if type(x) is type(other) else NotImplemented
    )


def _hash(x: Any) -> int:
    return hash((type(x), _identity(x)))


def _identity(x: Any) -> tuple[object, ...]:
    """What makes an instance equal to another one of its class."""
    return tuple([_known(getattr(x, f.name)) for f in dataclasses.fields(x)])


def _known(x: object) -> object:
    """A value that can be compared and hashed: for an array, its type and id."""
    if isinstance(x, (np.ndarray, jax.Array)) or hasattr(x, "__jax_array__"):
        return type(x), id(x)
    if isinstance(x, dict):
        return frozenset((key, _known(value)) for key, value in x.items())
    return tuple(map(_known, x)) if isinstance(x, (tuple, list)) else x


def _reduce(x: Any) -> tuple[Any, ...]:
    """How an instance is copied and pickled: by its fields."""
    values = {f.name: by_name(getattr(x, f.name)) for f in dataclasses.fields(x)}
    return _remade, (type(x), values)


def _remade(cls: type[_T], values: dict[str, Any]) -> _T:
    return cls(**{name: itself(value) for name, value in values.items()})


def by_name(x: Any) -> Any:
    """A function object in a wrapper for copies and pickles; anything else as it is.

    JAX's functions, ``jax.nn.relu`` for instance, are objects: a copy of one does not
    equal the original, and pickle refuses them.
    """
    if isinstance(x, functools.partial):
        return _ByName(x)
    is_plain = isinstance(x, (type, types.FunctionType, types.BuiltinFunctionType))
    named = isinstance(getattr(x, "__qualname__", None), str)
    return _ByName(x) if callable(x) and named and not is_plain else x


def itself(x: Any) -> Any:
    """What :func:`by_name` was given."""
    return x.function if isinstance(x, _ByName) else x


class _ByName:
    """A function that copies share, and that pickles refer to by name."""

    def __init__(self, function: Callable[..., Any]):
        self.function = function

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ByName) and self.function == other.function

    def __hash__(self) -> int:
        return hash(self.function)

    def __repr__(self) -> str:
        return repr(self.function)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_ByName":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        function: Any = self.function
        if isinstance(function, functools.partial):
            return _partial, (by_name(function.func), function.args, function.keywords)
        name = function.__qualname__
        # Its public name, if it has one: a private one may change.
        for module in ("jax.nn", "jax.numpy", function.__module__):
            if getattr(importlib.import_module(module), name, None) is function:
                return _found, (module, name)
        raise pickle.PicklingError(
            f"{function!r} cannot be pickled: {function.__module__}.{name} is not that "
            "function; use one that its module defines under its own name"
        )


def _found(module: str, name: str) -> _ByName:
    return _ByName(getattr(importlib.import_module(module), name))


def _partial(function: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> _ByName:
    return _ByName(functools.partial(itself(function), *args, **keywords))


def skeleton(tree: _T) -> _T:
    """The tree with None for every leaf: hashable, the structure of an object."""
    return jax.tree.map(lambda _: None, tree)
