"""Long backward passes: some of the queries at a time, so that memory is O(T + S).

A kernel stores the gradients of keys and values once for each segment of queries, whose
gradients it keeps in vector memory. So a pass of many segments is divided into several
kernels, whose gradients of keys are added.
"""

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attnlab._src.implementations.pallas_tpu.blocks import Blocks
from attnlab._src.implementations.pallas_tpu.memory import segment_of
from attnlab._src.types import Array, AttentionInputs

#: Segments of a kernel at most, for each query head that shares a key head: so the
#: gradients of keys and values take four times the memory of the queries' at most.
SEGMENTS = 2

#: The gradients of the leaves of the inputs, or None.
Gradients = list[Array | None]


def slices_of(inputs: AttentionInputs, blocks: Blocks, limit: int) -> list[slice]:
    """The queries of each kernel.

    Args:
        inputs: the canonical record.
        blocks: block sizes.
        limit: bytes of vector memory that a kernel may use.
    """
    s = inputs.sizes
    most = SEGMENTS * (s.N // s.K) * segment_of(inputs, blocks, limit) * blocks.q
    return [slice(first, min(first + most, s.T)) for first in range(0, s.T, most)]


def some_queries(inputs: AttentionInputs, part: slice) -> AttentionInputs:
    """The inputs with some of the queries; their positions become an offset."""

    def own(x: Array) -> Array:
        return x[:, :, part] if x.shape[2] > 1 else x

    kind, keys = inputs.position_kinds
    positions: Any = own(inputs.query_positions)
    if kind == "index":
        # Known when compiling: the plan stays static.
        slots = np.arange(part.start, part.stop, dtype=np.int32)[None, None, :, None]
        kind, positions = "offset", np.broadcast_to(slots, positions.shape)
    words = inputs.dropout_words
    return dataclasses.replace(
        inputs,
        query=inputs.query[:, part],
        query_positions=positions,
        mask_operands=jax.tree.map(own, inputs.mask_operands),
        modifier_operands=jax.tree.map(own, inputs.modifier_operands),
        dropout_words=None if words is None else (own(words[0]), words[1]),
        position_kinds=(kind, keys),
    )


def by_slices(
    inputs: AttentionInputs,
    parts: list[slice],
    run: Callable[..., Gradients],
    *above: Array | None,
) -> Gradients:
    """The gradients of all queries, from kernels for some of them, one after another.

    Args:
        inputs: the canonical record.
        parts: see :func:`slices_of`.
        run: returns the gradients for ``(inputs, *above)`` of some of the queries.
        *above: what else the pass reads, each ``[B, T, ...]`` or None.
    """
    along = inputs.gradients(
        query=1,
        modifier_operands=jax.tree.map(
            lambda x: 2 if x.shape[2] > 1 else None, inputs.modifier_operands
        ),
    )
    rows: list[list[Array | None]] = []
    sums: Gradients = []
    for part in parts:
        given = (
            some_queries(inputs, part),
            [x if x is None else x[:, part] for x in above],
        )
        # A kernel starts when the sums of the one before are known: else XLA might
        # hold the gradients of all kernels at once.
        (own, others), sums = lax.optimization_barrier((given, sums))
        own = dataclasses.replace(own, query_positions=given[0].query_positions)
        found = run(own, *others)
        rows.append([x if axis else None for x, axis in zip(found, along, strict=True)])
        added = [None if axis else x for x, axis in zip(found, along, strict=True)]
        sums = added if not sums else _added(sums, added)
    joined = [
        None if any(x is None for x in xs) else jnp.concatenate(xs, axis)
        for axis, *xs in zip(along, *rows, strict=True)
    ]
    return [x if axis else y for x, y, axis in zip(joined, sums, along, strict=True)]


def _added(a: Gradients, b: Gradients) -> Gradients:
    return jax.tree.map(operator.add, a, b)
