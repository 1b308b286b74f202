"""Multi-head attention: its equation, parts and errors."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import attention, masks, modifiers, nn, scores
from tests.grid import few


def inputs(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def by_hand(layer, query, key=None, value=None, **options):
    """The equation of multi-head attention, with the parameters of ``layer``."""
    key = query if key is None else key
    value = key if value is None else value

    def project(linear, x):
        y = jnp.einsum("btf,fnh->btnh", x, linear.kernel[...])
        return y if linear.bias is None else y + linear.bias[...][None, None]

    heads = attention(
        project(layer.query, query),
        project(layer.key, key),
        project(layer.value, value),
        implementation="reference",
        **options,
    )
    y = jnp.einsum("btnd,ndf->btf", heads, layer.out.kernel[...])
    return y if layer.out.bias is None else y + layer.out.bias[...][None, None]


def test_self_attention_is_its_equation():
    layer = nn.MultiHeadAttention(12, 3, rngs=nnx.Rngs(0))
    x = inputs(2, 7, 12)
    np.testing.assert_allclose(layer(x), by_hand(layer, x), atol=1e-5)


def test_cross_attention_with_other_sizes_and_grouped_heads():
    layer = nn.MultiHeadAttention(
        12,
        4,
        num_key_heads=2,
        key_features=10,
        head_size=6,
        value_size=5,
        out_features=9,
        mask=masks.causal(),
        modifiers=[modifiers.soft_cap(3.0)],
        rngs=nnx.Rngs(0),
    )
    x, memory, values = inputs(2, 7, 12), inputs(2, 5, 10, seed=1), inputs(2, 5, 10)
    expected = by_hand(
        layer,
        x,
        memory,
        values,
        mask=masks.causal(),
        modifiers=[modifiers.soft_cap(3.0)],
    )
    assert expected.shape == (2, 7, 9)
    np.testing.assert_allclose(layer(x, memory, values), expected, atol=1e-5)


def test_mask_of_the_call_is_added_to_its_own():
    layer = nn.MultiHeadAttention(8, 2, mask=masks.causal(), rngs=nnx.Rngs(0))
    x, lengths = inputs(2, 6, 8), jnp.array([4, 6])
    expected = by_hand(layer, x, mask=masks.causal() & masks.lengths(key=lengths))
    found = layer(x, mask=masks.lengths(key=lengths))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    dense = np.arange(6) < np.asarray(lengths)[:, None, None, None]
    np.testing.assert_allclose(layer(x, mask=dense), expected, atol=1e-5)


@pytest.mark.parametrize(
    "score",
    [
        scores.additive.init(jax.random.key(1), 4, hidden_size=5),
        scores.bilinear.init(jax.random.key(1), 4),
        scores.cosine(jnp.array([2.0, 3.0])),
        scores.mlp.init(jax.random.key(1), 4, hidden_sizes=(5, 3)),
    ],
    ids=["additive", "bilinear", "cosine", "mlp"],
)
def test_a_score_is_learned(score):
    layer = nn.MultiHeadAttention(8, 2, score=score, rngs=nnx.Rngs(0))
    x = inputs(1, 6, 8)
    np.testing.assert_allclose(layer(x), by_hand(layer, x, score=score), atol=1e-5)
    gradient = nnx.grad(lambda layer: (layer(x) ** 2).sum())(layer)
    leaves = jax.tree.leaves(gradient["score"])
    assert len(leaves) == len(jax.tree.leaves(score))
    # At least one parameter of each score must have a gradient.
    assert max(float(jnp.abs(leaf).max()) for leaf in leaves) > 1e-4


def test_modifiers_are_not_learned():
    layer = nn.MultiHeadAttention(
        8, 2, modifiers=[modifiers.alibi(2)], rngs=nnx.Rngs(0)
    )
    names = {path[0] for path, _ in nnx.to_flat_state(nnx.state(layer, nnx.Param))}
    assert names == {"query", "key", "value", "out"}


def test_norms_of_queries_and_keys():
    rngs = nnx.Rngs(0)
    layer = nn.MultiHeadAttention(
        8,
        2,
        query_norm=nnx.RMSNorm(4, rngs=rngs),
        key_norm=nnx.RMSNorm(4, rngs=rngs),
        rngs=rngs,
    )
    x = inputs(1, 5, 8)
    # The scale of projections does not matter if queries and keys are normalised.
    before = layer(x)
    layer.query.kernel[...] *= 3.0
    layer.key.kernel[...] *= 0.5
    np.testing.assert_allclose(layer(x), before, atol=1e-4)


def test_sinks_are_learned():
    layer = nn.MultiHeadAttention(8, 2, sinks=jnp.zeros(2), rngs=nnx.Rngs(0))
    x = inputs(1, 5, 8)
    expected = by_hand(layer, x, sinks=jnp.zeros(2))
    np.testing.assert_allclose(layer(x), expected, atol=1e-5)
    gradient = nnx.grad(lambda layer: (layer(x) ** 2).sum())(layer)
    assert (jnp.abs(gradient["sinks"][...]) > 1e-6).all()


def test_anchors_have_projections_of_their_own():
    rngs = nnx.Rngs(0)
    layer = nn.AnchoredAttention(
        8,
        2,
        mask=masks.longformer(window=2, anchors=1),
        anchors=nn.AnchorProjections(8, 2, 4, positions=1, rngs=rngs),
        rngs=rngs,
    )
    x = inputs(2, 9, 8)
    found = layer(x)
    ordinary = by_hand(layer, x, mask=masks.longformer(window=2, anchors=1))
    np.testing.assert_allclose(found[:, 1:], ordinary[:, 1:], atol=1e-5)
    own = layer.anchors
    heads = attention(own.query(x[:, :1]), own.key(x), own.value(x))
    np.testing.assert_allclose(found[:, :1], layer.out(heads), atol=1e-5)
    assert float(jnp.abs(found[:, 0] - ordinary[:, 0]).max()) > 1e-2


@pytest.mark.parametrize(
    "position", [lambda rngs: nn.Rotary(), lambda rngs: nn.RelativeBias(2, rngs=rngs)]
)
def test_anchors_have_the_positions_and_norms_of_all(position):
    """Anchor projections that equal the ordinary ones do not change the output."""

    def layer(kind, **own):
        rngs = nnx.Rngs(0)
        return kind(
            8,
            2,
            mask=masks.longformer(window=2, anchors=1),
            position=position(rngs),
            query_norm=nnx.RMSNorm(4, rngs=rngs),
            key_norm=nnx.RMSNorm(4, rngs=rngs),
            rngs=rngs,
            **own,
        )

    ordinary = layer(nn.MultiHeadAttention)
    anchors = nn.AnchorProjections(8, 2, 4, positions=1, rngs=nnx.Rngs(1))
    own = layer(nn.AnchoredAttention, anchors=anchors)
    for name in ("query", "key", "value"):
        nnx.update(getattr(own.anchors, name), nnx.state(getattr(own, name)))
    x = inputs(2, 9, 8)
    for where in ({}, {"query_positions": jnp.arange(9) * 2}):
        found, wanted = (jax.jit(layer)(x, **where) for layer in (own, ordinary))
        np.testing.assert_allclose(found, wanted, atol=1e-5)


IDS = np.array([[0, 0, 0, 0, 1, 1, 1, 2, -1]] * 2)
CALLS = {
    "documents": lambda: masks.documents(IDS),
    "lengths": lambda: masks.lengths(query=np.array([4, 9]), key=np.array([4, 9])),
    "dense": lambda: masks.dense(np.random.default_rng(0).random((2, 1, 9, 9)) < 0.6),
    "heads": lambda: (
        masks.per_head([masks.documents(IDS), masks.causal()]) | masks.prefix(1)
    ),
    "blocks": lambda: masks.big_bird(
        window=1, anchors=1, random_blocks=1, rng=0, block_size=3
    ),
}


@pytest.mark.parametrize("name", few(CALLS, "dense", "heads", "blocks"))
def test_anchors_obey_the_mask_of_the_call(name):
    """The mask's rows at their slots apply to anchors, also with separate values."""

    def layer(kind, **own):
        return kind(
            8,
            2,
            mask=masks.longformer(window=2, anchors=[0, 5]),
            rngs=nnx.Rngs(0),
            **own,
        )

    ordinary = layer(nn.MultiHeadAttention)
    anchors = nn.AnchorProjections(8, 2, 4, positions=[0, 5], rngs=nnx.Rngs(1))
    own = layer(nn.AnchoredAttention, anchors=anchors)
    for part in ("query", "key", "value"):
        nnx.update(getattr(own.anchors, part), nnx.state(getattr(own, part)))
    x, values = inputs(2, 9, 8), inputs(2, 9, 8)[::-1]
    mask = CALLS[name]()
    found, wanted = (
        jax.jit(layer)(x, x, values, mask=mask) for layer in (own, ordinary)
    )
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_weights_for_pictures():
    layer = nn.MultiHeadAttention(8, 2, rngs=nnx.Rngs(0))
    x = inputs(2, 5, 8)
    result = layer.with_stats(x, top_k="all")
    assert result.weights is not None
    np.testing.assert_allclose(result.weights.sum(-1), np.ones((2, 2, 5)), rtol=1e-5)
    np.testing.assert_array_equal(result.output, layer(x))


