"""Models whose parameters and batch are sharded over a mesh."""

import jax
import numpy as np
import pytest
from flax import nnx
from flax.core.spmd import logical_axis_rules
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as Spec

from attnlab import nn
from tests.devices import collectives, mesh_of
from tests.grid import few

#: Tensor parallelism: heads, hidden units and tokens are divided along "y".
RULES = [
    *((name, "y") for name in ("heads", "key_heads", "hidden", "vocabulary")),
    *((name, None) for name in ("embed", "head_size", "positions")),
]


@pytest.mark.parametrize(
    "kind", few([AxisType.Auto, AxisType.Explicit], AxisType.Explicit)
)
def test_data_and_tensor_parallel(kind):
    model = nn.Decoder.standard(
        48,
        features=16,
        num_heads=4,
        num_key_heads=2,
        num_layers=1,
        position=nn.Rotary,
        residual=nn.PreNorm,
        dropout_rate=0.1,
        rngs=nnx.Rngs(0),
    )
    structure, params, rest = nnx.split(model, nnx.Param, ...)
    tokens = jax.random.randint(jax.random.key(0), (8, 16), 0, 48)

    @jax.jit
    def step(params, rest, tokens):
        def loss(params):
            logits = nnx.merge(structure, params, rest, copy=True)(tokens)
            return (logits**2).mean(), logits

        return jax.value_and_grad(loss, has_aux=True)(params)

    wanted = step(params, rest, tokens)
    with logical_axis_rules(RULES):
        specs = nnx.get_partition_spec(params)
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        placed = jax.tree.map(
            lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), params, specs
        )
        given = (
            placed,
            jax.device_put(rest, NamedSharding(mesh, Spec())),
            jax.device_put(tokens, NamedSharding(mesh, Spec("x"))),
        )
        compiled = step.lower(*given).compile()
        found = compiled(*given)
    for one, other in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)
    # Partial sums of projections and gradients; no activation or weight is gathered.
    assert set(collectives(compiled)) == {"all-reduce"}
    (_, logits), _ = found
    assert logits.sharding.shard_shape(logits.shape) == (4, 16, 24)
