"""Classes whose arrays are data and whose other fields are structure."""

import dataclasses
from collections.abc import Iterable
from typing import Any, TypeVar, dataclass_transform

import jax
from jax.tree_util import GetAttrKey

_T = TypeVar("_T")


def static(**kwargs: Any) -> Any:
    """A dataclass field that is structure: hashable, part of the compilation key."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field, static))
def pytree(cls: type[_T]) -> type[_T]:
    """Makes a class a frozen dataclass and a pytree; ``static()`` fields are structure.

    Example:
        >>> @pytree
        ... class Shift:
        ...     amount: float
        ...     name: str = static(default="shift")
        >>> jax.tree.leaves(Shift(amount=3.0))
        [3.0]
    """
    described = cls.__repr__ is not object.__repr__
    made: Any = dataclasses.dataclass(frozen=True, repr=not described)(cls)
    fields = dataclasses.fields(made)
    data = [f.name for f in fields if not f.metadata.get("static")]
    rest = [f.name for f in fields if f.metadata.get("static")]
    keys = [GetAttrKey(name) for name in data]

    def flatten(x: Any) -> tuple[list[Any], tuple[Any, ...]]:
        return [getattr(x, n) for n in data], tuple([getattr(x, n) for n in rest])

    def with_keys(x: Any) -> tuple[Any, tuple[Any, ...]]:
        children, structure = flatten(x)
        return list(zip(keys, children, strict=True)), structure

    def unflatten(structure: tuple[Any, ...], children: Iterable[Any]) -> Any:
        values = zip([*data, *rest], [*children, *structure], strict=True)
        return made(**dict(values))

    # Not register_dataclass: with it, jax 0.10 calls the structures of two classes
    # equal, and now and then runs what was compiled for the other one.
    jax.tree_util.register_pytree_with_keys(made, with_keys, unflatten, flatten)
    return made


def skeleton(tree: _T) -> _T:
    """The same tree, None for every leaf: hashable, the static half of an object."""
    return jax.tree.map(lambda _: None, tree)