def test_dropout_follows_train_and_eval():
    layer = nn.MultiHeadAttention(8, 2, dropout_rate=0.5, rngs=nnx.Rngs(0))
    x = inputs(1, 16, 8)
    layer.train()
    first, second = layer(x), layer(x)
    assert float(jnp.abs(first - second).max()) > 1e-3
    layer.eval()
    np.testing.assert_array_equal(layer(x), layer(x))
    np.testing.assert_allclose(layer(x), by_hand(layer, x), atol=1e-5)


@pytest.mark.parametrize("of", ["layer", "alignment"])
def test_precision_reaches_keys_that_are_projected_before(of):
    score = scores.bilinear.init(jax.random.key(0), 4, 4)
    options = {"score": score, "precision": "highest", "implementation": "tiled"}
    x = inputs(2, 9, 8 if of == "layer" else 4)
    if of == "layer":
        layer = nn.MultiHeadAttention(8, 2, rngs=nnx.Rngs(0), **options)
    else:
        layer = nn.Alignment(**options)

    def call(x):
        return layer.attend(x, layer.project(x))

    with jax.default_matmul_precision("default"):
        assert "DEFAULT" not in jax.jit(call).lower(x).as_text()


def test_projected_once_for_many_queries():
    score = scores.additive.init(jax.random.key(1), 4, hidden_size=5)
    layer = nn.MultiHeadAttention(8, 2, score=score, rngs=nnx.Rngs(0))
    x, memory = inputs(2, 3, 8), inputs(2, 6, 8, seed=1)
    once = layer.project(memory)
    assert once.key.shape == (2, 6, 2, 5)
    np.testing.assert_allclose(layer.attend(x, once), layer(x, memory), atol=1e-5)


