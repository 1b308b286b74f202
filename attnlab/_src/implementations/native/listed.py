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


def lists_of(inputs: AttentionInputs) -> Lists | None:
    """The lists of a mask, where ``src/listed.h`` can compute it, and costs less."""
    mask, operands = inputs.mask, inputs.mask_operands
    parts: tuple[Any, ...] = (mask,)
    own: PyTree = (operands,)
    if exactly(mask, And):
        parts, own = mask.parts, operands
    at = next((i for i, part in enumerate(parts) if exactly(part, Selected)), None)
    plain = inputs.score.is_inner_product and not inputs.modifiers
    if at is None or not plain or inputs.dropout_words is not None:
        return None
    chosen: Any = parts[at]
    lists, _ = own[at]
    rest = (*parts[:at], *parts[at + 1 :])
    others = (*own[:at], *own[at + 1 :])
    if chosen.grouped:
        # One list for each key head: XLA then does not repeat them.
        b, _, *rows = lists.shape
        lists = lists.reshape(b, inputs.sizes.K, -1, *rows)[:, :, 0]
    few = _COST * lists.shape[-1] * chosen.key_block <= inputs.sizes.S
    if not few or chosen.query_block >= ENOUGH_QUERIES:
        return None
    if inputs.position_kinds[1] != "index" or not all(map(is_structural, rest)):
        return None
    if len(rest) == 1:
        return Lists(lists, chosen.key_block, rest[0], others[0])
    more: tuple[Mask, PyTree] = (And(rest), others) if rest else (Full(), ())
    return Lists(lists, chosen.key_block, *more)


def rows_of(inputs: AttentionInputs, sizes: tuple[int, int]) -> Plan:
    """The plan by rows; of nothing, where the kernel reads lists and no plan."""
    if lists_of(inputs) is None:
        return plan_of(inputs, sizes, cols=False)
    s = inputs.sizes
    none = Intervals(*[np.zeros((1, 1, -(-s.T // sizes[0]), 0), np.int32)] * 2)
    return Plan(Live(none, none), None, *sizes, s.T, s.S)
