"""Whether each query has a list of keys of its own, and is computed alone."""

from typing import Any, NamedTuple

import numpy as np

from attnlab._src.exact import exactly
from attnlab._src.implementations.native.program import is_structural
from attnlab._src.masks.base import And, Full, Mask
from attnlab._src.masks.planning import plan_of
from attnlab._src.masks.selected import Selected
from attnlab._src.types import (
    Array,
    AttentionInputs,
    Intervals,
    Live,
    Plan,
    PyTree,
)

#: Queries that share a list fill the lanes of vectors from this number on.
ENOUGH_QUERIES = 16
#: How much longer a pair takes than in a block of queries and keys, at most.
_COST = 4


class Lists(NamedTuple):
    """Lists of keys, one for each query, and what else a mask hides.

    Attributes:
        lists: ``[B or 1, N or K or 1, T, 1, R]``, blocks of keys.
        key_block: keys in a block.
        mask: shows those of the listed keys that are visible.
        operands: its operands.
    """

    lists: Array
    key_block: int
    mask: Mask
    operands: PyTree


class _Found(NamedTuple):
    """A mask of lists, its operand, and the rest of the mask with its operands."""

    mask: Any
    lists: Any
    rest: tuple[Any, ...]
    operands: tuple[PyTree, ...]


def _find(inputs: AttentionInputs) -> _Found | None:
    """The lists of a mask; None where other blocks than these are computed."""
    mask, operands = inputs.mask, inputs.mask_operands
    parts: tuple[Any, ...] = (mask,)
    own: PyTree = (operands,)
    if exactly(mask, And):
        parts, own = mask.parts, operands
    at = next((i for i, part in enumerate(parts) if exactly(part, Selected)), None)
    plain = inputs.score.is_inner_product and not inputs.modifiers
    if at is None or not plain or inputs.dropout_words is not None:
        return None
    found = _Found(
        parts[at],
        own[at][0],
        (*parts[:at], *parts[at + 1 :]),
        (*own[:at], *own[at + 1 :]),
    )
    few = _COST * found.lists.shape[-1] * found.mask.key_block <= inputs.sizes.S
    if not few or found.mask.query_block >= ENOUGH_QUERIES:
        return None
    structural = all(map(is_structural, found.rest))
    return found if inputs.position_kinds[1] == "index" and structural else None


def keys_listed(inputs: AttentionInputs) -> int | None:
    """Keys in the list of a query, where :func:`lists_of` finds lists."""
    found = _find(inputs)
    return None if found is None else found.lists.shape[-1] * found.mask.key_block


def lists_of(inputs: AttentionInputs) -> Lists | None:
    """The lists of a mask, where ``src/listed.h`` can compute it, and costs less."""
    found = _find(inputs)
    if found is None:
        return None
    chosen, lists, rest, others = found
    if chosen.grouped:
        # One list for each key head: XLA then does not repeat them.
        b, _, *rows = lists.shape
        lists = lists.reshape(b, inputs.sizes.K, -1, *rows)[:, :, 0]
    if len(rest) == 1:
        return Lists(lists, chosen.key_block, rest[0], others[0])
    more: tuple[Mask, PyTree] = (And(rest), others) if rest else (Full(), ())
    return Lists(lists, chosen.key_block, *more)


def rows_of(inputs: AttentionInputs, sizes: tuple[int, int]) -> Plan:
    """The plan by rows; of nothing, where the kernel reads lists and no plan."""
    if _find(inputs) is None:
        return plan_of(inputs, sizes, cols=False)
    s = inputs.sizes
    none = Intervals(*[np.zeros((1, 1, -(-s.T // sizes[0]), 0), np.int32)] * 2)
    return Plan(Live(none, none), None, *sizes, s.T, s.S)
