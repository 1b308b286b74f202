"""The keys that an indexer scores best, by the C++ kernel (``src/choosing.h``)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attnlab._src.implementations.native import load
from attnlab._src.implementations.native.program import (
    FLOATS,
    Buffers,
    header,
    mask_program,
    unknown,
)
from attnlab._src.masks.base import Mask
from attnlab._src.types import Array, PyTree


class Choice(NamedTuple):
    """What to choose from, with one batch axis.

    Attributes:
        query: ``[B, T, J, H]``.
        key: ``[B, S, H]``.
        weights: ``[B, T, J]``.
        query_positions: ``[B or 1, T]``, -1 = empty.
        key_positions: ``[B or 1, S]``, -1 = empty.
        mask: which query may attend to which key.
        operands: of the mask, normalised.
    """

    query: Array
    key: Array
    weights: Array
    query_positions: Array
    key_positions: Array
    mask: Mask
    operands: PyTree


def can_choose(choice: Choice) -> bool:
    """Whether the kernel is there and knows the types and the mask."""
    arrays = choice.query, choice.key, choice.weights
    heads = [x.shape[1] for x in jax.tree.leaves(choice.operands)]
    return (
        load.why_not() is None
        and all(x.dtype in FLOATS for x in arrays)
        and unknown(choice.mask) == 0
        and max([*heads, choice.mask.head_count]) == 1
    )


def chosen_keys(choice: Choice, count: int) -> Array:
    """int32 ``[B, T, count]``: slots of the best keys, ascending, after those of -1."""
    query, key, weights, query_positions, key_positions, mask, operands = choice
    one_head = key[:, :, None]
    buffers = Buffers(
        query,
        one_head,
        one_head,
        query_positions[:, None, :, None],
        key_positions[:, None, None],
        weights,
    )

    def no_bits(*_: object) -> Array:
        raise AssertionError(mask)

    program = [
        *header(params=[len(buffers.arrays) - 1]),
        *mask_program(mask, operands, buffers, no_bits),
    ]
    shape = (*query.shape[:2], count)
    call = jax.ffi.ffi_call(load.CHOOSE, jax.ShapeDtypeStruct(shape, jnp.int32))
    return call(
        *buffers.arrays,
        program=np.asarray(program, np.int64),
        keep_scale=np.float64(1),
        logit_scale=np.float64(1),
    )
