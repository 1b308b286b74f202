"""Gradients of arrays that many pairs share: score parameters, modifier operands."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from attnlab._src.implementations.pallas_tpu.logits import Part
from attnlab._src.implementations.pallas_tpu.steps import Step
from attnlab._src.implementations.schedule import Tiles
from attnlab._src.types import Array


class Window(NamedTuple):
    """How a kernel sums and writes one gradient.

    Attributes:
        shape: shape of the array that the kernel writes.
        spec: its block specification.
        scratch: scratch memory for the sum, if it is not summed in the block itself.
        zeroed: whether the array must be zero where the kernel writes nothing.
        clear: ``clear(step, begins, window, *scratch)``: sets sums to zero if a new one
            starts at this step.
        add: ``add(step, part, gradient [keys, queries], window, *scratch)``.
        close: ``close(step, window, *scratch)``: called at the end of a step.
        finish: maps the array to ``[B, N, T or 1, S or 1]``.
    """

    shape: tuple[int, ...]
    spec: pl.BlockSpec
    scratch: tuple[pl.MemoryRef, ...]
    zeroed: bool
    clear: Callable[..., None]
    add: Callable[..., None]
    close: Callable[..., None]
    finish: Callable[[Array], Array]


class Layout(NamedTuple):
    """Sizes and indices that the windows of a backward pass need.

    Attributes:
        tiles: tiles of the inputs, with the kernel's block sizes.
        step: ``step(*index) -> (example, key head, Step)``.
        group: number of query heads that share a key head.
        segments: number of segments of queries.
        segment: number of blocks of queries in a segment.
        lanes: number of queries whose sums are stored in separate lanes.
    """

    tiles: Tiles
    step: Callable[..., tuple[int | Array, int | Array, Step]]
    group: int
    segments: int
    segment: int
    lanes: int

    def rows(self, step: Step) -> Any:
        """The slice of a step's queries within their segment."""
        size = self.tiles.bq
        start: Any = (step.inner - step.segment * self.segment) * size
        return pl.ds(pl.multiple_of(start, size), size)


def nothing(*_: object) -> None:
    """Does nothing: for windows without ``add`` or ``close``."""


