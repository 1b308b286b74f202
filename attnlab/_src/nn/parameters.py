"""How parameters begin, and the logical names of their axes, for a mesh to shard.

Flax keeps them as metadata; ``flax.core.spmd.logical_axis_rules`` maps them to axes of
a mesh and ``nnx.get_partition_spec`` reads the result.

=============  ==================================================
name           what runs along it
=============  ==================================================
``embed``      features of the residual stream
``heads``      query heads
``key_heads``  key and value heads
``head_size``  features of one head
``hidden``     hidden features of a feed-forward layer, of a score
``vocabulary`` tokens
``positions``  learned positions
``layers``     layers stacked by ``scan``
=============  ==================================================
"""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from attnlab._src.types import Array, PyTree

Initializer = Callable[..., Array]

#: Of weights (Glorot and Bengio, 2010), and of biases.
GLOROT = nnx.initializers.xavier_uniform()
ZEROS = nnx.initializers.zeros_init()


def named(*axes: str | None) -> dict[str, Any]:
    """Metadata of a parameter whose axes have these logical names."""
    # Not placed on a mesh while it is made: there need not be one.
    return {"out_sharding": axes, "eager_sharding": False}


def as_params(tree: PyTree) -> PyTree:
    """A tree, of a score for instance, whose arrays are learned; numbers are not."""
    return jax.tree.map(lambda x: nnx.Param(x) if hasattr(x, "dtype") else x, tree)


def as_arrays(tree: PyTree) -> PyTree:
    """What :func:`as_params` was given, as it is now."""

    def is_variable(x: Any) -> bool:
        return isinstance(x, nnx.Variable)

    return jax.tree.map(
        lambda x: x[...] if is_variable(x) else x, tree, is_leaf=is_variable
    )
