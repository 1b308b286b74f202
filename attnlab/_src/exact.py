"""Tests for exact classes and for inherited methods."""

from typing import TypeGuard, TypeVar

_T = TypeVar("_T")


def exactly(x: object, *kinds: type[_T]) -> TypeGuard[_T]:
    """Whether ``x`` is of one of these classes, and not of a subclass."""
    return type(x) in kinds


def inherits(x: object, base: type, *methods: str) -> bool:
    """Whether these methods of ``x`` are those of ``base``: nothing overrides them."""
    own = (getattr(getattr(x, name), "__func__", None) for name in methods)
    return all(f is getattr(base, name) for f, name in zip(own, methods, strict=True))