def _eighths(x: Array) -> Array:
    """``[keys, queries] -> [8, queries]``: a partial sum without sublane shuffles."""
    return x.reshape(x.shape[0] // 8, 8, x.shape[1]).sum(0)


def _heads(x: Array) -> Array:
    """``[B, K, G, ...] -> [B, N, ...]``."""
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def window(x: Array, layout: Layout) -> Window:
    """The window for the gradient of ``x [B or 1, N or 1, T or 1, S or 1]``."""
    runs = x.shape[2] > 1, x.shape[3] > 1
    makers = {
        (False, False): _of_heads,
        (True, False): _of_queries,
        (False, True): _of_keys,
        (True, True): _of_pairs,
    }
    return makers[runs](layout)


def _of_heads(layout: Layout) -> Window:
    s, group, size = layout.tiles.inputs.sizes, layout.group, layout.tiles.bq

    def index(*index: Any) -> tuple[int | Array, ...]:
        example, head, _ = layout.step(*index)
        return example, head, 0, 0, 0

    def clear(step: Step, begins: bool | Array, ref: Any) -> None:
        pl.when(begins)(lambda: ref.__setitem__(..., jnp.zeros_like(ref)))

    def add(step: Step, part: Part, d: Array, ref: Any) -> None:
        ref[step.member] += _eighths(d)

    return Window(
        (s.B, s.K, group, 8, size),
        pl.BlockSpec((None, None, group, 8, size), index),
        (),
        False,
        clear,
        add,
        nothing,
        lambda x: _heads(x.sum((-2, -1)))[..., None, None],
    )


def _of_queries(layout: Layout) -> Window:
    s, group = layout.tiles.inputs.sizes, layout.group
    size = layout.segment * layout.tiles.bq

    def index(*index: Any) -> tuple[int | Array, ...]:
        example, head, step = layout.step(*index)
        return example, head, step.segment, 0, 0, 0

    def clear(step: Step, begins: bool | Array, ref: Any) -> None:
        pl.when(step.fresh)(lambda: ref.__setitem__(..., jnp.zeros_like(ref)))

    def add(step: Step, part: Part, d: Array, ref: Any) -> None:
        ref[step.member, :, layout.rows(step)] += _eighths(d)

    def finish(x: Array) -> Array:
        x = _heads(x.sum(-2).swapaxes(2, 3))
        return x.reshape(s.B, s.N, -1, 1)[:, :, : s.T]

    return Window(
        (s.B, s.K, layout.segments, group, 8, size),
        pl.BlockSpec((None, None, None, group, 8, size), index),
        (),
        False,
        clear,
        add,
        nothing,
        finish,
    )


def _of_keys(layout: Layout) -> Window:
    s, group = layout.tiles.inputs.sizes, layout.group
    size, lanes = layout.tiles.bk, layout.lanes

    def index(*index: Any) -> tuple[int | Array, ...]:
        example, head, step = layout.step(*index)
        return example, head, step.segment, 0, 0, step.outer

    def clear(step: Step, begins: bool | Array, ref: Any, sums: Any) -> None:
        pl.when(step.first)(lambda: sums.__setitem__(..., jnp.zeros_like(sums)))

    def add(step: Step, part: Part, d: Array, ref: Any, sums: Any) -> None:
        total = sum(
            d[:, start : start + lanes] for start in range(0, d.shape[1], lanes)
        )
        sums[step.member, part.first : part.first + part.size] += total

    def close(step: Step, ref: Any, sums: Any) -> None:
        def write() -> None:
            for member in range(group):
                ref[member] = sums[member].T.sum(0, keepdims=True)

        pl.when(step.last)(write)

    length = layout.tiles.nk * size
    return Window(
        (s.B, s.K, layout.segments, group, 1, length),
        pl.BlockSpec((None, None, None, group, 1, size), index),
        (pltpu.VMEM((group, size, lanes), jnp.float32),),
        False,
        clear,
        add,
        close,
        lambda x: _heads(x.sum(2))[..., : s.S],
    )


def _of_pairs(layout: Layout) -> Window:
    s, group = layout.tiles.inputs.sizes, layout.group
    block_q, block_k = layout.tiles.bq, layout.tiles.bk

    def index(*index: Any) -> tuple[int | Array, ...]:
        example, head, step = layout.step(*index)
        return example, head * group + step.member, step.inner, step.outer

    def clear(step: Step, begins: bool | Array, ref: Any) -> None:
        if step.empty is not False:
            pl.when(step.empty)(lambda: ref.__setitem__(..., jnp.zeros_like(ref)))

    def add(step: Step, part: Part, d: Array, ref: Any) -> None:
        ref[:, part.first : part.first + part.size] = d.T

    return Window(
        (s.B, s.N, layout.tiles.nq * block_q, layout.tiles.nk * block_k),
        pl.BlockSpec((None, None, block_q, block_k), index),
        (),
        True,
        clear,
        add,
        nothing,
        lambda x: x[:, :, : s.T, : s.S],
    )


def of_parameter(shape: tuple[int, ...], layout: Layout) -> Window:
    """The window for a score parameter of each query head.

    ``finish`` keeps ``shape``, and only brings the heads to one axis.
    """
    s, group = layout.tiles.inputs.sizes, layout.group

    def index(*index: Any) -> tuple[int | Array, ...]:
        example, head, _ = layout.step(*index)
        return example, head, 0, *(0 for _ in shape)

    def clear(step: Step, begins: bool | Array, ref: Any) -> None:
        pl.when(begins)(lambda: ref.__setitem__(..., jnp.zeros_like(ref)))

    return Window(
        (s.B, s.K, group, *shape),
        pl.BlockSpec((None, None, group, *shape), index),
        (),
        False,
        clear,
        nothing,
        nothing,
        _heads,
    )


def like(x: Array, operand: Array) -> Array:
    """Sums ``[B, N, ...]`` to the shape of an operand, and converts to its type."""
    axes = tuple(axis for axis in (0, 1) if operand.shape[axis] == 1)
    x = x.sum(axes, keepdims=True)
    return x.reshape(operand.shape).astype(operand.dtype)
