"""Modules that select blocks, against their papers' equations in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from attnlab import masks, nn

T, FEATURES, N, K, H, BLOCK = 23, 16, 4, 2, 4, 4


def inputs(length=T):
    return np.random.default_rng(0).normal(size=(2, length, FEATURES)) * 0.5


def heads(linear, x):
    kernel, bias = (
        np.asarray(p[...], np.float64) for p in (linear.kernel, linear.bias)
    )
    return np.einsum("btf,fnh->btnh", x, kernel) + bias


def out(layer, x):
    kernel = np.asarray(layer.out.kernel[...], np.float64)
    return np.einsum("btnh,nhf->btf", x, kernel) + np.asarray(layer.out.bias[...])


def attend(query, key, value, shown):
    """One query, the keys that it sees; zeros where it sees none."""
    if not shown.any():
        return np.zeros(value.shape[-1])
    logits = key[shown] @ query / np.sqrt(H)
    weights = np.exp(logits - logits.max())
    return weights @ value[shown] / weights.sum()


def means_of(x, block, weights=None):
    """The blocks of ``[T, H]`` as one each; the last one may be short."""
    parts = [x[i : i + block] for i in range(0, len(x), block)]
    if weights is None:
        return np.stack([part.mean(0) for part in parts])
    return np.stack([(weights[: len(part)] * part).sum(0) for part in parts])


def mixture(layer, x):
    """MoBA, equations 2 to 6, for each query of each head."""
    query, key, value = (heads(p, x) for p in (layer.query, layer.key, layer.value))
    found = np.zeros(query.shape)
    for b, n, t in np.ndindex(2, N, T):
        keys, values = key[b, :, n // (N // K)], value[b, :, n // (N // K)]
        gates = means_of(keys, BLOCK) @ query[b, t, n]
        gates[t // BLOCK] = np.inf
        gates[t // BLOCK + 1 :] = -np.inf
        best = np.argsort(-gates, kind="stable")[: layer.count]
        best = best[gates[best] > -np.inf]
        places = np.arange(T)
        shown = np.isin(places // BLOCK, best) & (places <= t)
        found[b, t, n] = attend(query[b, t, n], keys, values, shown)
    return out(layer, found)


def native_sparse(layer, x):
    """NSA, equations 5 and 7 to 12, with blocks that do not overlap."""
    query, key, value = (heads(p, x) for p in (layer.query, layer.key, layer.value))
    gates = x @ np.asarray(layer.gates.kernel[...], np.float64)
    gates = 1 / (1 + np.exp(-gates - np.asarray(layer.gates.bias[...])))
    gates = gates.reshape(2, T, N, 3)
    learned = [np.asarray(p[...], np.float64) for p in layer.compress]
    blocks, group, places = -(-T // BLOCK), N // K, np.arange(T)
    found = np.zeros(query.shape)
    for b, k, t in np.ndindex(2, K, T):
        means = means_of(key[b, :, 3 * k], BLOCK, learned[0][:, k])
        values = means_of(value[b, :, 3 * k], BLOCK, learned[1][:, k])
        passed = (np.arange(blocks) + 1) * BLOCK - 1 <= t
        importance = np.zeros(blocks)
        for n in range(k * group, (k + 1) * group):
            if passed.any():
                logits = means[passed] @ query[b, t, n] / np.sqrt(H)
                weights = np.exp(logits - logits.max())
                importance[passed] += weights / weights.sum()
        importance[0] = np.inf
        importance[max(t // BLOCK - 1, 0) : t // BLOCK + 1] = np.inf
        importance[t // BLOCK + 1 :] = -np.inf
        best = np.argsort(-importance, kind="stable")[: layer.count]
        best = best[importance[best] > -np.inf]
        chosen = np.isin(places // BLOCK, best) & (places <= t)
        near = (places <= t) & (places > t - layer.window)
        for n in range(k * group, (k + 1) * group):
            q = query[b, t, n]
            parts = (
                attend(q, means, values, passed),
                attend(q, key[b, :, 3 * k + 1], value[b, :, 3 * k + 1], chosen),
                attend(q, key[b, :, 3 * k + 2], value[b, :, 3 * k + 2], near),
            )
            found[b, t, n] = sum(
                g * p for g, p in zip(gates[b, t, n], parts, strict=True)
            )
    return out(layer, found)


def indexed(layer, x):
    """DeepSeek-V3.2-Exp, equations 1 and 2."""
    query, key, value = (heads(p, x) for p in (layer.query, layer.key, layer.value))
    small, index, weights = (
        np.tensordot(x, np.asarray(p.kernel[...], np.float64), 1)
        for p in (layer.index_query, layer.index_key, layer.index_weights)
    )
    found, places = np.zeros(query.shape), np.arange(T)
    for b, t in np.ndindex(2, T):
        scores = np.maximum(small[b, t] @ index[b, :, 0].T, 0).T @ weights[b, t]
        scores[t + 1 :] = -np.inf
        best = np.argsort(-scores, kind="stable")[: min(layer.count, t + 1)]
        shown = np.isin(places, best)
        for n in range(N):
            k = n // (N // K)
            found[b, t, n] = attend(query[b, t, n], key[b, :, k], value[b, :, k], shown)
    return out(layer, found)


def make_indexed(**options):
    return nn.IndexedAttention(
        FEATURES, N, num_key_heads=K, count=6, index_heads=3, index_size=4,
        rngs=nnx.Rngs(1), **options,
    )  # fmt: skip


def make_mixture(**options):
    return nn.MixtureOfBlocks(
        FEATURES, N, num_key_heads=K, block_size=BLOCK, count=3, rngs=nnx.Rngs(1),
        **options,
    )  # fmt: skip


def make_native(**options):
    layer = nn.NativeSparseAttention(
        FEATURES, N, num_key_heads=K, block_size=BLOCK, count=4, window=6,
        rngs=nnx.Rngs(1), **options,
    )  # fmt: skip
    rng = np.random.default_rng(3)
    for p in layer.compress:
        p[...] = jnp.asarray(rng.normal(size=p.shape) / BLOCK, jnp.float32)
    return layer


LAYERS = {
    "mixture": (make_mixture, mixture),
    "native": (make_native, native_sparse),
    "indexed": (make_indexed, indexed),
}
layers = pytest.mark.parametrize("name", LAYERS)


@layers
def test_equals_the_equations(name):
    make, wanted = LAYERS[name]
    layer, x = make(), inputs()
    found = layer(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(found, wanted(layer, x), rtol=2e-4, atol=2e-5)


@layers
def test_prefill_and_steps_equal_the_whole(name):
    layer, x = LAYERS[name][0](position=nn.Rotary()), jnp.asarray(inputs(), jnp.float32)
    whole, cache = layer(x), layer.make_cache(2, T + 2)
    step = nnx.jit(lambda layer, x, cache: layer.decode(x, cache))
    first, cache = step(layer, x[:, :9], cache)
    rest = []
    for t in range(9, T):
        one, cache = step(layer, x[:, t : t + 1], cache)
        rest.append(one)
    found = jnp.concatenate([first, *rest], 1)
    np.testing.assert_allclose(found, whole, rtol=2e-4, atol=2e-5)


@layers
def test_every_parameter_has_a_gradient(name):
    layer, x = LAYERS[name][0](), jnp.asarray(inputs(), jnp.float32)
    layer.set_attributes(learn="selected", raise_if_not_found=False)

    def loss(layer):
        found, losses = nnx.capture(layer, nn.IndexLoss)(x)
        return (found**2).sum() + sum(jax.tree.leaves(losses))

    gradients = nnx.grad(loss)(layer)
    for path, gradient in nnx.to_flat_state(gradients):
        values = np.asarray(gradient[...])
        assert np.isfinite(values).all(), path
        # A bias of keys adds the same to all logits of a query of one branch.
        assert np.abs(values).max() > (0 if path[:2] != ("key", "bias") else -1), path


@pytest.mark.parametrize("learn", ["all", "selected"])
def test_the_indexer_learns_by_its_own_loss_only(learn):
    layer, x = make_indexed(learn=learn), jnp.asarray(inputs(), jnp.float32)

    def split(layer, x):
        found, losses = nnx.capture(layer, nn.IndexLoss)(x)
        return jnp.stack([(found**2).sum(), *jax.tree.leaves(losses)])

    structure, state = nnx.split(layer)
    gradients, (of_output, of_loss) = jax.jacrev(
        lambda state, x: split(nnx.merge(structure, state), x), (0, 1)
    )(state, x)
    assert of_output.any()
    assert not of_loss.any()  # nothing before the layer learns from it
    for path, gradient in nnx.to_flat_state(gradients):
        of_output, of_loss = (np.abs(np.asarray(x)).max() for x in gradient[...])
        if "index" in str(path[0]):
            assert of_output == 0 < of_loss, path
        else:
            assert of_loss == 0, path
    if learn == "all":  # nothing is chosen
        dense = nn.MultiHeadAttention(
            FEATURES, N, num_key_heads=K, mask=masks.causal(), rngs=nnx.Rngs(1)
        )
        found, _ = nnx.capture(layer, nn.IndexLoss)(x)
        np.testing.assert_allclose(found, dense(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scan", [False, True])
def test_losses_of_indexers_leave_a_stack(scan):
    blocks = nn.make_blocks(
        2, features=FEATURES, num_heads=N, mask=masks.causal(), rngs=nnx.Rngs(0),
        attention=functools.partial(nn.IndexedAttention, count=3, learn="selected"),
    )  # fmt: skip
    stack = nn.Stack(blocks, remat=True, scan=scan)

    def loss(stack, x):
        _, losses = nnx.capture(stack, nn.IndexLoss)(x)
        return sum(x.sum() for x in jax.tree.leaves(losses))

    x = jnp.asarray(inputs(8), jnp.float32)
    found, gradients = nnx.jit(nnx.value_and_grad(loss))(stack, x)
    assert found > 0
    for path, gradient in nnx.to_flat_state(gradients):
        if "index_key" in path:
            assert np.abs(np.asarray(gradient[...])).max() > 0, path


def test_a_layer_takes_lists_for_its_key_heads():
    lists = np.random.default_rng(0).integers(0, 8, (K, 8, 3))
    x, found = jnp.asarray(inputs(8), jnp.float32), []
    for mask in (lists, np.repeat(lists, N // K, 0)):
        layer = nn.MultiHeadAttention(
            FEATURES, N, num_key_heads=K, mask=masks.selected(mask), rngs=nnx.Rngs(1)
        )
        found.append(layer(x))
    np.testing.assert_allclose(*found, rtol=1e-6, atol=1e-6)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"cache: a query may select any position"):
        make_mixture(cache=nn.CachePolicy(window=8))
    with pytest.raises(TypeError, match=r"mask: the branches have masks of their own"):
        make_native(mask=masks.full())
    with pytest.raises(ValueError, match=r"learn: expected None, 'all' or 'selected'"):
        make_indexed(learn="dense")
    with pytest.raises(ValueError, match=r"index_heads: expected at least 1, got 0"):
        nn.IndexedAttention(8, 2, count=2, index_heads=0, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"block_size: expected at least 1, got 0"):
        nn.MixtureOfBlocks(8, 2, block_size=0, count=2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"window: expected at least 1, got 0"):
        nn.NativeSparseAttention(8, 2, window=0, rngs=nnx.Rngs(0))
    layer, x = make_indexed(), jnp.asarray(inputs(8), jnp.float32)
    with pytest.raises(TypeError, match=r"memory: expected an IndexedKeyValue"):
        layer.attend(x, nn.KeyValue(*layer.project(x)[:2]))
    plain = nn.full_cache(2, 8, K, FEATURES // N)
    with pytest.raises(ValueError, match=r"index: expected keys of an indexer"):
        layer.decode(x, plain)
    ids = masks.documents(np.zeros(8, int))
    with pytest.raises(NotImplementedError, match=r"mask: attention is causal"):
        make_native()(x, mask=ids)
    with pytest.raises(NotImplementedError, match=r"with_stats: three branches"):
        make_native().with_stats(x)


def test_documents_see_their_own_blocks_only():
    layer, x = make_mixture(), jnp.asarray(inputs(16), jnp.float32)
    ids = np.repeat([0, 1], 8)  # documents that are whole blocks
    found = layer(x, mask=masks.documents(ids))
    apart = jnp.concatenate([layer(x[:, :8]), layer(x[:, 8:])], 1)
    np.testing.assert_allclose(found, apart, rtol=2e-4, atol=2e-5)


@layers
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_heads_that_devices_divide_stay_where_they_are(name, kind):
    layer = LAYERS[name][0]()
    layer.set_attributes(learn="selected", raise_if_not_found=False)
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind,) * 2)
    structure, state = nnx.split(layer)
    rules = {"heads": "model", "key_heads": "model"}

    def put(variable):
        names = variable.get_metadata().get("out_sharding") or ()
        spec = PartitionSpec(*map(rules.get, names))
        return variable.replace(
            jax.device_put(variable[...], NamedSharding(mesh, spec))
        )

    def loss(state, x):
        found, losses = nnx.capture(nnx.merge(structure, state), nn.IndexLoss)(x)
        return (found**2).mean() + sum(jax.tree.leaves(losses))

    x, run = jnp.asarray(inputs(), jnp.float32), jax.jit(jax.grad(loss))
    is_variable = lambda x: isinstance(x, nnx.Variable)
    with jax.set_mesh(mesh):
        placed = jax.tree.map(put, state, is_leaf=is_variable)
        given = placed, jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
        program = run.lower(*given).compile()
        found = jax.device_get(program(*given))
    for one, other in zip(*map(jax.tree.leaves, (found, run(state, x))), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-5)
    text = str(program.as_text())
    assert "all-to-all" not in text
    assert "collective-permute" not in text
