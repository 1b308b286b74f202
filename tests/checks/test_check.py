"""``extend.check`` and ``extend.register``: what passes, and what is reported."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import attention, explain, extend, masks, modifiers, scores
from attnlab._src.implementations import IMPLEMENTATIONS
from attnlab._src.implementations.tiled import Tiled

SMALL = dict(batch=1, query_length=9, key_length=11, num_heads=2, num_key_heads=1)


@extend.pytree
class Backwards(extend.Mask):
    """Each query sees all keys from ``back`` positions before its own on."""

    back: int = extend.static()
    #: Errors of ``bounds``, in positions.
    possible: int = extend.static(default=0)
    certain: int = extend.static(default=0)

    def visible(self, tile, operands):
        return tile.key_positions >= tile.query_positions - self.back

    def bounds(self, rows, cols, operands):
        lo, hi = rows.rows_lo, rows.rows_hi
        if rows.side == "query":
            far = np.full_like(lo, 2**31 - 1)
            return (
                cols.touched(lo - self.back + self.possible, far),
                cols.covered(hi - self.back - self.certain, far),
            )
        zero = np.zeros_like(lo)
        return (
            cols.touched(zero, hi + self.back + 1 - self.possible),
            cols.covered(zero, lo + self.back + 1 + self.certain),
        )


@extend.pytree
class Ranked(extend.Score):
    """Wrong: a logit depends on the other keys of its tile."""

    def compare(self, params, query, key):
        logits = query @ key.T
        return logits - logits.mean(-1, keepdims=True) * 2


@extend.pytree
class Mixed(extend.Score):
    """Wrong: its projection mixes tokens."""

    def project_key(self, key):
        return key - key.mean(1, keepdims=True)


@extend.pytree
class Tilted(extend.Modifier):
    """Wrong: it counts positions from the start of its tile."""

    def apply(self, logits, tile, *operands):
        return logits + jnp.arange(logits.shape[1], dtype=logits.dtype)


class Scaled(Tiled):
    """Wrong: its logits are 1 % too large."""

    name = "scaled"

    def forward(self, inputs):
        return super().forward(_larger(inputs))

    def backward(self, inputs, *others, **more):
        return super().backward(_larger(inputs), *others, **more)


def _larger(inputs: Any) -> Any:
    return dataclasses.replace(inputs, logit_scale=inputs.logit_scale * 1.01)


def broken(thing, **sizes):
    with pytest.raises(extend.LawBroken) as told:
        extend.check(thing, **SMALL | sizes)
    return "\n".join(x for x in str(told.value).splitlines() if "BROKEN" in x)


def test_a_mask_that_keeps_the_laws_passes():
    report = extend.check(Backwards(3), **SMALL)
    assert all(x.passed for x in report.findings)
    assert "70 queries x 67 keys in blocks 8 x 4" in str(report)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (
            Backwards(3, possible=8),
            "holds a visible pair and is not listed as possible",
        ),
        (Backwards(3, certain=1), "said to be full and hides a pair"),
    ],
)
def test_bounds_that_are_wrong_are_told(mask, said):
    assert said in broken(mask)


@pytest.mark.slow
def test_scores_that_are_wrong_are_told():
    assert "compare looks at one pair at a time" in broken(Ranked())
    assert "projections act on each token alone" in broken(Mixed())


@pytest.mark.slow
def test_a_modifier_that_is_wrong_is_told():
    assert "tiled computes what the reference does" in broken(
        Tilted(), query_length=300, key_length=300
    )


@pytest.mark.slow
def test_an_implementation_that_is_wrong_is_told():
    told = broken(Scaled())
    assert "full, float32" in told
    assert "gradient query: error" in told
    # It is registered only while it is checked.
    assert "scaled" not in IMPLEMENTATIONS


@pytest.mark.slow
@pytest.mark.parametrize(
    "thing",
    [
        scores.cosine(np.full(2, 3, np.float32)),
        modifiers.soft_cap(3.0),
        masks.big_bird(
            window=1, anchors=1, random_blocks=1, rng=0, block_size=2, num_blocks=8
        ),
    ],
    ids=lambda x: type(x).__name__,
)
def test_what_is_attnlabs_passes(thing):
    extend.check(thing, **SMALL)


def test_no_pytree_is_told():
    class Plain(extend.Mask):
        def visible(self, tile, operands):
            return tile.key_positions <= tile.query_positions

    assert "is no pytree" in broken(Plain())


def test_what_can_be_checked():
    number: Any = 3
    kind: Any = Backwards
    with pytest.raises(TypeError, match="thing: expected a Score, a Modifier"):
        extend.check(number)
    with pytest.raises(TypeError, match="Backwards: call it"):
        extend.check(kind)
    with pytest.raises(ValueError, match="'tiled' is attnlab's own"):
        extend.check(Tiled())
    with pytest.raises(ValueError, match="Implementation.name must be a string"):
        extend.check(extend.Implementation())


class Ones(extend.Implementation):
    """Sums the values, whatever the logits are."""

    name = "ones"

    def forward(self, inputs):
        s, dtype = inputs.sizes, inputs.accumulation_dtype
        output = inputs.value.sum(1, keepdims=True)
        return jnp.broadcast_to(output, (s.B, s.T, s.N, s.D)).astype(dtype), jnp.zeros(
            (s.B, s.T, s.N), dtype
        )

    def backward(self, inputs, output, lse, d_output, d_lse, wanted):
        leaves = jax.tree.leaves(inputs)
        return [
            jnp.zeros_like(x) if on else None
            for x, on in zip(leaves, wanted, strict=True)
        ]


@pytest.fixture
def ones():
    yield Ones()
    if "ones" in IMPLEMENTATIONS:
        extend.unregister("ones")


X = np.ones((1, 5, 2, 8), np.float32)


def test_what_is_registered_runs_by_name_and_by_priority(ones):
    extend.register(ones)
    found = attention(X, X, X, implementation="ones")
    np.testing.assert_array_equal(found, np.full_like(X, 5))
    told = explain(X, X, X)
    assert told.implementation != "ones"
    assert "runs only when asked for" in told.passed_over["ones"][0]
    extend.register(ones, priority=100)
    np.testing.assert_array_equal(attention(X, X, X), np.full_like(X, 5))
    assert explain(X, X, X).implementation == "ones"
    extend.unregister("ones")
    np.testing.assert_array_equal(attention(X, X, X), X)
    with pytest.raises(ValueError, match="expected one of"):
        attention(X, X, X, implementation="ones")


def test_what_cannot_be_registered(ones):
    class Native(Ones):
        name = "native"

    class Half(extend.Implementation):
        name = "half"

        def forward(self, inputs) -> Any: ...

    class Traced(Half):
        differentiable = True

    class Nameless(extend.Implementation):
        pass

    cases: list[tuple[Any, type[Exception], str]] = [
        (Ones, TypeError, r"register an instance: Ones\(\)"),
        (3, TypeError, "got int"),
        (Native(), ValueError, "attnlab's own"),
        (Half(), TypeError, "no backward"),
        (Nameless(), ValueError, "name must be a string"),
    ]
    for wrong, error, said in cases:
        with pytest.raises(error, match=said):
            extend.register(wrong)
    high: Any = "high"
    with pytest.raises(TypeError, match="priority"):
        extend.register(ones, priority=high)
    with pytest.raises(ValueError, match="only when asked for"):
        extend.register(Traced(), priority=3)
    with pytest.raises(ValueError, match="was not registered"):
        extend.unregister("tiled")
