"""Models whose parameters and batch are sharded over a mesh."""

import jax
import numpy as np
import pytest
from flax import nnx
from flax.core.spmd import logical_axis_rules
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as Spec

from attnlab import masks, nn
from tests.devices import collectives, mesh_of
from tests.grid import few

#: Tensor parallelism: heads, hidden units and tokens are divided along "y".
RULES = [
    *((name, "y") for name in ("heads", "key_heads", "hidden", "vocabulary")),
    *((name, None) for name in ("embed", "head_size", "positions")),
]


def decoder(**options):
    return nn.Decoder.standard(
        48,
        features=16,
        num_heads=4,
        num_key_heads=2,
        num_layers=1,
        position=nn.Rotary,
        rngs=nnx.Rngs(0),
        **options,
    )


@pytest.mark.parametrize(
    "kind", few([AxisType.Auto, AxisType.Explicit], AxisType.Explicit)
)
def test_data_and_tensor_parallel(kind):
    model = decoder(residual=nn.PreNorm, dropout_rate=0.1)
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


@pytest.mark.parametrize("window", few([None, 6], 6))
def test_caches_stay_sharded_by_batch_and_heads(window):
    seen = masks.causal() if window is None else masks.sliding_window(window, 0)
    model = decoder(mask=seen)
    (block,) = model.stack.each()
    block.attention.cache = nn.CachePolicy(None if window is None else window + 1)
    structure, params, rest = nnx.split(model, nnx.Param, ...)
    prompt = jax.random.randint(jax.random.key(0), (4, 5), 0, 48)

    @jax.jit
    def step(params, tokens, state):
        return nnx.merge(structure, params, rest, copy=True).decode(tokens, state)

    mesh = mesh_of()
    with logical_axis_rules(RULES):
        specs = nnx.get_partition_spec(params)

    def place(x, spec):
        return jax.device_put(x, NamedSharding(mesh, spec))

    def as_heads(x):
        return place(x, Spec("x", None, "y") if x.ndim == 4 else Spec("x"))

    state = model.start(4, 16)
    given = jax.tree.map(place, params, specs), place(prompt, Spec("x"))
    given = *given, jax.tree.map(as_heads, state)
    compiled = step.lower(*given).compile()
    for one, other in zip(
        *map(jax.tree.leaves, (compiled(*given), step(params, prompt, state))),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    _, following = compiled(*given)
    for x, before in zip(*map(jax.tree.leaves, (following, given[2])), strict=True):
        assert x.sharding.is_equivalent_to(before.sharding, x.ndim)
    # Partial sums of the products with parameters; no key or value is sent.
    assert set(collectives(compiled)) == {"all-reduce"}
