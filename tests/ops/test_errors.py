"""Bad input: errors name the argument, what was given, and what is expected."""

import dataclasses
import types
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import (
    attention,
    attention_with_stats,
    cost,
    explain,
    masks,
    modifiers,
    scores,
)
from attnlab._src.types import Modifier, Score, pytree
from tests.implementations import interpreted

RNG = jax.random.key(0)
Q = jnp.zeros((2, 7, 6, 8))
K = jnp.zeros((2, 5, 3, 8))
V = jnp.zeros((2, 5, 3, 4))
ONES = np.ones((1, 4, 4), "f")
ADDITIVE = scores.additive.init(RNG, 8, hidden_size=4)
MLP = scores.mlp.init(RNG, 8, hidden_sizes=(4, 4))


class Undecorated(Modifier):
    pass


def torch_like(x):
    """An array of a library whose dtypes NumPy does not know."""
    return types.SimpleNamespace(shape=x.shape, dtype="torch.float32")


def call(query=Q, key=K, value=V, **options):
    return lambda: attention(query, key, value, **options)


def like(x, **changes):
    """Zeros like ``x``, with other sizes of the axes that ``changes`` names."""
    shape = list(x.shape)
    for name, size in changes.items():
        shape["BLNH".index(name)] = size
    return jnp.zeros(shape, x.dtype)


