"""Parts that all kernels here share: products on tensor cores, memory, the call."""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from attnlab._src.implementations.pallas_gpu.blocks import LANES, ROWS, Blocks
from attnlab._src.types import Array, PyTree

LOG2_E = math.log2(math.e)

f32 = jnp.float32
#: Registers of a tile ``[64, n]``, and of a number for each row or column of it.
TILE = plgpu.Layout.WGMMA
BY_ROW, BY_COLUMN = TILE.reduce(1), TILE.reduce(0)

#: Registers of a thread that computes, and of one that copies. Two warpgroups with the
#: one and one with the other fit into the 65,536 of a multiprocessor.
_GREATEST_REGISTERS, _LEAST_REGISTERS = 240, 24


def full(shape: Sequence[int], value: float, layout: Any) -> Array:
    """An array of one float32 number, in registers."""
    return plgpu.layout_cast(jnp.full(shape, value, f32), layout)


#: JAX 0.10 wants an index as the second argument of ``load``.
_INDEX = ((),) if "idx" in inspect.signature(plgpu.load).parameters else ()


def load(ref: Any, layout: Any) -> Array:
    """Reads a whole reference into registers."""
    return plgpu.load(ref, *_INDEX, layout=layout, optimized=False)


def along(x: Array, shape: Sequence[int], axis: int) -> Array:
    """Repeats a number for each row (``axis`` 0) or column (1) of a tile."""
    return lax.broadcast_in_dim(x, shape, [axis])


def spread(x: Array, shape: tuple[int, int]) -> Array:
    """Repeats a scalar in a tile."""
    return plgpu.layout_cast(jnp.broadcast_to(x, shape), TILE)


def shared(*shape: int, dtype: DTypeLike, lanes: int) -> Any:
    """Shared memory for matrices ``[..., rows, columns]`` of 16 bits, swizzled.

    Args:
        shape: of all of them; ``lanes`` divides the columns.
        dtype: their type.
        lanes: see ``Blocks.lanes``.
    """
    transforms = plgpu.TilingTransform((8, lanes)), plgpu.SwizzleTransform(2 * lanes)
    return plgpu.SMEM(shape, dtype, transforms=transforms)


class Products(NamedTuple):
    """Products on tensor cores, accumulated in float32.

    Attributes:
        dtype: the 16-bit type of both operands.
        interpreted: whether the left operand of ``add`` goes through shared memory: the
            interpreter knows no product with an operand in registers.
    """

    dtype: DTypeLike
    interpreted: bool

    def __call__(self, a: Any, b: Any) -> Array:
        """The product of two matrices in shared memory, ``[64, k] [k, n]``."""

        def body(acc: Any) -> Any:
            plgpu.wgmma(acc, a, b)
            return acc[...]

        found: Any = pl.run_scoped(body, plgpu.ACC((a.shape[0], b.shape[1]), f32))
        return found

    def room(self, blocks: Blocks) -> list[Any]:
        """Scratch memory of ``add``, for left operands that are tiles of logits."""
        if not self.interpreted:
            return []
        shape = blocks.warpgroups, ROWS, blocks.columns
        return [shared(*shape, dtype=self.dtype, lanes=blocks.lanes)]

    def add(self, total: Array, a: Array, b: Any, room: Sequence[Any]) -> Array:
        """``total + a @ b``: ``a [64, k]`` in registers, ``b [k, n]`` in memory.

        Args:
            total: ``[64, n]``.
            a: rounded to 16 bits.
            b: 16 bits.
            room: this warpgroup's part of ``room()``.
        """
        a = a.astype(self.dtype)
        if self.interpreted:
            (left,) = room
            left[...] = a
            plgpu.commit_smem()
            return total + self(left, b)

        def body(acc: Any) -> None:
            plgpu.wgmma(acc, a, b)

        found: Any = pl.run_state(body)(plgpu.ACC.init(total))
        return found