def test_types():
    layer = nn.MultiHeadAttention(8, 2, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert layer(inputs(1, 5, 8)).dtype == jnp.bfloat16
    assert layer.query.kernel.dtype == jnp.float32


def test_logical_axes_reach_a_mesh():
    from flax.core.spmd import logical_axis_rules

    layer = nn.MultiHeadAttention(8, 4, num_key_heads=2, rngs=nnx.Rngs(0))
    rules = [("heads", "model"), ("key_heads", "model"), ("embed", None)]
    with logical_axis_rules([*rules, ("head_size", None)]):
        specs: Any = nnx.get_partition_spec(nnx.state(layer))
    P = jax.sharding.PartitionSpec
    assert specs["query"]["kernel"].get_value() == P(None, "model", None)
    assert specs["key"]["bias"].get_value() == P("model", None)
    assert specs["out"]["kernel"].get_value() == P("model", None, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_heads=3), "num_heads: 3 heads do not divide in_features=8"),
        (dict(num_heads=4, num_key_heads=3), "num_key_heads: .* got 3"),
    ],
)
def test_sizes_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        nn.MultiHeadAttention(8, **options, rngs=nnx.Rngs(0))


def test_projections_are_a_part():
    def shared(features, heads, *, rank, rngs, **options):
        """Projections with keys equal to the queries, and smaller values."""
        made = nn.Projections.linear(features, heads, rngs=rngs, **options)
        cut = nnx.LinearGeneral(features, (heads, rank), rngs=rngs)
        out = nnx.LinearGeneral((heads, rank), features, axis=(-2, -1), rngs=rngs)
        return made._replace(key=made.query, value=cut, out=out)

    layer = nn.MultiHeadAttention(
        8, 2, projections=shared, rank=3, use_bias=False, rngs=nnx.Rngs(0)
    )
    x = inputs(2, 5, 8)
    heads = attention(layer.query(x), layer.query(x), layer.value(x))
    np.testing.assert_allclose(layer(x), layer.out(heads), atol=1e-5)
    assert (layer.key is layer.query, layer.value_size) == (True, 3)
    assert layer.query.bias is None
    with pytest.raises(TypeError, match="num_kv_heads"):
        nn.MultiHeadAttention(8, 2, num_kv_heads=1, rngs=nnx.Rngs(0))


