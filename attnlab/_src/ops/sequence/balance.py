"""An order of tokens in which every device has about as much to compute."""

from typing import Any

import numpy as np

from attnlab._src import arguments
from attnlab._src.masks.base import as_mask
from attnlab._src.masks.bound import known_bound
from attnlab._src.ops.sequence.costs import pairs_of
from attnlab._src.ops.sequence.needs import Lengths

#: Pieces of the sequence that each device may have; as few as are even enough.
_PIECES = (1, 2, 4, 8)
#: The most work of a device, relative to the mean, that is even enough.
_EVEN = 1.1


def balanced_order(mask: Any, length: int, shards: int) -> np.ndarray:
    """The order in which tokens are dealt to shards, so that their work is even.

    Give arrays in this order, and the order as positions::

        order = sharding.balanced_order(masks.causal(), length, 8)
        x = x[:, order]
        y = sharding.attention(x, x, x, mask=masks.causal(), query_positions=order,
                               key_positions=order, mesh=mesh, sequence="sequence")
        y = y[:, np.argsort(order)]  # as before

    The sequence is cut into pieces; those with the most work are dealt out first, back
    and forth over the shards (for a causal mask and two pieces each: zig-zag). Masks
    whose data refer to slots (documents, lengths) need them in the same order.

    Args:
        mask: as of :func:`attnlab.attention`; data that are not known count as visible.
        length: T = S.
        shards: number of shards, which must divide the length.

    Returns:
        ``[length]`` int32, the position of each slot: the one with the least imbalance
        if none is within 1.1 times the mean.

    Raises:
        TypeError, ValueError: if an argument is not of these kinds, or the length is no
            multiple of the shards.

    Example:
        >>> from attnlab import masks, sharding
        >>> sharding.balanced_order(masks.causal(), 16, 4).reshape(4, 4)
        array([[ 0,  1, 14, 15],
               [ 2,  3, 12, 13],
               [ 4,  5, 10, 11],
               [ 6,  7,  8,  9]], dtype=int32)

    References:
        Brandon et al., "Striped Attention", 2023, section 3 (uneven causal work).
    """
    arguments.sizes(length=length, shards=shards)
    if length % shards:
        raise ValueError(
            f"length: expected a multiple of {shards} shards, got {length}; pad it"
        )
    bound = known_bound(as_mask(mask))
    made = [
        _dealt(np.array(pairs_of(bound, Lengths(count, length, length))), shards)
        for pieces in _PIECES
        if length % (count := shards * pieces) == 0
    ]
    even = (each for each in made if each[0] <= _EVEN)
    _, order = next(even, min(made, key=lambda each: round(each[0], 1)))
    pieces = np.arange(length, dtype=np.int32).reshape(len(order), -1)
    return pieces[order].reshape(-1)


def _dealt(work: np.ndarray, shards: int) -> tuple[float, np.ndarray]:
    """The imbalance, and the number of each piece in order of shards."""
    ranks = np.argsort(-work, kind="stable").reshape(-1, shards)
    ranks[1::2] = ranks[1::2, ::-1]
    each = np.sort(ranks.T, axis=1)
    loads = work[each].sum(1)
    each = each[np.argsort(each[:, 0], kind="stable")]
    return float(loads.max() / max(loads.mean(), 1e-9)), each.reshape(-1)
