"""The ``vmap`` rule of the primitive: the mapped axis folds into another axis."""

import dataclasses
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.interpreters import batching

from attnlab._src.ops.folding import fold_of
from attnlab._src.ops.primitive import Asked, attention_p, one_pass
from attnlab._src.types import Array


def _mapped(
    values: Sequence[Array],
    axes: Sequence[int | None],
    *,
    asked: Asked,
    wanted: tuple[bool, ...] | None,
    structure: jax.tree_util.PyTreeDef,
    **_: object,
) -> tuple[list[Array], list[int]]:
    """One pass with the mapped axis folded; the results have it in front."""
    on = [axis is not None for axis in axes]
    size = next(x.shape[a] for x, a in zip(values, axes, strict=True) if a is not None)
    values = [
        x if axis is None else jnp.moveaxis(x, axis, 0)
        for x, axis in zip(values, axes, strict=True)
    ]
    given, mapped = (jax.tree.unflatten(structure, x) for x in (values, on))
    fold = fold_of(size, mapped, given, wanted, asked.implementation)
    # The folded axis is not divided as one of its parts was.
    asked = dataclasses.replace(asked, place=None)
    found = one_pass(asked, wanted, *fold.fold(mapped, given, wanted))
    batches = [x.shape[mark] for x, mark in zip(values, on, strict=True)]
    batches = (
        [batches[0]] * 2 if wanted is None else itertools.compress(batches, wanted)
    )
    return fold.unfold(found, [*batches]), [0] * len(found)


batching.primitive_batchers[attention_p] = _mapped
