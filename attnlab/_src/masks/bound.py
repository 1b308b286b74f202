"""What structure alone tells of a mask whose data are unknown."""

import dataclasses
import functools

import jax

from attnlab._src import arguments
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
    if exactly(mask, And, Or, PerHead):
        pairs = zip(mask.parts, operands, strict=True)
        parts = tuple(structural_bound(m, own) for m, own in pairs)
        return dataclasses.replace(mask, parts=parts)
    if exactly(mask, Not):
        return Not(structural_bound(mask.part, operands))
    return unknown()


def known_bound(mask: Mask) -> Mask:
    """As :func:`structural_bound`, but data that are known while tracing are kept.

    Args:
        mask: the mask with its arrays, which become NumPy's where they are no tracers.
    """
    leaves = jax.tree.leaves(mask)
    if not leaves:
        return mask
    if exactly(mask, And, Or, PerHead):
        parts = tuple(known_bound(part) for part in mask.parts)
        return dataclasses.replace(mask, parts=parts)
    if exactly(mask, Not):
        return Not(known_bound(mask.part))
    if any(arguments.values(x) is None for x in leaves):
        return unknown()
    return _as_numpy(mask)


@functools.lru_cache(maxsize=64)
def _as_numpy(mask: Mask) -> Mask:
    """The same object for the same mask, so that equal calls are traced once."""
    return jax.tree.map(arguments.values, mask)