CASES = {
    "query is no array": (call(query=[1.0]), TypeError, "query: expected an array"),
    "rank": (call(query=Q[0, 0]), ValueError, r"query: .*three axes.*\(6, 8\)"),
    "integers": (call(key=K.astype(int)), TypeError, "key: expected a floating dtype"),
    "dtype": (
        call(value=V.astype(jnp.bfloat16)),
        TypeError,
        "value: dtype bfloat16 differs from the query's float32; cast",
    ),
    "batch": (call(key=like(K, B=3)), ValueError, r"key: batch axes \(3,\) differ"),
    "length": (call(value=like(V, L=6)), ValueError, "value: length S is 6.*5"),
    "heads of value": (call(value=like(V, N=2)), ValueError, "value: heads K is 2.*3"),
    "groups": (call(query=like(Q, N=4)), ValueError, "query: 4 heads .* 3 key/value"),
    "head size": (call(key=like(K, H=6)), ValueError, "ScaledDot .* head size 8 .*6"),
    "score class": (call(score=scores.dot), TypeError, "score: .*class: call it"),
    "score string": (call(score="dot"), TypeError, "score: expected an attnlab score"),
    "score for other sizes": (
        call(score=scores.bilinear.init(jax.random.key(0), 3)),
        ValueError,
        r"score: Bilinear cannot project query \(2, 7, 6, 8\)",
    ),
    "score for other heads": (
        call(
            score=scores.additive.init(jax.random.key(0), 8, hidden_size=4, num_heads=5)
        ),
        ValueError,
        "score: Additive cannot project",
    ),
    "no modifiers": (
        call(modifiers=None),
        TypeError,
        r"modifiers: expected a sequence, got None; write modifiers=\[",
    ),
    "several keys of dropout": (
        call(dropout_rate=0.1, dropout_rng=jax.random.split(jax.random.key(0), 2)),
        ValueError,
        r"dropout_rng: expected one PRNG key, got an array of shape \(2,\)",
    ),
    "streams of dropout": (
        call(dropout_rate=0.1, dropout_rng=nnx.Rngs(0)),
        TypeError,
        r"dropout_rng: expected a PRNG key, got Rngs; .*rngs.dropout\(\)",
    ),
    "8 bits": (
        call(*(x.astype(jnp.float8_e4m3fn) for x in (Q, K, V))),
        TypeError,
        "query: expected a floating dtype of at least 16 bits, got float8_e4m3fn",
    ),
    "several masks": (
        call(mask=[masks.causal(), masks.full()]),
        TypeError,
        "mask: expected one mask, got a list of them; combine them with '&'",
    ),
    "mask of integers": (
        call(mask=masks.predicate(lambda t, s: (t + s) % 3)),
        TypeError,
        r"mask: predicate\(<lambda>\) yields int32, expected booleans",
    ),
    "mask of another shape": (
        call(mask=~masks.predicate(lambda t, s: jnp.ones((3, 3), bool))),
        ValueError,
        r"mask: .*predicate.* yields shape \(3, 3\) for a tile of",
    ),
    "modifier alone": (
        call(modifiers=modifiers.soft_cap(3.0)),
        TypeError,
        r"modifiers: expected a sequence, got SoftCap.*; write modifiers=\[",
    ),
    "array as modifier": (
        call(modifiers=[jnp.zeros((7, 5))]),
        TypeError,
        r"modifiers: .*modifiers.bias\(array\)",
    ),
    "bias of another length": (
        call(modifiers=[modifiers.bias(jnp.zeros((7, 4)))]),
        ValueError,
        "modifiers: .* does not fit S=5",
    ),
    "boolean bias": (
        lambda: modifiers.bias(np.ones((7, 5), bool)),
        TypeError,
        "bias: .*pass it as mask=",
    ),
    "slopes of other heads": (
        call(modifiers=[modifiers.alibi(4)]),
        ValueError,
        "modifiers: .* does not fit N=6",
    ),
    "numeric mask": (call(mask=jnp.zeros((7, 5))), TypeError, "mask: .*modifiers.bias"),
    "mask string": (call(mask="causal"), TypeError, "mask: expected an attnlab mask"),
    "flat mask": (call(mask=np.ones(5, bool)), ValueError, r"mask: .*\[T, S\]"),
    "mask of other lengths": (
        call(mask=np.ones((7, 6), bool)),
        ValueError,
        "mask: .* does not fit S=5",
    ),
    "mask of other heads": (
        call(mask=np.ones((4, 7, 5), bool)),
        ValueError,
        "mask: .* does not fit N=6",
    ),
    "mask of another batch": (
        call(mask=np.ones((3, 1, 7, 5), bool)),
        ValueError,
        r"mask: .*batch axes \(2,\)",
    ),
    "documents of other lengths": (
        call(mask=masks.documents(np.zeros(7, int))),
        ValueError,
        "key_ids=.*built for length 7, used with length 5",
    ),
    "floating ids": (
        lambda: masks.documents(np.zeros(7)),
        TypeError,
        "query_ids: expected integers, got float64",
    ),
    "no lengths": (masks.lengths, ValueError, "lengths: give query=, key= or both"),
    "layout of other lengths": (
        call(mask=masks.random_blocks(0, 1, 2, 2)),
        ValueError,
        "built for 2 blocks, 4 positions, used with length 7; it needs 4 blocks",
    ),
    "too many random blocks": (
        lambda: masks.random_blocks(0, 5, 2, 4),
        ValueError,
        "blocks_per_row: expected at most num_blocks=4, got 5",
    ),
    "masks for other heads": (
        call(mask=masks.per_head([masks.causal()] * 2)),
        ValueError,
        "mask: per_head got 2 masks for 6 query heads",
    ),
    "heads of heads": (
        call(mask=masks.per_head([masks.dense(np.ones((6, 7, 5), bool))] * 6)),
        ValueError,
        "varies by head itself; give each head its own part of it",
    ),
    "heads within": (
        lambda: masks.per_head([masks.causal() & masks.per_head([masks.full()] * 2)]),
        ValueError,
        "a mask within per_head cannot be per_head itself",
    ),
    "precision": (
        call(precision="hihgest"),
        ValueError,
        "precision: expected None, 'default', 'high', 'highest', .* got 'hihgest'",
    ),
    "implementation of nothing": (
        lambda: attention(Q[:, :0], K, V, implementation="flash"),
        ValueError,
        "implementation: expected one of .* got 'flash'",
    ),
    "mask of nothing": (
        lambda: attention(Q[:, :0], K, V, mask=masks.documents(np.zeros(7, int))),
        ValueError,
        "built for length 7, used with length 0",
    ),
    "no heads": (lambda: masks.per_head([]), ValueError, "masks: expected one mask"),
    "anchor at the end": (
        lambda: masks.anchor([2**31 - 1]),
        ValueError,
        "positions: expected less than 2147483647, got 2147483647; give .* index array",
    ),
    "negative window": (
        lambda: masks.sliding_window(-1, 0),
        ValueError,
        "left: expected at least 0, got -1",
    ),
    "floating window": (
        lambda: masks.sliding_window(1, cast(Any, 2.5)),
        TypeError,
        "right: expected an int .* got float",
    ),
    "zero step": (lambda: masks.dilated_window(1, 1, 0), ValueError, "step: .* got 0"),
    "zero chunk": (lambda: masks.chunked(0), ValueError, "size: .* got 0"),
    "negative anchor": (lambda: masks.anchor([-1]), ValueError, "positions: .* got -1"),
    "idle anchor": (
        lambda: masks.anchor(1, visible_to_all=False, see_all=False),
        ValueError,
        "both False",
    ),
    "masks by and": (
        lambda: masks.causal() and masks.full(),
        TypeError,
        "combine masks with '&', '|' and '~'",
    ),
    "block size": (
        lambda: masks.causal().plan(8, block_size=0),
        ValueError,
        "block_size: expected at least 1, got 0",
    ),
    "sinks": (call(sinks=jnp.zeros(3)), ValueError, r"sinks: expected shape \(6,\)"),
    "dropout rate": (call(dropout_rate=1.0), ValueError, r"dropout_rate: .*\[0, 1\)"),
    "dropout rate as text": (call(dropout_rate="0.1"), ValueError, "got '0.1'"),
    "dropout without rng": (call(dropout_rate=0.1), ValueError, "dropout_rng: .* None"),
    "offset": (call(query_offset=1.5), TypeError, "query_offset: .* got float"),
    "offset shape": (
        call(query_offset=jnp.zeros(3, int)),
        ValueError,
        r"query_offset: expected a scalar or shape \(2,\), got \(3,\)",
    ),
    "positions shape": (
        call(key_positions=jnp.zeros(7, int)),
        ValueError,
        r"key_positions: expected shape \(5,\) or \(2, 5\), got \(7,\)",
    ),
    "floating positions": (
        call(query_positions=jnp.zeros(7)),
        TypeError,
        "query_positions: expected integers",
    ),
    "two kinds of position": (
        call(query_positions=jnp.arange(7), query_offset=2),
        ValueError,
        "give one of the two",
    ),
    "implementation": (
        call(implementation="flash"),
        ValueError,
        "implementation: expected one of native, pallas_tpu, pallas_gpu, batched, "
        "tiled, splash, jax_nn, reference or None, got 'flash'",
    ),
    "refusal": (
        call(
            implementation="jax_nn",
            score=scores.additive.init(jax.random.key(0), 8, hidden_size=9),
            dropout_rate=0.1,
            dropout_rng=jax.random.key(0),
        ),
        NotImplementedError,
        "'jax_nn' cannot .*not an inner product; it has no dropout; .*head size",
    ),
    "top_k of what": (
        lambda: attention_with_stats(Q, K, V, top_k=cast(Any, "most")),
        ValueError,
        "top_k: expected None, 'all' or an int",
    ),
    "too great a top_k": (
        lambda: attention_with_stats(Q, K, V, top_k=6),
        ValueError,
        r"top_k: expected at most S=5 \(keys\), got 6",
    ),
    "soft cap": (lambda: modifiers.soft_cap(0.0), ValueError, "cap: .* got 0.0"),
    "clipped table": (
        lambda: modifiers.clipped_relative(np.zeros((1, 4)), left=1, right=1),
        ValueError,
        r"table: expected \[N or 1, 3\]",
    ),
    "bucket table": (
        lambda: modifiers.relative_bias(np.zeros((1, 2))),
        ValueError,
        "table: 2 buckets do not fit max_distance=128",
    ),
    "hidden sizes": (
        lambda: scores.mlp.init(RNG, 8, hidden_sizes=()),
        ValueError,
        "hidden_sizes: expected at least one",
    ),
    "one hidden size": (
        lambda: scores.mlp.init(RNG, 8, hidden_sizes=cast(Any, 8)),
        TypeError,
        r"hidden_sizes: expected a sequence of sizes, got 8; write hidden_sizes=\(8,\)",
    ),
    "half a hidden size": (
        lambda: scores.mlp.init(RNG, 8, hidden_sizes=(8, cast(Any, 2.5))),
        TypeError,
        "hidden_sizes: expected an int, got 2.5",
    ),
    "name of an activation": (
        lambda: scores.mlp.init(
            RNG, 8, hidden_sizes=(8,), activation=cast(Any, "relu")
        ),
        TypeError,
        "activation: expected a function, got 'relu'; for instance jax.nn.relu",
    ),
    "layers that do not fit": (
        call(score=dataclasses.replace(MLP, hidden=((ONES[:, :3], ONES[:, 0]),))),
        ValueError,
        r"score: hidden\[0\]\[0\]: expected \[N or 1, 4, out\], got shape \(1, 3, 4\)",
    ),
    "negative size": (
        lambda: scores.additive.init(RNG, 8, hidden_size=-3),
        ValueError,
        "hidden_size: expected at least 1, got -3",
    ),
    "seed of a score": (
        lambda: scores.bilinear.init(cast(Any, 0), 8),
        TypeError,
        "rng: expected a PRNG key, got int; jax.random.key makes one",
    ),
    "bias of concat": (
        lambda: scores.concat.init(RNG, 8, hidden_size=3, bias=True),
        TypeError,
        "bias: concat has none; use additive",
    ),
    "no parameters": (
        call(score=scores.additive(None, None, None, None)),
        ValueError,
        "score: Additive cannot project .*query_weight: expected real .*, got None",
    ),
    "no weight": (
        call(score=dataclasses.replace(ADDITIVE, weight=None)),
        TypeError,
        "score: weight: expected real numbers, got None",
    ),
    "weight of another size": (
        call(score=dataclasses.replace(ADDITIVE, weight=jnp.ones((1, 3)))),
        ValueError,
        r"score: weight: expected \[N or 1, 4\], got shape \(1, 3\)",
    ),
    "scalar as matrix": (
        call(score=scores.bilinear(2.0)),
        ValueError,
        r"score: Bilinear .*weight: expected \[6 or 1, 8, P\], got shape \(\)",
    ),
    "matrix of integers": (
        call(score=scores.bilinear(np.ones((1, 8, 8), int))),
        ValueError,
        "weight: expected a floating array, got int.*cast it",
    ),
    "scale as text": (
        call(score=scores.scaled_dot("a")),
        TypeError,
        "score: ScaledDot.scale: expected an array .*got str",
    ),
    "imaginary scale": (
        call(score=scores.scaled_dot(1j)),
        TypeError,
        "scale: expected real numbers, got complex",
    ),
    "temperature of other heads": (
        call(score=scores.cosine(np.ones(5, "f"))),
        ValueError,
        r"score: Cosine expected one factor or .* 6 query heads, got shape \(5,\)",
    ),
    "projected keys of nothing": (
        lambda: scores.projected_keys(cast(Any, scores.dot)),
        TypeError,
        "score: expected an attnlab score.*class: call it",
    ),
    "no cap": (
        lambda: modifiers.soft_cap(cast(Any, None)),
        TypeError,
        "cap: expected real numbers, got None",
    ),
    "negative cap": (
        lambda: modifiers.soft_cap(np.float32(-1)),
        ValueError,
        "cap: expected a positive finite number, got -1.0",
    ),
    "infinite cap": (
        lambda: modifiers.soft_cap(np.array([1, np.inf])),
        ValueError,
        "cap: expected a positive finite number",
    ),
    "integers as bias": (
        lambda: modifiers.bias(np.ones((7, 5), int)),
        TypeError,
        "bias: expected a floating array, got int64; cast it with .astype",
    ),
    "bias with too many axes": (
        call(modifiers=[modifiers.bias(np.ones((1, 1, 1, 1, 7, 5), "f"))]),
        ValueError,
        r"modifiers: Bias: shape \(1, 1, 1, 1, 7, 5\) does not fit batch axes \(2,\)",
    ),
    "no slopes": (
        lambda: modifiers.alibi(cast(Any, None)),
        TypeError,
        "slopes: expected real numbers, got None",
    ),
    "buckets of integers": (
        lambda: modifiers.relative_bias(np.ones((1, 32), int)),
        TypeError,
        "table: expected a floating array, got int64; cast it",
    ),
    "offsets of integers": (
        lambda: modifiers.clipped_relative(np.ones((1, 3), int), left=1, right=1),
        TypeError,
        "table: expected a floating array, got int64; cast it",
    ),
    "class of a modifier": (
        call(modifiers=[type(modifiers.alibi(2))]),
        TypeError,
        "modifiers: Alibi is a class: call it",
    ),
    "number of modifiers": (call(modifiers=3), TypeError, "expected a sequence, got 3"),
    "class that is no pytree": (
        call(modifiers=[Undecorated()]),
        TypeError,
        "modifiers: Undecorated is no pytree; decorate it with attnlab.extend.pytree",
    ),
    "integers as sinks": (
        call(sinks=np.ones(6, int)),
        TypeError,
        "sinks: expected a floating array, got int64; cast it with .astype",
    ),
    "rates of dropout": (
        call(dropout_rate=np.array([0.1]), dropout_rng=RNG),
        ValueError,
        r"dropout_rate: expected a number in \[0, 1\), got array\(\[0.1\]\)",
    ),
    "numbers as key of dropout": (
        call(dropout_rate=0.1, dropout_rng=jnp.ones(2)),
        TypeError,
        "dropout_rng: expected a PRNG key, got an array of float32",
    ),
    "too long a key of dropout": (
        call(dropout_rate=0.1, dropout_rng=jnp.ones(3, jnp.uint32)),
        ValueError,
        "dropout_rng: 3 words are no key of JAX's default generator",
    ),
    "array of another library": (
        call(query=torch_like(Q)),
        TypeError,
        "query: expected an array of JAX's or NumPy's, got types.Simple.*jnp.asarray",
    ),
    "list of precisions": (
        call(precision=["highest"]),
        ValueError,
        r"precision: expected None.*got \['highest'\]",
    ),
    "precision of an array": (
        call(precision=np.array(1)),
        ValueError,
        r"precision: expected None.*got array\(1\)",
    ),
    "list of implementations": (
        call(implementation=["native"]),
        ValueError,
        r"implementation: expected one of .* got \['native'\]",
    ),
    "unknown argument": (
        lambda: cast(Any, attention_with_stats)(Q, K, V, foo=1),
        TypeError,
        r"attention_with_stats\(\) got an unexpected keyword argument 'foo'; it takes "
        "score, mask",
    ),
    "argument of another function": (
        lambda: cast(Any, explain)(Q, K, V, top_k=1),
        TypeError,
        r"explain\(\) got an unexpected keyword argument 'top_k'",
    ),
    "platform": (
        lambda: cost(Q, K, V, platform="metal"),
        ValueError,
        "platform: expected one of cpu, cuda, rocm, tpu, gpu or None, got 'metal'",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_message(name):
    run, kind, message = CASES[name]
    with pytest.raises(kind, match=message):
        run()


def own_score(compare) -> dict[str, Any]:
    @pytree
    class Own(Score):
        def compare(self, params, query, key):
            return compare(query, key)

    return {"score": Own()}


def own_modifier(apply) -> dict[str, Any]:
    @pytree
    class Own(Modifier):
        # Without operands there are none to take.
        def apply(self, logits, tile):  # pyrefly: ignore[bad-override]
            return apply(logits)

    return {"modifiers": [Own()]}


@pytree
class Narrow(Score):
    def project_key(self, key):
        return key[:, :, 0]


OWN: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no axis for the keys": (
        own_score(lambda q, k: -jnp.abs(q - k).sum(-1)),
        TypeError,
        "score: Own.compare fails for a tile of 2 x 3 pairs: .*incompatible shapes.*; "
        "it must work on tiles of any size",
    ),
    "one key": (
        own_score(lambda q, k: q.sum(-1, keepdims=True)),
        ValueError,
        r"score: Own.compare yields shape \(2, 1\) .*, expected \(2, 3\)",
    ),
    "a number": (own_score(lambda q, k: 1.0), ValueError, r"yields shape \(\) for"),
    "booleans": (
        own_score(lambda q, k: q @ k.T > 0),
        TypeError,
        "score: Own.compare yields bool, expected a real floating type",
    ),
    "complex": (
        own_score(lambda q, k: (q @ k.T).astype(complex)),
        TypeError,
        "yields complex64",
    ),
    "projection": (
        {"score": Narrow()},
        ValueError,
        r"score: Narrow.project_key makes shape \(1, 4, 8\) of \(1, 4, 2, 8\)",
    ),
    "turned": (
        own_modifier(lambda x: x.T),
        ValueError,
        r"modifiers: Own.apply yields shape \(3, 2\) .*, expected \(2, 3\)",
    ),
    "one for each query": (own_modifier(lambda x: x[:, 0]), ValueError, r"\(2,\) for"),
    "booleans of a modifier": (
        own_modifier(lambda x: x > 0),
        TypeError,
        "modifiers: Own.apply yields bool",
    ),
    "no apply": (
        {"modifiers": [pytree(cast(Any, type("Own", (Modifier,), {})))()]},
        TypeError,
        "modifiers: Own.apply fails .*a modifier needs an apply of its own",
    ),
}


@pytest.mark.parametrize("name", OWN)
def test_what_own_scores_and_modifiers_yield_is_checked_whoever_runs(name, monkeypatch):
    """With as many queries as keys, so that a wrong shape could broadcast."""
    interpreted.register(monkeypatch)
    x = jnp.ones((1, 4, 2, 8))
    options, kind, message = OWN[name]
    asked = (None, "reference", "tiled", "native", interpreted.NAME, "jax_nn", "splash")
    for implementation in asked:
        with pytest.raises(kind, match=message):
            attention(x, x, x, implementation=implementation, **options)
    for ask in (explain, cost):
        with pytest.raises(kind, match=message):
            ask(x, x, x, **options)


def test_half_precision_of_a_users_own_is_enough():
    x = jnp.ones((1, 4, 2, 8))
    options = own_score(lambda q, k: (q @ k.T).astype(jnp.bfloat16))
    options |= own_modifier(lambda x: x.astype(jnp.float16))
    two: Any = np.int64(2)
    result = attention_with_stats(x, x, x, **options, top_k=two)
    assert result.lse.dtype == jnp.float32
    assert result.weights is not None
    assert result.weights.shape[-1] == 2
