"""The live blocks of a row or a column of the plan, as loops of a kernel."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from attnlab._src.implementations.pallas_gpu.call import Ring
from attnlab._src.types import Array, Intervals, Live, PyTree

#: ``body(block, masked, state) -> state``.
Body = Callable[[Array, bool, PyTree], PyTree]


class Steps:
    """Loops over intervals of live blocks, which lie in global memory."""

    def __init__(self, live: Live):
        """Takes the live blocks of the rows, or of the columns, of a plan."""
        kinds = (live.full, False), (live.partial, True)
        self._kinds = [(_pairs(x), masked) for x, masked in kinds if x.lo.shape[-1]]

    @property
    def arrays(self) -> list[Array]:
        """The arrays that a kernel needs for them."""
        return [x for x, _ in self._kinds]

    def over(
        self,
        refs: Sequence[Any],
        at: tuple[Array, Array, Array],
        body: Body,
        state: PyTree,
    ) -> PyTree:
        """Runs ``body`` for each live block: full ones first, then partial ones.

        Args:
            refs: references to ``arrays``.
            at: example, head, and number of the row or column.
            body: ``masked`` says whether some pair of the block may be hidden.
            state: before the first block.
        """
        example, head, line = at
        for ref, (x, masked) in zip(refs, self._kinds, strict=True):
            own = example if x.shape[0] > 1 else 0, head if x.shape[1] > 1 else 0, line
            run = functools.partial(_interval, ref, own, body, masked)
            count = x.shape[3]
            if count == 1:
                state = run(jnp.int32(0), state)
            else:
                state = lax.fori_loop(jnp.int32(0), jnp.int32(count), run, state)
        return state

    def copy(
        self,
        refs: Sequence[Any],
        at: tuple[Array, Array, Array],
        ring: Ring,
        sources: Sequence[Any],
        number: Array,
    ) -> Array:
        """Copies the live blocks of some arrays ``[rows, columns]`` into a ring.

        Returns:
            ``number``, the count of blocks before, plus the count of these.
        """

        def step(block: Array, masked: bool, number: Array) -> Array:
            ring.fill(block, number, sources)
            return number + 1

        return self.over(refs, at, step, number)


def _interval(
    ref: Any, own: tuple, body: Body, masked: bool, i: Array, state: PyTree
) -> PyTree:
    """The blocks of one interval of a row or column."""
    first, stop = (ref[*own, i, end] for end in (0, 1))
    return lax.fori_loop(first, stop, lambda j, state: body(j, masked, state), state)


def _pairs(intervals: Intervals) -> Array:
    """``[Bp, Np, rows, m, 2]``: where an interval starts, and where it ends."""
    return jnp.stack([jnp.asarray(x, jnp.int32) for x in intervals], -1)
