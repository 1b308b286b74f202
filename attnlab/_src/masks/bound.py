"""What structure alone tells of a mask whose data are unknown."""

import jax

from attnlab._src.exact import exactly
from attnlab._src.masks.base import And, Mask, Not, Or
from attnlab._src.masks.data import predicate
from attnlab._src.masks.per_head import PerHead
from attnlab._src.types import Array, PyTree


def _every_pair(t: Array, s: Array) -> Array:
    return (t >= 0) & (s >= 0)


def unknown() -> Mask:
    """A mask that may show any pair: no block is surely full, none surely dead."""
    return predicate(_every_pair)


def structural_bound(mask: Mask, operands: PyTree) -> Mask:
    """A mask of structure alone, in whose plan no block that may be live is missing.

    Args:
        mask: the mask (or its skeleton).
        operands: its operands, nested like its parts; arrays or their shapes.
    """
    if not jax.tree.leaves(operands):
        return mask
    if exactly(mask, And, Or):
        pairs = zip(mask.parts, operands, strict=True)
        return type(mask)(tuple(structural_bound(m, own) for m, own in pairs))
    if exactly(mask, PerHead):
        pairs = zip(mask.parts, operands, strict=True)
        parts = tuple(structural_bound(m, own) for m, own in pairs)
        return PerHead(parts, mask.which)
    if exactly(mask, Not):
        return Not(structural_bound(mask.part, operands))
    return unknown()
