"""Masks that carry data: arrays are pytree leaves, so new data never recompiles.

Lengths, documents and operands refer to slots of the arrays, not to positions.
"""

import functools
import inspect
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from attnlab._src import arguments
from attnlab._src.masks.base import Mask
from attnlab._src.masks.geometry import Blocks
from attnlab._src.masks.intervals import (
    FAR,
    first_run,
    hull,
    namespace,
    numbers,
)
from attnlab._src.masks.rule import Bounds
from attnlab._src.types import (
    Array,
    ArrayLike,
    Intervals,
    Operand,
    PyTree,
    Tile,
    pytree,
    static,
)


def _flags(blocks: Blocks, operand: ArrayLike, how: str, fill: bool) -> ArrayLike:
    """A boolean operand along one side, reduced by blocks: ``[Bp, Np, count]``."""
    other = 5 - blocks.axis
    return blocks.reduce(operand, blocks.axis, how, fill).squeeze(other)


@pytree
class Lengths(Mask):
    """The first slots of each sequence hold tokens, the rest is padding."""

    query: ArrayLike | None
    key: ArrayLike | None

    def operands(self, query_length: int, key_length: int) -> PyTree:
        """See :class:`Mask`."""
        result = []
        for given, length, axis in (
            (self.query, query_length, -2),
            (self.key, key_length, -1),
        ):
            if given is None:
                result.append(None)
                continue
            lengths = jnp.asarray(given)[..., None, None, None]
            shape = [1] * lengths.ndim
            shape[axis] = length
            slots = jnp.arange(length, dtype=jnp.int32).reshape(shape)
            result.append(Operand(slots < lengths))
        return tuple(result)

    def visible(self, tile: Tile, operands: PyTree) -> Array:
        """See :class:`Mask`."""
        given = [operand for operand in operands if operand is not None]
        return functools.reduce(jnp.logical_and, given, jnp.bool_(True))

    def bounds(self, rows: Blocks, cols: Blocks, operands: PyTree) -> Bounds:
        """See :class:`Mask`."""
        by_side = dict(zip(("query", "key"), operands, strict=True))
        own, other = by_side[rows.side], by_side[cols.side]
        some = every = np.ones((1, 1, rows.count), bool)
        if own is not None:
            some = _flags(rows, own, "any", False)
            every = _flags(rows, own, "all", True)
        possible, certain = cols.every(some), cols.every_complete(every)
        if other is not None:
            touched = hull(_flags(cols, other, "any", False))
            covered = first_run(_flags(cols, other, "all", False))
            possible = _clip(possible, touched)
            certain = _clip(certain, covered)
        return possible, certain

    def may_be_alive(self, side: str, operands: PyTree) -> Array | None:
        """See :class:`Mask`."""
        return operands[0] if side == "query" else operands[1]

    def __repr__(self) -> str:
        given = [
            f"{name}={arguments.describe(x)}"
            for name, x in (("query", self.query), ("key", self.key))
            if x is not None
        ]
        return f"lengths({', '.join(given)})"


def _clip(rows: Intervals, same: Intervals) -> Intervals:
    """Cuts the intervals of every row to one interval ``[Bp, Np, 1]``."""
    xp = namespace(*rows, *same)
    return Intervals(
        xp.maximum(rows.lo, same.lo[:, :, None, :]),
        xp.minimum(rows.hi, same.hi[:, :, None, :]),
    )


