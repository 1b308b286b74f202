"""Parts that all kernels here share: products, array layouts, the Pallas call."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.lax import PrecisionLike
from jax.sharding import ManualAxisType
from jax.typing import DTypeLike

from attnlab._src.implementations.pallas_tpu.blocks import device, limit
from attnlab._src.implementations.pallas_tpu.steps import Steps
from attnlab._src.implementations.tile import may_round
from attnlab._src.types import Array, AttentionInputs

#: Dimension numbers of products: NN for [m, k] [k, n], NT for [m, k] [n, k].
NN, NT = (((1,), (0,)), ((), ())), (((1,), (1,)), ((), ()))


class Products(NamedTuple):
    """How matrices are multiplied.

    Attributes:
        dtype: type to which operands are converted.
        precision: precision of the product.
    """

    dtype: DTypeLike
    precision: PrecisionLike

    @classmethod
    def of(cls, inputs: AttentionInputs) -> "Products":
        """Chosen by ``precision=`` or, without that, by JAX's own setting."""
        if not may_round(inputs):
            return cls(jnp.float32, lax.Precision.HIGHEST)
        alike = inputs.query.dtype == inputs.value.dtype
        return cls(inputs.query.dtype if alike else jnp.float32, None)

    def __call__(self, a: Array, b: Array, dims: lax.DotDimensionNumbers = NN) -> Array:
        """The product, in float32."""
        return lax.dot_general(
            a.astype(self.dtype),
            b.astype(self.dtype),
            dims,
            precision=self.precision,
            preferred_element_type=jnp.float32,
        )


def heads_first(
    x: Array, length: int, *, transposed: bool, padding: str = "constant"
) -> Array:
    """``[B, L, heads, X]`` as ``[B, heads, L, X]`` or, transposed, ``[.., X, L]``.

    L is padded to ``length``. ``padding`` is a mode of ``jnp.pad``; zeros if not given.
    """
    x = jnp.pad(x, [(0, 0), (0, length - x.shape[1]), (0, 0), (0, 0)], mode=padding)
    return x.transpose((0, 2, 3, 1) if transposed else (0, 2, 1, 3))


def call(
    kernel: Callable[..., None],
    steps: Steps,
    lead: tuple[int, int],
    arrays: Sequence[Array],
    in_specs: Sequence[pl.BlockSpec],
    out_shape: Sequence[jax.ShapeDtypeStruct],
    out_specs: Sequence[pl.BlockSpec],
    scratch: Sequence[pl.MemoryRef],
    *,
    name: str,
    interpret: bool | pltpu.InterpretParams,
    aliases: dict[int, int] | None = None,
) -> list[Array]:
    """Calls a kernel, whose arguments are the words of the steps, then references."""
    grid = (*lead, *steps.grid)
    # What a device computes varies over no axis of a mesh: shard_map asks for that.
    results = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=ManualAxisType())
        for x in out_shape
    ]
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(steps.words),
            grid=grid,
            in_specs=list(in_specs),
            out_specs=list(out_specs),
            scratch_shapes=list(scratch),
        ),
        out_shape=results,
        input_output_aliases=aliases or {},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * 2 + ("arbitrary",) * (len(grid) - 2),
            vmem_limit_bytes=limit() if device().kind else None,
        ),
        name=name,
        interpret=interpret,
    )(*(jnp.asarray(x) for x in steps.words), *arrays)
