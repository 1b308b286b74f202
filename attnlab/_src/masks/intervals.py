"""Sets of block intervals: union, intersection, complement; of NumPy or JAX arrays."""

from types import ModuleType

import jax.numpy as jnp
import numpy as np

from attnlab._src.types import ArrayLike, Intervals

#: The greatest position; as the end of an interval of positions: no end.
FAR = 2**31 - 1


def namespace(*arrays: object) -> ModuleType:
    """NumPy where every array is NumPy's (or a number), else jax.numpy."""
    known = (np.ndarray, np.generic, int, float, bool)
    return np if all(isinstance(a, known) for a in arrays) else jnp


def numbers(count: int, rank: int) -> np.ndarray:
    """0 to ``count - 1`` along the last of ``rank`` axes, the others being 1."""
    return np.arange(count, dtype=np.int32).reshape((1,) * (rank - 1) + (count,))


def plus(x: ArrayLike, n: int) -> ArrayLike:
    """``x + n``, or ``FAR`` where that is beyond int32; n is at least 0."""
    return namespace(x).minimum(x, FAR - n) + n


def _shift(x: ArrayLike, fill: int, xp: ModuleType) -> ArrayLike:
    """Moves entries one to the right; the first becomes ``fill``."""
    first = xp.full(x.shape[:-1] + (1,), fill, x.dtype)
    return xp.concatenate([first, x[..., :-1]], -1)


def _concatenate(parts: list[ArrayLike], xp: ModuleType) -> ArrayLike:
    lead = jnp.broadcast_shapes(*(p.shape[:-1] for p in parts))
    return xp.concatenate(
        [xp.broadcast_to(p, lead + p.shape[-1:]) for p in parts], axis=-1
    )


def merge(x: Intervals) -> Intervals:
    """Sorts, joins intervals that overlap or touch, drops empty ones.

    NumPy arrays get shorter by that; JAX arrays keep empty intervals at the end.
    """
    lo, hi = x
    xp = namespace(lo, hi)
    m = lo.shape[-1]
    if m > 1:
        empty = hi <= lo
        # A run starts where all intervals before it have ended: where the i-th start
        # is beyond the (i - 1)-th end. So both may be sorted on their own.
        lo = xp.sort(xp.where(empty, FAR, lo), axis=-1)
        hi = xp.sort(xp.where(empty, FAR, hi), axis=-1)
        starts = lo > _shift(hi, -1, xp)
        ends = xp.concatenate(
            [starts[..., 1:], xp.ones(starts.shape[:-1] + (1,), bool)], -1
        )
        # Both sequences ascend, with one entry for each interval: sorting aligns them.
        lo, hi = xp.where(starts, lo, FAR), xp.where(ends, hi, FAR)
    return _packed(lo, hi)


def _packed(lo: ArrayLike, hi: ArrayLike) -> Intervals:
    """Intervals of ascending ends, without empty ones between others.

    NumPy arrays get shorter by that; JAX arrays keep empty intervals at the end.
    """
    xp, m = namespace(lo, hi), lo.shape[-1]
    if m > 1:
        lo, hi = xp.sort(lo, axis=-1), xp.sort(hi, axis=-1)
    if xp is np:
        most = int((hi > lo).sum(-1).max(initial=0))
        if m > 1:
            lo, hi = lo[..., :most], hi[..., :most]
        elif most == 0:
            lo, hi = lo[..., :0], hi[..., :0]
    return Intervals(lo, hi)


def union(a: Intervals, b: Intervals) -> Intervals:
    """Blocks in either."""
    if a.lo.shape[-1] == 0:
        return b
    if b.lo.shape[-1] == 0:
        return a
    xp = namespace(*a, *b)
    lo, hi = _concatenate([a.lo, b.lo], xp), _concatenate([a.hi, b.hi], xp)
    return merge(Intervals(lo, hi))


