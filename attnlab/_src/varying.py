"""Inside ``shard_map``: over which manual axes an array varies."""

from typing import Any

import jax
from jax import Array, lax


def varying(x: object) -> frozenset[str]:
    """The manual mesh axes over which an array varies, inside ``shard_map``."""
    aval: Any = jax.typeof(x)
    # jax 0.10.2 calls it manual_axis_type; releases before it, vma.
    kind = getattr(aval, "manual_axis_type", None)
    return getattr(aval, "vma", frozenset()) if kind is None else kind.varying


def vary_like(x: Array, references: object) -> Array:
    """Gives ``x`` the manual axes over which the references vary (``shard_map``)."""
    axes: frozenset[str] = frozenset()
    for leaf in jax.tree.leaves(references):
        axes |= varying(leaf)
    missing = tuple(sorted(axes - varying(x)))
    return lax.pcast(x, missing, to="varying") if missing else x