class Ring:
    """Blocks of some arrays in shared memory, copied ahead by a warpgroup of its own.

    Every warpgroup counts the blocks; block number n lies in slot n modulo the number
    of slots.
    """

    def __init__(self, refs: Sequence[Any]):
        """Takes the references of ``scratch``."""
        *self._buffers, self._filled, self._used = refs

    @staticmethod
    def scratch(blocks: Blocks, widths: Sequence[int], dtype: DTypeLike) -> list[Any]:
        """Scratch memory.

        Args:
            blocks: block sizes; blocks of the ring have as many rows as a tile columns.
            widths: columns of each array.
            dtype: of the arrays.
        """
        count = len(widths) * blocks.slots
        shape = blocks.slots, blocks.columns
        return [
            *(shared(*shape, n, dtype=dtype, lanes=blocks.lanes) for n in widths),
            plgpu.Barrier(num_barriers=count),
            plgpu.Barrier(num_arrivals=blocks.warpgroups, num_barriers=count),
        ]

    def _slot(self, number: Array) -> Array:
        return lax.rem(number, jnp.int32(self._buffers[0].shape[0]))

    def _barrier(self, barriers: Any, which: int, slot: Array) -> Any:
        return barriers.at[which * self._buffers[0].shape[0] + slot]

    def _free(self, which: int, number: Array) -> None:
        """Waits until all readers have released what the slot held before."""

        @pl.when(number >= self._buffers[which].shape[0])
        def _() -> None:
            barrier = self._barrier(self._used, which, self._slot(number))
            plgpu.barrier_wait(barrier)

    def fill(self, block: Array, number: Array, sources: Sequence[Any]) -> None:
        """Copies a block of each array ``[rows, columns]``, once its slot is free."""
        slot, size = self._slot(number), self._buffers[0].shape[1]
        span = pl.ds(block * size, size)
        for which, source in enumerate(sources):
            self._free(which, number)
            filled = self._barrier(self._filled, which, slot)
            plgpu.copy_gmem_to_smem(
                source.at[span], self._buffers[which].at[slot], filled
            )

    def wait(self, which: int, number: Array) -> Any:
        """The block of an array, once it is there."""
        slot = self._slot(number)
        plgpu.barrier_wait(self._barrier(self._filled, which, slot))
        return self._buffers[which].at[slot]

    def release(self, which: int, number: Array) -> None:
        """Says that this warpgroup has read the block."""
        slot = self._slot(number)
        plgpu.barrier_arrive(self._barrier(self._used, which, slot))


def fetch(sources: Sequence[Any], to: Sequence[Any], barriers: Sequence[Any]) -> None:
    """Copies arrays to shared memory, and waits for all of them."""
    for each in zip(sources, to, barriers, strict=True):
        plgpu.copy_gmem_to_smem(*each)
    for barrier in barriers:
        plgpu.barrier_wait(barrier)


def split(
    warpgroups: int,
    compute: Callable[[Array], None],
    copy: Callable[[], None],
    interpreted: bool,
) -> None:
    """Runs ``compute(number)`` in some warpgroups, and ``copy()`` in one more."""
    number = lax.axis_index("warpgroup")

    @pl.when(number < warpgroups)
    def _() -> None:
        if not interpreted:
            plgpu.set_max_registers(_GREATEST_REGISTERS, action="increase")
        compute(number)

    @pl.when(number == warpgroups)
    def _() -> None:
        if not interpreted:
            plgpu.set_max_registers(_LEAST_REGISTERS, action="decrease")
        copy()


def whole_tiles(x: Array) -> Array:
    """``[B, L, heads, X]`` with zeros up to multiples of 8 and of ``LANES``.

    Copies between memories want that; beyond L they read zeros, and write nothing.
    """
    length, width = -x.shape[1] % 8, -x.shape[3] % LANES
    if not length and not width:
        return x
    return jnp.pad(x, [(0, 0), (0, length), (0, 0), (0, width)])


def call(
    kernel: Callable[[PyTree, PyTree, PyTree], None],
    grid: dict[str, int],
    arrays: PyTree,
    out_type: PyTree,
    scratch: PyTree,
    *,
    warpgroups: int,
    name: str,
    interpret: Any,
) -> PyTree:
    """Calls ``kernel(arrays, results, scratch)``, where each is a tree of references.

    Args:
        kernel: the kernel.
        grid: sizes of the axes of the grid by name. Neighbours along the last one start
            together, and so find the blocks that they share in the cache.
        arrays: its arrays.
        out_type: types of its results.
        scratch: its scratch memory, for all warpgroups together.
        warpgroups: number of warpgroups that compute; there is one more.
        name: of the kernel.
        interpret: parameters of the interpreter; None: compile it.
    """
    given, (types, results) = jax.tree.flatten(arrays), jax.tree.flatten(out_type)
    memory, room = jax.tree.flatten(scratch)

    def body(*refs: Any) -> None:
        trees, first = [], 0
        for tree in (given[1], results, room):
            leaves = refs[first : first + tree.num_leaves]
            trees.append(jax.tree.unflatten(tree, leaves))
            first += tree.num_leaves
        kernel(*trees)

    found = plgpu.kernel(
        body,
        out_type=types,
        scratch_types=memory,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name=name,
        interpret=interpret,
    )(*given[0])
    return jax.tree.unflatten(results, found)