def complement(a: Intervals, count: int) -> Intervals:
    """Blocks of ``range(count)`` that are not in ``a``."""
    xp = namespace(*a)
    a = merge(a)
    if a.lo.shape[-1] == 1:
        empty = a.hi <= a.lo
        a = Intervals(xp.where(empty, count, a.lo), xp.where(empty, count, a.hi))
    edge = xp.zeros(a.lo.shape[:-1] + (1,), a.lo.dtype)
    lo = xp.concatenate([edge, xp.minimum(a.hi, count)], -1)
    hi = xp.concatenate([xp.minimum(a.lo, count), edge + count], -1)
    return Intervals(lo, hi)


def intersection(a: Intervals, b: Intervals, count: int) -> Intervals:
    """Blocks in both."""
    if a.lo.shape[-1] == 0:
        return a
    if b.lo.shape[-1] == 0:
        return b
    if a.lo.shape[-1] == 1 or b.lo.shape[-1] == 1:
        xp = namespace(*a, *b)
        return Intervals(xp.maximum(a.lo, b.lo), xp.minimum(a.hi, b.hi))
    return complement(union(complement(a, count), complement(b, count)), count)


def difference(a: Intervals, b: Intervals) -> Intervals:
    """Blocks of ``a`` that are not in ``b``, whose intervals do not overlap."""
    if b.lo.shape[-1] == 0:
        return merge(a)
    xp = namespace(*a, *b)
    empty = b.hi <= b.lo
    b = Intervals(xp.where(empty, FAR, b.lo), xp.where(empty, FAR, b.hi))
    whole = union(a, b)
    # ``b`` lies within the whole: what is left starts where the whole starts or an
    # interval of ``b`` ends, and ends where one starts or the whole ends.
    lo = xp.sort(_concatenate([whole.lo, b.hi], xp), axis=-1)
    hi = xp.sort(_concatenate([b.lo, whole.hi], xp), axis=-1)
    empty = hi <= lo
    found = _packed(xp.where(empty, FAR, lo), xp.where(empty, FAR, hi))
    most = a.lo.shape[-1] + b.lo.shape[-1]  # each of ``b`` leaves one more at most
    return Intervals(found.lo[..., :most], found.hi[..., :most])


def runs(flags: ArrayLike) -> Intervals:
    """The intervals in which a boolean array ``[..., count]`` is True."""
    xp = namespace(flags)
    count = flags.shape[-1]
    before = _shift(flags, False, xp)
    after = xp.concatenate(
        [flags[..., 1:], xp.zeros(flags.shape[:-1] + (1,), bool)], -1
    )
    index = numbers(count, flags.ndim)
    lo = xp.sort(xp.where(flags & ~before, index, FAR), axis=-1)
    hi = xp.sort(xp.where(flags & ~after, index + 1, FAR), axis=-1)
    return Intervals(lo[..., : (count + 1) // 2], hi[..., : (count + 1) // 2])


def hull(flags: ArrayLike) -> Intervals:
    """One interval from the first True to the last of ``[..., count]``."""
    xp = namespace(flags)
    count = flags.shape[-1]
    some = flags.any(-1)
    lo = xp.where(some, flags.argmax(-1), 0)
    hi = xp.where(some, count - xp.flip(flags, -1).argmax(-1), 0)
    return Intervals(lo[..., None].astype(np.int32), hi[..., None].astype(np.int32))


def first_run(flags: ArrayLike) -> Intervals:
    """The first run of True in ``[..., count]``: unlike a hull it holds no False."""
    xp = namespace(flags)
    count = flags.shape[-1]
    lo = xp.where(flags.any(-1), flags.argmax(-1), count).astype(np.int32)
    stops = ~flags & (numbers(count, flags.ndim) > lo[..., None])
    hi = xp.where(stops.any(-1), stops.argmax(-1), count)
    return Intervals(lo[..., None], hi[..., None].astype(np.int32))