@pytree
class Documents(Mask):
    """Tokens attend within their own document; a negative id is padding."""

    query_ids: ArrayLike
    key_ids: ArrayLike | None

    def operands(self, query_length: int, key_length: int) -> PyTree:
        """See :class:`Mask`."""
        key_ids = self.query_ids if self.key_ids is None else self.key_ids
        for name, ids, length in (
            ("query_ids", self.query_ids, query_length),
            ("key_ids", key_ids, key_length),
        ):
            if ids.shape[-1] != length:
                raise ValueError(
                    f"documents({name}=): built for length {ids.shape[-1]}, used with "
                    f"length {length}; give one id for each slot"
                )
        return (
            Operand(self.query_ids[..., None, :, None]),
            Operand(key_ids[..., None, None, :]),
        )

    def visible(self, tile: Tile, operands: PyTree) -> Array:
        """See :class:`Mask`."""
        query_ids, key_ids = operands
        return (query_ids == key_ids) & (query_ids >= 0)

    def bounds(self, rows: Blocks, cols: Blocks, operands: PyTree) -> Bounds:
        """See :class:`Mask`."""
        by_side = dict(zip(("query", "key"), operands, strict=True))

        def spread(blocks: Blocks) -> tuple[ArrayLike, ArrayLike, ArrayLike]:
            ids = by_side[blocks.side]
            xp = namespace(ids)
            known = xp.where(ids < 0, FAR, ids)
            other = 5 - blocks.axis
            lo = blocks.reduce(known, blocks.axis, "min", FAR).squeeze(other)
            hi = blocks.reduce(ids, blocks.axis, "max", -1).squeeze(other)
            pure = blocks.reduce(ids >= 0, blocks.axis, "all", True).squeeze(other)
            return lo, hi, pure & (lo == hi)

        row_lo, row_hi, row_pure = (x[..., :, None] for x in spread(rows))
        col_lo, col_hi, col_pure = (x[..., None, :] for x in spread(cols))
        touched = (row_lo <= col_hi) & (col_lo <= row_hi)
        same = row_pure & col_pure & (row_lo == col_lo)
        same = same & (numbers(cols.count, same.ndim) < cols.length // cols.size)
        return hull(touched), first_run(same)

    @property
    def alive_sees_itself(self) -> bool:
        """See :class:`Mask`."""
        return self.key_ids is None

    def may_be_alive(self, side: str, operands: PyTree) -> Array | None:
        """See :class:`Mask`."""
        return (operands[0] if side == "query" else operands[1]) >= 0

    def __repr__(self) -> str:
        key = "" if self.key_ids is None else f", {arguments.describe(self.key_ids)}"
        return f"documents({arguments.describe(self.query_ids)}{key})"


@pytree
class Predicate(Mask):
    """A user's function as a mask."""

    arrays: tuple[ArrayLike, ...]
    fn: Callable[..., Array] = static()

    def operands(self, query_length: int, key_length: int) -> PyTree:
        """See :class:`Mask`."""
        return tuple(Operand(a) for a in self.arrays)

    def visible(self, tile: Tile, operands: PyTree) -> Array:
        """See :class:`Mask`."""
        return self.fn(tile.query_positions, tile.key_positions, *operands)

    def __repr__(self) -> str:
        name = getattr(self.fn, "__name__", repr(self.fn))
        return f"predicate({', '.join([name, *map(arguments.describe, self.arrays)])})"


def documents(query_ids: ArrayLike, key_ids: ArrayLike | None = None) -> Mask:
    """Several documents packed into one sequence: tokens attend within their own.

    Args:
        query_ids: ``[*batch, T]`` integers; negative = padding.
        key_ids: ``[*batch, S]`` integers; the query's if not given.

    Raises:
        TypeError: if ids are no integers.
        ValueError: if ids do not fit 32 bits, or are a scalar.

    Example:
        >>> print(documents(np.array([0, 0, 1, -1])).to_dense(4).astype(int)[0, 0])
        [[1 1 0 0]
         [1 1 0 0]
         [0 0 1 0]
         [0 0 0 0]]
    """
    if key_ids is None:
        (ids,) = document_ids(query_ids=query_ids)
        return Documents(ids, None)
    return Documents(*document_ids(query_ids=query_ids, key_ids=key_ids))


def document_ids(**named: ArrayLike) -> list[ArrayLike]:
    """Ids of documents as int32, negative = padding; the keywords name them in errors.

    Traced ids of a wider type are renumbered, all arrays together, so that ids that
    differ stay different.

    Raises:
        TypeError: if they are no integers.
        ValueError: if they are known here and do not fit 32 bits, or have no axis.
    """
    arrays = [arguments.as_array(ids) for ids in named.values()]
    for name, ids in zip(named, arrays, strict=True):
        arguments.check_integers(name, ids)
        if ids.ndim == 0:
            raise ValueError(f"{name}: expected [*batch, length], got one id: {ids}")
    if not any(_is_wide_tracer(ids) for ids in arrays):
        return [arguments.as_int32(ids) for ids in arrays]
    width = max(ids.dtype.itemsize for ids in arrays)
    flat = [jnp.asarray(ids).astype(f"uint{8 * width}").reshape(-1) for ids in arrays]
    flat = jnp.concatenate(flat)
    _, places = jnp.unique(flat, return_inverse=True, size=flat.size)
    ends = np.cumsum([ids.size for ids in arrays])[:-1]
    parts = jnp.split(places.astype(jnp.int32), ends)
    return [
        jnp.where(ids < 0, -1, part.reshape(ids.shape))
        for ids, part in zip(arrays, parts, strict=True)
    ]


def _is_wide_tracer(x: ArrayLike) -> bool:
    return isinstance(x, jax.core.Tracer) and arguments.is_wide(x.dtype)


def lengths(
    query: int | Sequence[int] | ArrayLike | None = None,
    key: int | Sequence[int] | ArrayLike | None = None,
) -> Mask:
    """The first ``query`` / ``key`` slots of each sequence are used; others are hidden.

    Args:
        query: how many query slots are used, integers ``[*batch]``; None: all.
        key: how many key slots are used, integers ``[*batch]``; None: all.

    Raises:
        ValueError: if neither is given.

    Example:
        >>> print(lengths(key=np.array([2])).to_dense(2, 3).astype(int)[0, 0])
        [[1 1 0]
         [1 1 0]]
    """
    if query is None and key is None:
        raise ValueError("lengths: give query=, key= or both; got neither")
    return Lengths(
        None if query is None else arguments.integers("query", query),
        None if key is None else arguments.integers("key", key),
    )


def predicate(fn: Callable[..., Array], *operands: ArrayLike) -> Mask:
    """A mask from your own function of query and key positions.

    Its hidden blocks are not skipped: alone it costs as much as no mask; combined by
    ``&`` with a structural mask, it is evaluated in that mask's live blocks only.

    Args:
        fn: ``fn(query_positions [q, 1], key_positions [1, k], *tiles) -> bool [q, k]``.
            It must read arrays through ``operands``, never by closure. It is compared
            by identity: define it once, or every call compiles again.
        operands: arrays that broadcast to ``[B, N, T, S]``; ``fn`` gets the tile of
            each, ``[q or 1, k or 1]``.

    Raises:
        TypeError: if ``fn`` does not take that many arguments, or an operand is no
            array of numbers.
        ValueError: if an operand holds integers that do not fit JAX's integer type.

    Example:
        >>> def even(t, s):
        ...     return (t + s) % 2 == 0
        >>> print(predicate(even).to_dense(2, 3).astype(int))
        [[1 0 1]
         [0 1 0]]
    """
    if not callable(fn):
        raise TypeError(
            f"fn: expected a function of query and key positions, got {fn!r}; "
            "for a boolean array use masks.dense"
        )
    arrays = tuple(map(arguments.as_array, operands))
    for place, array in enumerate(arrays):
        arguments.check_kept(f"operands[{place}]", array)
    _check_arity(fn, len(arrays))
    return Predicate(arrays, fn)


def _check_arity(fn: Callable[..., Array], count: int) -> None:
    try:
        signature = inspect.signature(fn)
    except ValueError:  # a builtin without a signature
        return
    try:
        signature.bind(*[None] * (2 + count))
    except TypeError as error:
        raise TypeError(
            f"fn: expected a function of query positions, key positions and the tiles "
            f"of {count} operands, got {getattr(fn, '__name__', fn)}{signature}"
        ) from error