def test_anchor_beyond_the_sequence():
    rngs = nnx.Rngs(0)
    anchors = nn.AnchorProjections(8, 2, 4, positions=[7], rngs=rngs)
    layer = nn.AnchoredAttention(8, 2, anchors=anchors, rngs=rngs)
    with pytest.raises(ValueError, match="anchors: slot 7 is beyond the 5 queries"):
        layer(inputs(1, 5, 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(position=nn.Rotary), "position: .* got the class Rotary; call it"),
        (dict(position=nn.sinusoids), r"position: .* got function; write Rot"),
        (
            dict(position=nn.Learned(5, 8, rngs=nnx.Rngs(0))),
            r"position: Learned .* belongs in Embedding\(position=",
        ),
        (dict(position=nn.Sinusoidal), r"position: Sinusoidal .* in Embedding\("),
        (dict(cache=64), r"cache: expected nn.CachePolicy\(window=.*got 64"),
        (dict(anchors=None), r"anchors: nn.AnchoredAttention\("),
        (
            dict(projections=lambda *_, **__: None),
            "projections: expected a function that returns nn.Projections, got NoneT",
        ),
        (
            dict(modifiers=modifiers.alibi(2)),
            r"modifiers: expected a sequence; write modifiers=\[",
        ),
    ],
)
def test_parts_that_are_something_else(options, message):
    with pytest.raises(TypeError, match=message):
        nn.MultiHeadAttention(8, 2, **options, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(8,)], r"query: expected .* got shape \(8,\)"),
        ([(1, 5, 9)], r"query: expected \[\*batch, length, 8\], got shape \(1, 5, 9\)"),
        ([(1, 5, 8), (1, 4, 7)], r"key: expected .* got shape \(1, 4, 7\)"),
        ([(1, 5, 8), (1, 4, 8), (8,)], r"value: expected .* got shape \(8,\)"),
    ],
)
def test_inputs_of_other_features(shapes, message):
    layer = nn.MultiHeadAttention(8, 2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=message):
        layer(*(inputs(*shape) for shape in shapes))


def test_query_of_rank_one_to_what_was_projected():
    layer = nn.MultiHeadAttention(8, 2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"query: expected .* got shape \(8,\)"):
        layer.attend(inputs(8), layer.project(inputs(1, 4, 8)))


def test_eight_bits_are_refused():
    layer = nn.MultiHeadAttention(8, 2, rngs=nnx.Rngs(0))
    x = jnp.ones((1, 3, 8), jnp.float8_e4m3fn)
    with pytest.raises(TypeError, match=r"^query: .* got float8_e4m3fn; .*bfloat16"):
        layer(x)
    with pytest.raises(TypeError, match=r"^key: .* got float8_e4m3fn; .*bfloat16"):
        layer(jnp.ones((1, 3, 8)), x)
