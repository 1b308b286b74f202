"""Initializers of parameters, and logical names of their axes for sharding.

Flax keeps the names as metadata; ``flax.core.spmd.logical_axis_rules`` maps them to
axes of a mesh and ``nnx.get_partition_spec`` reads the result.

=============  ==================================================
name           axis of
=============  ==================================================
``embed``      features of the residual stream
``heads``      query heads
``key_heads``  key and value heads
``head_size``  features of one head
``hidden``     hidden features of a feed-forward layer or a score
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

#: Default initializers of weights (Glorot and Bengio, 2010), and of biases.
GLOROT = nnx.initializers.xavier_uniform()
ZEROS = nnx.initializers.zeros_init()


def named(*axes: str | None) -> dict[str, Any]:
    """Metadata of a parameter whose axes have these logical names."""
    # Not sharded on creation: there may be no mesh yet.
    return {"out_sharding": axes, "eager_sharding": False}


def as_params(tree: PyTree) -> PyTree:
    """The tree (a score, for example) with arrays as parameters, numbers unchanged."""
    return jax.tree.map(lambda x: nnx.Param(x) if hasattr(x, "dtype") else x, tree)


def as_arrays(tree: PyTree) -> PyTree:
    """The tree given to :func:`as_params`, with the current values of its arrays."""

    def is_variable(x: object) -> bool:
        return isinstance(x, nnx.Variable)

    return jax.tree.map(
        lambda x: x[...] if is_variable(x) else x, tree, is_leaf=is_variable
    )
